"""The default experiment without gpp: the plain module, one process, whole mini-batches.

What the pipelined run is compared with: the same data, split, order, model and optimizer.
Run it with `python -m benchmarks.plain`.
"""

import time

import torch
from torch import Tensor

from gpp.models.mmt import MultiModalTransformer
from gpp.runtime.data import Batches, Dataset, Subset, evaluation_batches, hold_out, majority_share
from gpp.runtime.stdlib_functions import StdlibFunctions


def train(
    *,
    sequence: int = 64,
    classes: int = 16,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 2,
    ffn: int = 128,
    trigrams: int = 4093,
    steps: int = 180,
    mini_batch: int = 128,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> float:
    """Train, say how it went, and return the accuracy on the held-out tenth."""
    sequences = dict.fromkeys(MultiModalTransformer.modalities, sequence)
    dataset = StdlibFunctions(classes=classes, **sequences)
    split = hold_out(len(dataset), seed)
    training, held_out = Subset(dataset, split.train), Subset(dataset, split.held_out)
    torch.manual_seed(seed)
    model = MultiModalTransformer(
        sequences, layers=layers, hidden=hidden, heads=heads, ffn=ffn, classes=classes, trigrams=trigrams
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    batches = Batches(len(training), mini_batch, seed)
    wall, processor = time.perf_counter(), time.process_time()
    for step in range(steps):
        loss, metrics = model(**training.read(batches.at(step).tolist(), training.keys))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}  accuracy {metrics['accuracy'].item():.1%}")
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    right = evaluate(model, held_out, mini_batch)
    labels = held_out.read(range(len(held_out)), ("label",))["label"]
    print(
        f"held out {right} of {len(held_out)} right ({right / len(held_out):.1%}), the largest class is "
        f"{majority_share(labels):.1%}; {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{wall:.1f} s, {processor:.1f} s of processors"
    )
    return right / len(held_out)


@torch.no_grad()
def evaluate(model: torch.nn.Module, dataset: Dataset, mini_batch: int) -> int:
    """How many samples the model gets right."""
    model.eval()
    right = 0
    for rows in evaluation_batches(len(dataset), mini_batch):
        accuracy: Tensor = model(**dataset.read(rows, dataset.keys))[1]["accuracy"]
        right += round(accuracy.item() * len(rows))
    return right


if __name__ == "__main__":
    train()
