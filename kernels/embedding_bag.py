"""Embedding bags of many tables in one launch.

    out[t, b] = sum, or mean, over the row numbers i of bag b of table t, of weights[t][i]

The tables are tensors of their own, as in a model with one `torch.nn.EmbeddingBag` a feature; they share
their dtype and width, not their number of rows. A bag may be empty, its result is zero. Sums are float32, in
an order that depends on the bag's own length alone: a bag's result does not depend on how many bags there
are. A row number outside its table cannot raise an error on a GPU without waiting for it: its bag's result is
not-a-number there, and it has no gradient.

The gradients of the tables are in `embedding_bag_gradient`.
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

from .bags import GROUP, bag_bounds, check_bags, count_bags, flat, pick, varying, wide_dtype
from .embedding_bag_gradient import embedding_bag_backward_sparse, embedding_bag_backward_weight
from .launch import blocks, launch, power_of_two
from .library import as_rows, check_dtype, check_tensors, register, register_autograd, require
from .rows import Block
from .tuning import tuned

UNROLL = 8  # rows of a bag that are loaded at a time
STATIC = Block(elements=2048, warps=4)  # of one program's tile


@triton.jit(do_not_specialize=["rows", "counts", "bags", "entries"])
def bag_forward_kernel(
    out_ptr,
    weights,
    strides,
    rows,
    indices,
    offsets,
    counts,
    bags,
    entries,
    size,
    width,
    TABLES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    MEAN: tl.constexpr,
    BAGS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A block of bags and columns of one table; every bag's rows STEP at a time, summed at the end."""
    table = tl.program_id(2)
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    step = tl.arange(0, STEP)
    weight_ptr = pick(weights, table, TABLES)
    index_ptr = pick(indices, table, TABLES)
    height = pick(rows, table, TABLES)
    stride = pick(strides, table, TABLES)
    start, length = bag_bounds(bag, bags, offsets, counts, entries, size, table, TABLES, HAS_OFFSETS)
    total = tl.zeros((BAGS, STEP, WIDTH), tl.float32)
    for first in range(0, tl.max(length, axis=0), STEP):
        inside = first + step[None, :] < length[:, None]
        row = tl.load(index_ptr + start[:, None] + first + step[None, :], mask=inside, other=0).to(tl.int64)
        right = (row >= 0) & (row < height)
        mask = (inside & right)[:, :, None] & (column < width)[None, None, :]
        value = tl.load(weight_ptr + row[:, :, None] * stride + column[None, None, :], mask=mask, other=0.0)
        total += tl.where((inside & ~right)[:, :, None], float("nan"), value.to(tl.float32))
    y = tl.sum(total, axis=1)
    if MEAN:
        y = y / tl.maximum(length, 1).to(tl.float32)[:, None]
    mask = (bag < bags)[:, None] & (column < width)[None, :]
    offset = (table.to(tl.int64) * bags + bag)[:, None] * width + column[None, :]
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)


