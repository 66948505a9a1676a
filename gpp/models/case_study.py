"""The paper's synthetic case study (GraphPipe §7.5, Fig. 10): branches of attention joined by a concat.

There are two branches of four layers, a layer being one multi-head attention and two linear layers; eight
devices take a layer each. The paper's own text gives no widths: those here are its MMT's. A plain module:
nothing in it knows of pipelines.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .mmt import TransformerLayer


class CaseStudy(nn.Module):
    """Classifies by sequences of vectors, one for each of `branches` branches of `layers` layers."""

    def __init__(
        self, *, branches: int, layers: int, hidden: int, heads: int, ffn: int, classes: int
    ) -> None:
        super().__init__()
        if branches < 1:
            raise ValueError(f"the model needs at least one branch, it has {branches}")
        self.branches = nn.ModuleList(
            nn.Sequential(*(TransformerLayer(hidden, heads, ffn, 0.0) for _ in range(layers)))
            for _ in range(branches)
        )
        self.head = nn.Linear(branches * hidden, classes)

    def forward(self, label: Tensor, **vectors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross entropy and the accuracy, means over the samples.

        `vectors_i` are float tensors (samples, sequence, hidden), `label` an int64 tensor (samples,).
        """
        encoded = [branch(vectors[f"vectors_{i}"]) for i, branch in enumerate(self.branches)]
        logits = self.head(torch.cat(encoded, dim=-1).mean(1))
        accuracy = (logits.argmax(-1) == label).to(logits.dtype).mean()
        return functional.cross_entropy(logits, label), {"accuracy": accuracy}
