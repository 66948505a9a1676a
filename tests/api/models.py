"""A model whose predictions somebody wants, and batches for it."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpp.api.pipeline import Pipeline
from gpp.api.start import pipeline
from gpp.capture.capture import Captured
from gpp.plan import Plan
from tests.equality.cases import Case
from tests.equality.harness import make_plan


class Ranked(nn.Module):
    """Two towers, dropout, and predictions from a tower, the head, and the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(32, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, w: Tensor, y: Tensor):
        left = torch.relu(self.a(x))
        scores = self.head(self.drop(torch.cat([left, torch.tanh(self.b(w))], 1)))
        metrics = {"accuracy": (scores.argmax(-1) == y).float().mean()}
        return F.cross_entropy(scores, y), metrics, {"score": scores.softmax(-1), "left": left, "label": y}


def ranked() -> Ranked:
    torch.manual_seed(0)
    return Ranked()


def rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, 8, generator=generator),
        "w": torch.randn(count, 8, generator=generator),
        "y": torch.randint(0, 3, (count,), generator=generator),
    }


def adam(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named, lr=1e-2)


def in_stages(model: nn.Module, *prefixes: tuple[str, ...], replicas: tuple[int, ...], **more) -> Pipeline:
    """A pipeline of the model, mini-batch 8 and micro-batch 4, with these stages. That the captured graph is
    the module's is verified elsewhere."""
    case = Case("", nn.Module, prefixes, micro_batch=4, mini_batch=8, replicas=replicas)

    def plan(captured: Captured) -> Plan:
        precision = "bfloat16" if more.get("precision") == "bf16" else "float32"
        return replace(make_plan(case, captured), precision=precision)

    return pipeline(
        model,
        rows(4),
        **{"optimizer": adam, "mini_batch": 8, "plan": plan, "devices": sum(replicas), "device": "cpu"},
        **{"verify": False, **more},
    )


def expected(
    model: nn.Module, batches: list[dict[str, Tensor]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss and accuracy, and predictions, of the module itself."""
    model.eval()
    with torch.no_grad():
        found = [model(**batch) for batch in batches]
    sizes = [len(batch["x"]) for batch in batches]
    results = {
        "loss": sum(float(f[0]) * n for f, n in zip(found, sizes, strict=True)) / sum(sizes),
        "accuracy": sum(float(f[1]["accuracy"]) * n for f, n in zip(found, sizes, strict=True)) / sum(sizes),
    }
    return results, {name: torch.cat([f[2][name] for f in found]) for name in ("score", "left", "label")}