def launch_forward(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pooling: str,
    include_last_offset: bool,
    sparse: bool,
) -> Tensor:
    """[tables, *leading, width]; at most GROUP tables a launch."""
    out = empty_forward(weights, indices, offsets, pooling, include_last_offset, sparse)
    width = weights[0].shape[1]
    if out.numel() == 0:
        return out
    bags = count_bags(indices, offsets, include_last_offset)
    size = 1 if offsets else indices[0].shape[-1]
    step = UNROLL if offsets else max(1, min(UNROLL, power_of_two(size)))
    column_block = min(128, power_of_two(width))
    block = tuned("bags", STATIC, weights[0], size=step, width=width)
    bag_block = max(1, block.elements // (step * column_block))
    for first in range(0, len(weights), GROUP):
        group = slice(first, first + GROUP)
        tables = [as_rows(table, width) for table in weights[group]]
        launch(
            bag_forward_kernel,
            (blocks(bags, bag_block), blocks(width, column_block), len(tables)),
            out[group],
            tuple(tables),
            tuple(table.stride(0) for table in tables),
            tuple(table.shape[0] for table in tables),
            flat(indices[group]),
            flat(offsets[group]),
            varying([index.numel() for index in indices[group]]),
            bags,
            offsets[0].shape[0] if offsets else 0,
            size,
            width,
            TABLES=len(tables),
            HAS_OFFSETS=len(offsets) > 0,
            MEAN=pooling == "mean",
            BAGS=bag_block,
            STEP=step,
            WIDTH=column_block,
            num_warps=block.warps,
        )
    return out


def empty_forward(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pooling: str,
    include_last_offset: bool,
    sparse: bool,
) -> Tensor:
    """The result, not computed."""
    leading = (
        (count_bags(indices, offsets, include_last_offset),) if offsets else tuple(indices[0].shape[:-1])
    )
    return weights[0].new_empty((len(weights), *leading, weights[0].shape[1]))


def reference_forward(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pooling: str,
    include_last_offset: bool,
    sparse: bool,
) -> Tensor:
    """The forward operator in ATen; of 16-bit tables the rows in question are widened, not the tables."""
    out = empty_forward(weights, indices, offsets, pooling, include_last_offset, sparse)
    if out.numel() == 0:
        return out
    for place, (weight, index) in enumerate(zip(weights, indices, strict=True)):
        if not offsets and index.shape[-1] == 0:
            out[place] = 0
            continue
        rows = index.reshape(-1) if offsets else index.reshape(-1, index.shape[-1])
        table = weight
        if weight.dtype != wide_dtype(weight):
            table = weight.index_select(0, rows.reshape(-1)).to(wide_dtype(weight))
            rows = torch.arange(rows.numel(), dtype=rows.dtype).view(rows.shape)
        bags = torch.nn.functional.embedding_bag(
            rows,
            table,
            offsets[place] if offsets else None,
            mode=pooling,
            include_last_offset=include_last_offset and len(offsets) > 0,
        )
        out[place] = bags.view(out.shape[1:])
    return out


def check_forward(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pooling: str,
    include_last_offset: bool,
    sparse: bool,
) -> None:
    """Tables [rows, width] of one width and dtype, and the bags of each."""
    name = "embedding_bag"
    require(len(weights) > 0, name, "weights", "have at least one table", "empty")
    check_tensors(name, **{f"weights[{place}]": table for place, table in enumerate(weights)})
    for place, table in enumerate(weights):
        key = f"weights[{place}]"
        require(table.dim() == 2, name, key, "have two dimensions", tuple(table.shape))
        require(table.shape[0] >= 1, name, key, "have at least one row", tuple(table.shape))
        rule = f"have {weights[0].shape[1]} columns like weights[0]"
        require(table.shape[1] == weights[0].shape[1], name, key, rule, tuple(table.shape))
        check_dtype(name, key, table, weights[0].dtype)
    check_bags(name, len(weights), weights[0].device, indices, offsets, pooling, include_last_offset)


embedding_bag = register(
    "embedding_bag(Tensor[] weights, Tensor[] indices, Tensor[] offsets, str pooling,"
    " bool include_last_offset, bool sparse) -> Tensor",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)


class _EmbeddingBag(torch.autograd.Function):
    """Saves the row numbers and offsets, and of the tables their shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        indices: Sequence[Tensor],
        offsets: Sequence[Tensor],
        pooling: str,
        include_last_offset: bool,
        sparse: bool,
        *weights: Tensor,
    ) -> Tensor:
        out: Tensor = embedding_bag(weights, indices, offsets, pooling, include_last_offset, sparse)
        ctx.save_for_backward(*indices, *offsets)
        ctx.tables = len(weights)
        ctx.rows = [table.shape[0] for table in weights]
        ctx.options = (pooling, include_last_offset)
        ctx.sparse = sparse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        indices, offsets = ctx.saved_tensors[: ctx.tables], ctx.saved_tensors[ctx.tables :]
        wanted = [place for place in range(ctx.tables) if ctx.needs_input_grad[5 + place]]
        if len(wanted) < ctx.tables:
            dy = torch.stack([dy[place] for place in wanted])
            indices = [indices[place] for place in wanted]
            offsets = [offsets[place] for place in wanted] if offsets else []
        rows = [ctx.rows[place] for place in wanted]
        backward = _sparse if ctx.sparse else embedding_bag_backward_weight
        gradients: list[Tensor | None] = [None] * ctx.tables
        for place, gradient in zip(wanted, backward(dy, indices, offsets, rows, *ctx.options), strict=True):
            gradients[place] = gradient
        return None, None, None, None, None, *gradients


def _sparse(
    dy: Tensor, indices: Sequence[Tensor], offsets: Sequence[Tensor], rows: list[int], *options: Any
) -> list[Tensor]:
    """The gradients as sparse tensors, a row number as often as it was given."""
    row, value = embedding_bag_backward_sparse(dy, indices, offsets, rows, *options)
    counts = [index.numel() for index in indices]
    return [
        torch.sparse_coo_tensor(r[None], v, (height, dy.shape[-1]), check_invariants=False)
        for r, v, height in zip(row.split(counts), value.split(counts), rows, strict=True)
    ]


def _apply(weights: Sequence[Tensor], *arguments: Any) -> Any:
    return _EmbeddingBag.apply(*arguments, *weights)  # type: ignore[no-untyped-call]


register_autograd(embedding_bag, _apply)
