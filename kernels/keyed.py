"""Random bits of dropout that depend on nothing but (key, step, element): the same whatever the tiling.

    stream = mix(mix(step * GOLDEN + key) + key),   bits = mix(stream + (counter + 1) * GOLDEN) >> 40

with Steele, Lea and Flood's SplitMix64 finaliser as mix, on 64 bits that wrap. An element is kept if its 24
bits are at least round(p * 2^24). `position` is an int64 tensor (step, first sample), read on the device; the
counter of the i-th element of what is dropped is first sample * elements + i, where `elements` is how many
one sample has (0 if none of the dimensions holds samples). So a micro-batch sees its own part of what the
whole batch would, and backward makes the bits again instead of keeping them.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import check_dtype, require

RESOLUTION = 1 << 24
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(value):
    """64 well-mixed bits from 64 bits."""
    value = (value ^ (value >> 30)) * _FIRST
    value = (value ^ (value >> 27)) * _SECOND
    return value ^ (value >> 31)


@triton.jit
def keyed_stream(position_ptr, key, elements):
    """(stream, first counter): of the step and node, and of the first element of what is dropped."""
    step = tl.load(position_ptr).to(tl.uint64, bitcast=True)
    first = tl.load(position_ptr + 1) * elements
    wide = key.to(tl.int64).to(tl.uint64, bitcast=True)
    return _mix(_mix(step * _GOLDEN + wide) + wide), first


@triton.jit
def keyed_place(stream, counter):
    """What the bits of an element are mixed from. `counter` is int64, of any shape."""
    return stream + (counter + 1).to(tl.uint64, bitcast=True) * _GOLDEN


@triton.jit
def keyed_ahead(count):
    """What to add to a place for that of an element `count`, an int64, further on."""
    return count.to(tl.uint64, bitcast=True) * _GOLDEN


@triton.jit
def keyed_kept(place, threshold):
    """Whether the elements at these places survive."""
    return (_mix(place) >> 40).to(tl.int32) >= threshold


@triton.jit
def keyed_factor(stream, counter, threshold, scale):
    """What elements are multiplied by: `scale` or zero. `counter` is int64, of any shape."""
    return tl.where(keyed_kept(keyed_place(stream, counter), threshold), scale, 0.0)


def threshold_and_scale(p: float) -> tuple[int, float]:
    """The least 24 bits that survive dropout with probability p, and what survivors are multiplied by."""
    return round(p * RESOLUTION), 1.0 / (1.0 - p) if p < 1.0 else 0.0


def check_keyed(operator: str, position: Tensor, elements: int, p: float, beside: Tensor) -> None:
    """position [2] int64 on the device of `beside`, elements at least 0, p in [0, 1]."""
    require(tuple(position.shape) == (2,), operator, "position", "have shape (2,)", tuple(position.shape))
    check_dtype(operator, "position", position, torch.int64)
    same = position.device == beside.device
    require(same, operator, "position", f"be on {beside.device}", position.device)
    require(position.is_contiguous(), operator, "position", "be contiguous", position.stride())
    require(elements >= 0, operator, "elements", "be at least 0", elements)
    require(0.0 <= p <= 1.0, operator, "p", "lie in [0, 1]", p)


def reference_factor(like: Tensor, position: Tensor, key: int, elements: int, p: float) -> Tensor:
    """The factors of all elements of `like`, in its dtype or float32, in ATen (its int64 wraps too)."""
    golden, first, second = (
        int(c.value) - (1 << 64) for c in (_GOLDEN, _FIRST, _SECOND)
    )  # torch takes no integer above 2^63

    def mix(value: Tensor) -> Tensor:
        for shift, factor in ((30, first), (27, second), (31, 1)):
            value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return value

    least, scale = threshold_and_scale(p)
    stream = mix(mix(position[0] * golden + key) + key)
    counter = position[1] * elements + torch.arange(like.numel(), device=like.device).view(like.shape)
    bits = (mix(stream + (counter + 1) * golden) >> 40) & (RESOLUTION - 1)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (bits >= least).to(wide) * scale
