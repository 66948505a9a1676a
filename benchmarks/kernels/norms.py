"""Norms, dropout, sums and losses: all bound by memory."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.add_norm import add_norm
from kernels.cross_entropy import cross_entropy
from kernels.dropout import dropout
from kernels.gradient_sum import sum_of
from kernels.layer_norm import layer_norm
from kernels.pointwise_loss import binary_cross_entropy_with_logits, mse_loss
from kernels.rms_norm import rms_norm

from .work import Cost, Inputs, Kernel, Liger, Maker, Size

EPS = 1e-5
TOKENS = 256  # of a sample of the multi-modal transformer
WIDTH = 1024


def _transformer(*samples: int, dtypes: tuple[str, ...] = ("bf16",), **more: int) -> tuple[Size, ...]:
    """Micro-batches of MMT; the one that fills the chip first."""
    return tuple(
        Size("MMT", {"rows": count * TOKENS, "width": WIDTH, **more}, dtypes, rank=0 if count == 64 else 1)
        for count in samples
    )


def _norm_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    width = numbers["width"]
    x = make.normal(numbers["rows"], width, grad=True)
    return x, make.normal(width, scale=0.5, grad=True), make.normal(width, scale=0.5, grad=True)


def _norm_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    """x and y; then dy, x and dx, and dy and x again for the weights, an operator of its own."""
    element = numbers["rows"] * numbers["width"] * itemsize
    return Cost(2 * element), Cost(5 * element)


def _sum_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    """What is added, and what the norm takes."""
    x, *parameters = _norm_inputs(numbers, make)
    return x, make.normal(*x.shape, grad=True), *parameters


def _sum_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    """x, residual, their sum and y; then dy, that of the sum, the sum and one gradient for both, and dy and
    the sum again for the weights."""
    element = numbers["rows"] * numbers["width"] * itemsize
    return Cost(4 * element), Cost(6 * element)


def _our_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Layer norm, or RMS norm without a bias."""
    centred = bias is not None
    return add_norm(x, residual, weight, bias, EPS, centred, x.dtype, None, 0, 0, 0.0)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    s = residual + x
    return functional.layer_norm(s, s.shape[-1:], weight, bias, EPS), s


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = residual + x
    return functional.rms_norm(s, s.shape[-1:], weight, EPS), s


