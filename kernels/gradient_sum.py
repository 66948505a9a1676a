"""The sum of several tensors of one shape in one launch: of a value's gradients, or of branches.

    out = ((parts[0] + parts[1]) + parts[2]) + ...

in float32 and in this order, rounded once at the end: in float32 the bits are those of torch's additions one
after the other. Parts may be 16 bits wide where the sum is not, so casts need not be written. Up to GROUP
parts go to one launch, further ones are added to what it made.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import blocks, launch
from .library import check_dtype, check_tensors, register, register_autograd, require
from .rows import Block
from .tuning import tuned

GROUP = 8  # more loads at a time do not hide more of the memory's latency, and cost registers
STATIC = Block(1024, 4)
NARROW = (torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(out_ptr, parts, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One block of the sum."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    total = tl.load(parts[0] + index, mask=inside, other=0.0).to(tl.float32)
    for place in tl.static_range(1, PARTS):
        total += tl.load(parts[place] + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=inside)


def launch_sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum, contiguous."""
    out = empty_sum(parts, dtype)
    count = out.numel()
    block = tuned("sum", STATIC, out)
    waiting = [part.contiguous() for part in parts]
    while len(waiting) > 1:
        group, waiting = waiting[:GROUP], waiting[GROUP:]
        wide = out if not waiting or dtype == torch.float32 else out.new_empty(out.shape, dtype=torch.float32)
        launch(
            sum_kernel,
            (blocks(count, block.elements),),
            wide,
            tuple(group),
            count,
            PARTS=len(group),
            BLOCK=block.elements,
            num_warps=block.warps,
        )
        waiting = [wide, *waiting] if waiting else []
    return out


def empty_sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum, not computed."""
    return parts[0].new_empty(parts[0].shape, dtype=dtype)


def reference_sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum in ATen."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part
    return total.to(dtype).contiguous()


def check_sum(parts: Sequence[Tensor], dtype: torch.dtype) -> None:
    """At least two tensors of one shape and of the sum's dtype, or narrower than it."""
    name = "sum_of"
    require(len(parts) >= 2, name, "parts", "have at least two tensors", len(parts))
    check_tensors(name, **{f"parts[{place}]": part for place, part in enumerate(parts)})
    allowed = (dtype,) if dtype in NARROW else (dtype, *NARROW)
    for place, part in enumerate(parts):
        key = f"parts[{place}]"
        rule = f"have the shape of parts[0], {tuple(parts[0].shape)}"
        require(part.shape == parts[0].shape, name, key, rule, tuple(part.shape))
        check_dtype(name, key, part, *allowed)


sum_of = register(
    "sum_of(Tensor[] parts, ScalarType dtype) -> Tensor",
    check=check_sum,
    kernel=launch_sum,
    reference=reference_sum,
    fake=empty_sum,
)


class _SumOf(torch.autograd.Function):
    """Saves nothing; every part has the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        ctx.dtypes = [part.dtype for part in parts]
        y: Tensor = sum_of(parts, dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return None, *(dy.to(dtype) if needs else None for dtype, needs in needed)


def _apply(parts: Sequence[Tensor], dtype: torch.dtype) -> Any:
    return _SumOf.apply(dtype, *parts)  # type: ignore[no-untyped-call]


register_autograd(sum_of, _apply)
