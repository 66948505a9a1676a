"""Activations that a linear operator can apply, and their derivatives, in float32.

Only operations that the interpreter knows: no libdevice. The tanh form of GELU is written with a sigmoid,
(1 + tanh u) / 2 = sigmoid(2u), which has no cancellation.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

# The order is the code that kernels get.
ACTIVATIONS = ("none", "relu", "gelu_tanh", "gelu_erf", "silu")
NEEDS_PREACTIVATION = frozenset({"gelu_tanh", "gelu_erf", "silu"})  # relu's mask is in its own output

# To the right of a tensor only: the interpreter takes a constant times a tensor for another constant.
_GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_GELU_CUBIC = tl.constexpr(0.044715)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of float32 values; not-a-number passes through."""
    if ACTIVATION == 1:
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == 2:
        z = z * tl.sigmoid((z + z * z * z * _GELU_CUBIC) * _GELU_SLOPE)
    elif ACTIVATION == 3:
        z = 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))
    elif ACTIVATION == 4:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def differentiate(dy, saved, ACTIVATION: tl.constexpr):
    """dy times the derivative; `saved` is the output for relu, else the pre-activation, both float32."""
    if ACTIVATION == 1:
        dz = tl.where(saved <= 0, 0.0, dy)
    elif ACTIVATION == 2:
        s = tl.sigmoid((saved + saved * saved * saved * _GELU_CUBIC) * _GELU_SLOPE)
        slope = (1.0 + saved * saved * _GELU_CUBIC * 3.0) * _GELU_SLOPE
        dz = dy * s * (1.0 + saved * (1.0 - s) * slope)
    elif ACTIVATION == 3:
        density = tl.exp(-0.5 * saved * saved) * _NORMAL_DENSITY
        dz = dy * (0.5 * (1.0 + tl.erf(saved * _SQRT_HALF)) + saved * density)
    else:
        s = tl.sigmoid(saved)
        dz = dy * s * (1.0 + saved * (1.0 - s))
    return dz


def reference_activate(z: Tensor, activation: str) -> Tensor:
    """The activation in ATen."""
    match activation:
        case "relu":
            return torch.relu(z)
        case "gelu_tanh":
            return torch.nn.functional.gelu(z, approximate="tanh")
        case "gelu_erf":
            return torch.nn.functional.gelu(z)
        case "silu":
            return torch.nn.functional.silu(z)
        case _:
            return z


def reference_differentiate(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """dy times the derivative in ATen, of the same values as `differentiate`."""
    aten = torch.ops.aten
    match activation:
        case "relu":
            dz = aten.threshold_backward.default(dy, saved, 0)
        case "gelu_tanh":
            dz = aten.gelu_backward.default(dy, saved, approximate="tanh")
        case "gelu_erf":
            dz = aten.gelu_backward.default(dy, saved)
        case _:
            dz = aten.silu_backward.default(dy, saved)
    result: Tensor = dz.contiguous()
    return result
