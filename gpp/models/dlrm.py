"""A deep learning recommendation model: towers over dense features beside embedding bags.

The paper's DLRM (GraphPipe §7.1, A.2) has seven dense features, each with a tower of four layers of 4096,
and seven sparse ones, each with a table of a million rows of 64 and bags of 100 that are concatenated; what
follows the interaction is 4096 wide. A plain module: nothing in it knows of pipelines.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

POOLINGS = ("concat", "sum", "mean")
INTERACTIONS = ("concat", "dot")


class ConcatBag(nn.Embedding):
    """Embeddings side by side: (samples, bag) of row numbers to (samples, bag x dimension)."""

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return super().forward(input).flatten(1)


def tower(sizes: list[int]) -> nn.Sequential:
    """Linear layers from each size to the next, a ReLU after every one."""
    return nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())))


class Dlrm(nn.Module):
    """Predicts a click.

    `dense` features are vectors of `features` numbers, each read by a tower of `dense_layers` layers of
    `hidden`; `tables` sparse ones are bags of `bag` row numbers of an own table, `rows` x `dimension`.
    `pooling` says what becomes of a bag, `interaction` of all results: `concat` puts them side by side, `dot`
    takes the products of all pairs (then towers end at `dimension`, and bags must be pooled). `top_layers`
    layers of `hidden` and one output follow. Raises ValueError for a choice or number that cannot be.
    """

    def __init__(
        self,
        *,
        dense: int,
        features: int,
        dense_layers: int,
        hidden: int,
        tables: int,
        rows: int,
        dimension: int,
        bag: int,
        pooling: str,
        interaction: str,
        top_layers: int,
    ) -> None:
        super().__init__()
        _check(dense, tables, pooling, interaction)
        self.interaction = interaction
        last = dimension if interaction == "dot" else hidden
        inner = [hidden] * (dense_layers - 1)
        make: Callable[[], nn.Module] = (
            (lambda: ConcatBag(rows, dimension))
            if pooling == "concat"
            else (lambda: nn.EmbeddingBag(rows, dimension, mode=pooling))
        )
        self.towers = nn.ModuleList(tower([features, *inner, last]) for _ in range(dense))
        self.bags = nn.ModuleList(make() for _ in range(tables))
        for table in self.bags.parameters():
            nn.init.normal_(table, std=dimension**-0.5)
        joined = dense * last + tables * dimension * (bag if pooling == "concat" else 1)
        if interaction == "dot":
            count = dense + tables
            joined = dense * last + count * (count - 1) // 2
        self.top = tower([joined, *[hidden] * top_layers])
        self.out = nn.Linear(hidden if top_layers else joined, 1)

    def forward(self, label: Tensor, **keys: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The binary cross entropy and the accuracy, means over the samples.

        `dense_i` are float tensors (samples, features), `sparse_i` int64 tensors (samples, bag), `label` a
        float tensor (samples,) of zeros and ones.
        """
        towers = [tower(keys[f"dense_{i}"]) for i, tower in enumerate(self.towers)]
        bags = [bag(keys[f"sparse_{i}"]) for i, bag in enumerate(self.bags)]
        joined = torch.cat([*towers, *bags], dim=-1) if self.interaction == "concat" else _dots(towers, bags)
        logits = self.out(self.top(joined)).squeeze(-1)
        loss = functional.binary_cross_entropy_with_logits(logits, label)
        accuracy = ((logits > 0) == (label > 0.5)).to(logits.dtype).mean()
        return loss, {"accuracy": accuracy}


def _dots(towers: list[Tensor], bags: list[Tensor]) -> Tensor:
    """The towers' results, and the products of all pairs of results."""
    stacked = torch.stack([*towers, *bags], dim=1)
    i, j = torch.tril_indices(stacked.shape[1], stacked.shape[1], -1, device=stacked.device)
    products = torch.bmm(stacked, stacked.transpose(1, 2))[:, i, j]
    return torch.cat([*towers, products], dim=-1)


def _check(dense: int, tables: int, pooling: str, interaction: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, it is {pooling}")
    if interaction not in INTERACTIONS:
        raise ValueError(f"interaction must be one of {', '.join(INTERACTIONS)}, it is {interaction}")
    if interaction == "dot" and pooling == "concat":
        raise ValueError("a dot interaction needs one vector a bag: use pooling sum or mean")
    if dense < 1 or tables < 0:
        raise ValueError(f"dense must be at least 1 and tables at least 0, they are {dense} and {tables}")
