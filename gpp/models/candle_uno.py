"""CANDLE-Uno: how strongly a tumour cell line responds to a pair of drugs, from towers over their features.

The benchmark (github.com/ECP-CANDLE/Benchmarks, Pilot1/Uno) as the paper sizes it (GraphPipe §7.1, A.2):
seven branches of four layers of 4096, one for each feature set, joined by a concatenation. The paper varies
the number of branches (Fig. 7). A plain module: nothing in it knows of pipelines.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from .dlrm import tower


def branch_features(features: Mapping[str, int], branches: int) -> dict[str, int]:
    """The names and widths of `branches` feature sets: those of `features` in order, and from its start again
    as name_2, name_3 where there are fewer. Raises ValueError for none."""
    if branches < 1 or not features:
        raise ValueError(f"a model needs a branch and a feature set, it has {branches} and {len(features)}")
    names = list(features)
    found = {}
    for i in range(branches):
        name, turn = names[i % len(names)], i // len(names)
        found[f"{name}_{turn + 1}" if turn else name] = features[name]
    return found


class CandleUno(nn.Module):
    """Predicts the growth of a cell line under two drugs.

    `features` gives the widths of the feature sets, `branches` how many of them there are (see
    `branch_features`). Each has a tower of `layers` layers of `hidden`; `top_layers` more and one output
    follow their concatenation. Raises ValueError for no branch.
    """

    def __init__(
        self, features: Mapping[str, int], *, branches: int, layers: int, hidden: int, top_layers: int
    ) -> None:
        super().__init__()
        widths = branch_features(features, branches)
        self.towers = nn.ModuleDict(
            {name: tower([width, *[hidden] * layers]) for name, width in widths.items()}
        )
        joined = sum(hidden if layers else width for width in widths.values())
        self.top = tower([joined, *[hidden] * top_layers])
        self.out = nn.Linear(hidden if top_layers else joined, 1)

    def forward(self, growth: Tensor, **features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error and the mean absolute error.

        Each feature set is a float tensor (samples, its width), `growth` one of (samples,).
        """
        joined = torch.cat([tower(features[name]) for name, tower in self.towers.items()], dim=-1)
        predicted = self.out(self.top(joined)).squeeze(-1)
        return functional.mse_loss(predicted, growth), {"mae": (predicted - growth).abs().mean()}