def _elements(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    element = numbers["rows"] * numbers["width"] * itemsize
    return Cost(2 * element), Cost(2 * element)


def _dropout_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    x = make.normal(numbers["rows"], numbers["width"], grad=True)
    return x, make.integers(1 << 30, 2), numbers["percent"] / 100


def _our_dropout(x: Tensor, position: Tensor, p: float) -> Any:
    return dropout(x, position, 1 << 40, x.shape[-1] * TOKENS, p)


def _sum_of_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    shape = numbers["rows"], numbers["width"]
    return ([make.normal(*shape) for _ in range(numbers["parts"])],)


def _sum_of_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    return Cost((numbers["parts"] + 1) * numbers["rows"] * numbers["width"] * itemsize), Cost(0)


def _class_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    rows, classes = numbers["rows"], numbers["classes"]
    return make.normal(rows, classes, grad=True), make.integers(classes, rows)


def _class_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    logits = numbers["rows"] * numbers["classes"] * itemsize
    return Cost(logits), Cost(2 * logits)


def _pair_inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    count = numbers["elements"]
    return make.normal(count, grad=True), make.integers(2, count).to(make.dtype)


def _pair_costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    element = numbers["elements"] * itemsize
    return Cost(2 * element), Cost(3 * element)


_PAIRS = (
    Size("CANDLE", {"elements": 4096}, ("fp32",)),
    Size("large", {"elements": 1 << 26}, ("bf16", "fp32"), rank=0),
)

NORMS = (
    Kernel(
        name="layer_norm",
        ours=lambda x, weight, bias: layer_norm(x, weight, bias, EPS),
        eager=lambda x, weight, bias: functional.layer_norm(x, x.shape[-1:], weight, bias, EPS),
        inputs=_norm_inputs,
        costs=_norm_costs,
        sizes=(
            *_transformer(64, 16, 4, 1),
            *_transformer(64, dtypes=("fp32",)),
            Size("wide", {"rows": 8192, "width": 4096}),
        ),
        tiny={"rows": 5, "width": 24},
        liger=Liger("liger_layer_norm", lambda norm: lambda x, w, b: norm(x, w, b, EPS)),
    ),
    Kernel(
        name="add_norm",
        ours=_our_add_norm,
        eager=_add_layer_norm,
        inputs=_sum_inputs,
        costs=_sum_costs,
        sizes=_transformer(64, 16, 4),
        tiny={"rows": 5, "width": 24},
        note="Layer norm of a residual sum, which is a result too.",
    ),
    Kernel(
        name="add_norm_rms",
        ours=_our_add_norm,
        eager=_add_rms_norm,
        inputs=lambda numbers, make: _sum_inputs(numbers, make)[:3],
        costs=_sum_costs,
        sizes=_transformer(64, 4),
        tiny={"rows": 5, "width": 24},
        liger=Liger("liger_fused_add_rms_norm", lambda norm: lambda x, r, w: norm(x, r, w, EPS)),
    ),
    Kernel(
        name="rms_norm",
        ours=lambda x, weight: rms_norm(x, weight, EPS),
        eager=lambda x, weight: functional.rms_norm(x, x.shape[-1:], weight, EPS),
        inputs=lambda numbers, make: _norm_inputs(numbers, make)[:2],
        costs=_norm_costs,
        sizes=(*_transformer(64, 4), Size("wide", {"rows": 8192, "width": 4096})),
        tiny={"rows": 5, "width": 24},
        liger=Liger("liger_rms_norm", lambda norm: lambda x, w: norm(x, w, EPS, in_place=False)),
    ),
)
DROPOUT = (
    Kernel(
        name="sum_of",
        ours=lambda parts: sum_of(parts, parts[0].dtype),
        eager=lambda parts: reduce(torch.add, parts),
        inputs=_sum_of_inputs,
        costs=_sum_of_costs,
        sizes=(
            Size("MMT", {"parts": 4, "rows": 64 * TOKENS, "width": WIDTH}, rank=0),
            Size("CANDLE", {"parts": 7, "rows": 1024, "width": 4096}),
        ),
        tiny={"parts": 3, "rows": 5, "width": 24},
        passes=("forward",),
        note="Of branches, and of gradients where a value is read several times.",
    ),
    Kernel(
        name="dropout",
        ours=_our_dropout,
        eager=lambda x, position, p: functional.dropout(x, p),
        inputs=_dropout_inputs,
        costs=_elements,
        sizes=_transformer(64, 4, percent=10),
        tiny={"rows": 5, "width": 24, "percent": 0},
        random=True,
        note="Torch reads or keeps a mask in backward, ours makes its bits again.",
    ),
)
LOSSES = (
    Kernel(
        name="cross_entropy",
        ours=lambda logits, target: cross_entropy(logits, target, "mean", -100, 0.0),
        eager=functional.cross_entropy,
        inputs=_class_inputs,
        costs=_class_costs,
        sizes=(
            Size("vocabulary", {"rows": 8192, "classes": 32000}, rank=0),
            Size("MMT", {"rows": 1024, "classes": 16}, ("fp32",)),
        ),
        tiny={"rows": 5, "classes": 11},
        liger=Liger("liger_cross_entropy", lambda loss: loss),
        note="Liger-Kernel makes the gradient in its forward, in place of the logits.",
    ),
    Kernel(
        name="mse_loss",
        ours=lambda x, target: mse_loss(x, target, "mean"),
        eager=functional.mse_loss,
        inputs=_pair_inputs,
        costs=_pair_costs,
        sizes=_PAIRS,
        tiny={"elements": 37},
    ),
    Kernel(
        name="bce_loss",
        ours=lambda x, target: binary_cross_entropy_with_logits(x, target, "mean"),
        eager=functional.binary_cross_entropy_with_logits,
        inputs=_pair_inputs,
        costs=_pair_costs,
        sizes=_PAIRS,
        tiny={"elements": 37},
    ),
)
