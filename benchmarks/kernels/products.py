"""Linear layers with an epilogue, and their weight gradients added in place."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.linear import linear
from kernels.linear_gradient import linear_accumulate_weight, linear_backward_input_activation

from .work import Cost, Function, Inputs, Kernel, Maker, Size

TOKENS = 256


def _inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    rows, inner, columns = numbers["rows"], numbers["inner"], numbers["columns"]
    return (
        make.normal(rows, inner, grad=True),
        make.normal(columns, inner, scale=inner**-0.5, grad=True),
        make.normal(columns, grad=True),
    )


def _costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    """A product forward and two backward; what the epilogues read and write is the smaller part."""
    rows, inner, columns = numbers["rows"], numbers["inner"], numbers["columns"]
    product = 2.0 * rows * inner * columns
    x, weight, y = rows * inner * itemsize, columns * inner * itemsize, rows * columns * itemsize
    return Cost(x + weight + y, product), Cost(2 * (x + weight + y), 2 * product)


def _accumulate_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    rows, inner, columns = numbers["rows"], numbers["inner"], numbers["columns"]
    total = make.normal(columns, inner, dtype=torch.float32)
    return total, make.normal(rows, columns), make.normal(rows, inner)


def _accumulate_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    rows, inner, columns = numbers["rows"], numbers["inner"], numbers["columns"]
    moved = rows * (inner + columns) * itemsize + 2 * columns * inner * 4
    return Cost(moved, 2.0 * rows * inner * columns), Cost(0)


def _add_product(total: Tensor, dz: Tensor, x: Tensor) -> Tensor:
    return total.add_(dz.t() @ x)


def _residual_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    residual = make.normal(numbers["rows"], numbers["columns"], grad=True)
    return *_inputs(numbers, make), residual, make.integers(1 << 30, 2), numbers["percent"] / 100


def _residual_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    forward, backward = _costs(numbers, itemsize)
    return forward + Cost(numbers["rows"] * numbers["columns"] * itemsize), backward


def _our_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, at: Tensor, p: float) -> Any:
    return linear(x, weight, bias, "relu", residual, at, 1 << 40, weight.shape[0], p)


def _eager_residual(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, at: Tensor, p: float
) -> Tensor:
    return residual + functional.dropout(functional.relu(functional.linear(x, weight, bias)), p)


def _derivative_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    rows, inner, columns = numbers["rows"], numbers["inner"], numbers["columns"]
    return (
        make.normal(rows, inner),
        make.normal(inner, columns, scale=inner**-0.5),
        make.normal(rows, columns),
    )


def _derivative_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    return _residual_costs(numbers, itemsize)[0], Cost(0)


def _derivative(dz: Tensor, weight: Tensor, saved: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten.gelu_backward(dz @ weight, saved)
    return made


def _layer(activation: str, apply: Callable[[Tensor], Tensor]) -> tuple[Function, Function]:
    """(ours, eager) of a linear layer with this activation."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear(x, weight, bias, activation)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return apply(functional.linear(x, weight, bias))

    return ours, eager


def _with_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One call of the vendor's library, forward only."""
    with torch.no_grad():
        return torch._addmm_activation(bias, x, weight.t())


def _shape(
    model: str,
    rows: int,
    inner: int,
    columns: int,
    rank: int = 1,
    dtypes: tuple[str, ...] = ("bf16",),
    **more: int,
) -> Size:
    return Size(model, {"rows": rows, "inner": inner, "columns": columns, **more}, dtypes, rank)


_TINY = {"rows": 6, "inner": 16, "columns": 24}
_GELU = _layer("gelu_erf", functional.gelu)
_RELU = _layer("relu", functional.relu)
PRODUCTS = (
    Kernel(
        name="linear_gelu",
        ours=_GELU[0],
        eager=_GELU[1],
        inputs=_inputs,
        costs=_costs,
        sizes=tuple(
            _shape("MMT", samples * TOKENS, 1024, 4096, rank=0 if samples in (4, 64) else 1)
            for samples in (64, 4, 16, 1)
        ),
        tiny=_TINY,
        fused=True,
    ),
    Kernel(
        name="linear_relu",
        ours=_RELU[0],
        eager=_RELU[1],
        inputs=_inputs,
        costs=_costs,
        sizes=(
            _shape("CANDLE", 1024, 4192, 4192, rank=0),
            _shape("CANDLE", 4096, 4096, 4096, rank=0),
            _shape("CANDLE", 4096, 4192, 4192),
            _shape("CANDLE", 64, 4192, 4192),
            _shape("CANDLE", 1024, 5270, 4192),
            _shape("CANDLE", 1024, 942, 4192),
            _shape("DLRM", 4096, 576, 1024),
            _shape("DLRM", 1024, 1024, 1024),
            _shape("CANDLE", 1024, 4096, 4096, rank=2, dtypes=("fp32",)),
        ),
        tiny=_TINY,
        library=_with_relu,
        fused=True,
        note="The library's column is cuBLASLt's epilogue (torch._addmm_activation), which has no backward.",
    ),
    Kernel(
        name="linear_relu_dropout_residual",
        ours=_our_residual,
        eager=_eager_residual,
        inputs=_residual_inputs,
        costs=_residual_costs,
        sizes=(
            _shape("CANDLE", 1024, 4192, 4192, rank=0, percent=10),
            _shape("CANDLE", 4096, 4192, 4192, percent=10),
            _shape("CANDLE", 64, 4192, 4192, percent=10),
        ),
        tiny={**_TINY, "percent": 0},
        random=True,
        fused=True,
    ),
    Kernel(
        name="linear_derivative",
        ours=lambda dz, weight, saved: linear_backward_input_activation(dz, weight, saved, "gelu_erf"),
        eager=_derivative,
        inputs=_derivative_inputs,
        costs=_derivative_costs,
        sizes=(
            _shape("MMT", 1024, 1024, 4096, rank=0),
            _shape("MMT", 16384, 1024, 4096),
            _shape("CANDLE", 1024, 4192, 4192),
        ),
        tiny=_TINY,
        passes=("forward",),
        fused=True,
        note="The gradient of a layer's input times the derivative of GELU, against torch's two.",
    ),
    Kernel(
        name="linear_accumulate",
        ours=lambda total, dz, x: linear_accumulate_weight(total, dz, x),
        eager=_add_product,
        inputs=_accumulate_inputs,
        costs=_accumulate_costs,
        sizes=(
            _shape("CANDLE", 64, 4192, 4192, rank=0),
            _shape("CANDLE", 1024, 4192, 4192),
            _shape("MMT", 1024, 1024, 4096, rank=0),
            _shape("MMT", 16384, 1024, 4096),
        ),
        tiny=_TINY,
        passes=("forward",),
        note="The weights' gradient added to its float32 sum, against a product and an addition.",
    ),
)
