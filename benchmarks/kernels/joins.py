"""Linear layers over the concatenation of branches, which is not made."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.join_linear import join_linear

from .work import Cost, Inputs, Kernel, Maker, Size


def _inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    parts, width, columns = numbers["parts"], numbers["width"], numbers["columns"]
    xs = [make.normal(numbers["rows"], width, grad=True) for _ in range(parts)]
    weight = make.normal(columns, parts * width, scale=(parts * width) ** -0.5, grad=True)
    return xs, weight, make.normal(columns, grad=True)


def _ours(xs: list[Tensor], weight: Tensor, bias: Tensor) -> Any:
    return join_linear(xs, weight, bias, "relu")


def _eager(xs: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return functional.relu(functional.linear(torch.cat(xs, -1), weight, bias))


def _costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    """A product forward and two backward."""
    rows, inner, columns = numbers["rows"], numbers["parts"] * numbers["width"], numbers["columns"]
    product = 2.0 * rows * inner * columns
    moved = (rows * inner + columns * inner + rows * columns) * itemsize
    return Cost(moved, product), Cost(2 * moved, 2 * product)


def _shape(model: str, rows: int, parts: int, width: int, columns: int, rank: int = 1) -> Size:
    return Size(model, {"rows": rows, "parts": parts, "width": width, "columns": columns}, rank=rank)


JOINS = (
    Kernel(
        name="join_linear",
        ours=_ours,
        eager=_eager,
        inputs=_inputs,
        costs=_costs,
        sizes=(
            _shape("CANDLE", 1024, 7, 4096, 4096, rank=0),
            _shape("CANDLE", 64, 7, 4096, 4096, rank=0),
            _shape("CANDLE", 4096, 7, 4096, 4096),
            _shape("MMT", 64, 4, 1024, 16),
        ),
        tiny={"rows": 6, "parts": 3, "width": 8, "columns": 24},
        fused=True,
    ),
)
