"""The operators of DLRM: embedding bags of many tables, and the interaction of their results."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.embedding_bag import embedding_bag
from kernels.interaction import interaction

from .work import Cost, Inputs, Kernel, Maker, Size


def _bag_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    tables = range(numbers["tables"])
    weights = [make.normal(numbers["rows"], numbers["width"], grad=True) for _ in tables]
    return weights, [make.integers(numbers["rows"], numbers["samples"], numbers["bag"]) for _ in tables]


def _our_bags(weights: list[Tensor], indices: list[Tensor]) -> Any:
    return embedding_bag(weights, indices, [], "sum", False, False)


def _bags(weights: list[Tensor], indices: list[Tensor]) -> Tensor:
    found = [functional.embedding_bag(i, w, mode="sum") for w, i in zip(weights, indices, strict=True)]
    return torch.stack(found)


def _bag_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    """Backward writes dense gradients of all tables."""
    places = numbers["tables"] * numbers["samples"] * numbers["bag"]
    out = numbers["tables"] * numbers["samples"] * numbers["width"] * itemsize
    dense = numbers["tables"] * numbers["rows"] * numbers["width"] * itemsize
    row = numbers["width"] * itemsize
    return Cost(places * (row + 8) + out), Cost(places * 8 + out + dense)


def _pairs_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    return (make.normal(numbers["samples"], numbers["features"], numbers["width"], grad=True),)


def _pairs(x: Tensor) -> Tensor:
    i, j = torch.tril_indices(x.shape[1], x.shape[1], -1, device=x.device)
    return torch.cat([x[:, 0], torch.bmm(x, x.transpose(1, 2))[:, i, j]], dim=-1)


def _pairs_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    features, width, samples = numbers["features"], numbers["width"], numbers["samples"]
    x = samples * features * width * itemsize
    out = samples * (width + features * (features - 1) // 2) * itemsize
    product = 2.0 * samples * features * features * width
    return Cost(x + out, product), Cost(2 * x + out, product)


def _bag_size(samples: int, tables: int, rows: int, bag: int, dtypes: tuple[str, ...], rank: int) -> Size:
    numbers = {"samples": samples, "tables": tables, "rows": rows, "width": 64, "bag": bag}
    return Size("DLRM", numbers, dtypes, rank)


def _pair_size(samples: int, features: int, width: int, rank: int) -> Size:
    return Size("DLRM", {"samples": samples, "features": features, "width": width}, rank=rank)


RECOMMENDATION = (
    Kernel(
        name="embedding_bag",
        ours=_our_bags,
        eager=_bags,
        inputs=_bag_inputs,
        costs=_bag_costs,
        sizes=(
            _bag_size(1024, 7, 10**6, 100, ("bf16", "fp32"), 0),
            _bag_size(4096, 8, 10**6, 1, ("bf16",), 0),
            _bag_size(256, 8, 10**6, 1, ("bf16",), 1),
            _bag_size(4096, 26, 10**5, 1, ("bf16",), 1),
        ),
        tiny={"samples": 4, "tables": 3, "rows": 9, "width": 6, "bag": 5},
    ),
    Kernel(
        name="interaction",
        ours=lambda x: interaction(x, 1),
        eager=_pairs,
        inputs=_pairs_inputs,
        costs=_pairs_costs,
        sizes=(
            _pair_size(16384, 27, 128, 0),
            _pair_size(4096, 27, 128, 1),
            _pair_size(16384, 9, 64, 1),
            _pair_size(1024, 9, 64, 1),
        ),
        tiny={"samples": 4, "features": 5, "width": 6},
    ),
)
