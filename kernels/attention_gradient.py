"""The gradients of `attention`, from weights that are made again block by block.

    delta = sum over the head of dy * y,   dw = factor * (dy value^T),   ds = w * (dw - delta)

    dquery = scale * ds key,   dkey = scale * ds^T query,   dvalue = (w * factor)^T dy

Each of the two passes has one order and no atomics. They are separate operators, so a graph that needs one
does not run the other; delta is shared. A mask that is added and learned has its gradient too, ds summed to
its shape, in ATen with all weights written out.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_key_value_gradient import attention_key_value_kernel
from .attention_layout import (
    aligned,
    along,
    is_whole,
    narrowed,
    score_scale,
    shaped_like,
    widened,
)
from .attention_query_gradient import attention_query_kernel
from .attention_reference import (
    reference_backward_key_value,
    reference_backward_mask,
    reference_backward_query,
    reference_delta,
)
from .attention_tiles import (
    check_attention,
    common,
    head_base,
    head_of_block,
    head_rows,
)
from .launch import blocks, launch, power_of_two
from .library import check_dtype, check_tensors, register, require
from .rows import statistics_dtype

ARGUMENTS = (
    "Tensor dy, Tensor query, Tensor key, Tensor value, Tensor peak, Tensor log_sum, Tensor delta, "
    "Tensor? mask, Tensor? position, int node_key, int elements, float p, bool causal, float? scale"
)
DELTA_ROWS = 32


@triton.jit(do_not_specialize=["heads", "queries"])
def attention_delta_kernel(
    dy_ptr,
    dy_strides,
    y_ptr,
    y_strides,
    delta_ptr,
    heads,
    queries,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta of one block of queries of one head."""
    row_blocks = tl.cdiv(queries, ROWS)
    index, sample, head = head_of_block(row_blocks, heads)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    dy_base = head_base(dy_ptr, dy_strides, sample, head)
    y_base = head_base(y_ptr, y_strides, sample, head)
    dy = head_rows(dy_base, row, dy_strides[2], queries, HEAD, WIDTH, True).to(tl.float32)
    y = head_rows(y_base, row, y_strides[2], queries, HEAD, WIDTH, True).to(tl.float32)
    tl.store(delta_ptr + index * queries + row, tl.sum(dy * y, axis=1), mask=row < queries)


def launch_delta(dy: Tensor, y: Tensor) -> Tensor:
    """delta, float32 [samples, heads, queries]."""
    delta = empty_delta(dy, y)
    samples, heads, queries, head = y.shape
    dy, y = along(dy), along(y)
    launch(
        attention_delta_kernel,
        (samples * heads * blocks(queries, DELTA_ROWS),),
        *(dy, dy.stride(), y, y.stride(), delta, heads, queries),
        HEAD=head,
        WIDTH=power_of_two(head),
        ROWS=DELTA_ROWS,
        num_warps=4,
    )
    return delta


def launch_query(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    *rest: Any,
) -> Tensor:
    """dquery."""
    *options, scale = rest
    rest = (*options, score_scale(scale, query.shape[3]))
    if not is_whole(query):
        wide = launch_query(*widened(dy, query, key, value), peak, log_sum, delta, *rest)
        return narrowed(wide, query)
    dquery, dy = shaped_like(query), aligned(dy)
    arguments, constants = common("query", query, key, value, *rest)
    launch(
        attention_query_kernel,
        (blocks(query.shape[2], constants["OWN"]) * query.shape[0] * query.shape[1],),
        *(*arguments, dy, dy.stride(), peak, log_sum, delta, dquery, dquery.stride()),
        **constants,
    )
    return dquery


def launch_key_value(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """(dkey, dvalue)."""
    *options, scale = rest
    rest = (*options, score_scale(scale, query.shape[3]))
    if not is_whole(query):
        wide = launch_key_value(*widened(dy, query, key, value), peak, log_sum, delta, *rest)
        return narrowed(wide[0], key), narrowed(wide[1], value)
    dkey, dvalue, dy = shaped_like(key), shaped_like(value), aligned(dy)
    arguments, constants = common("key_value", query, key, value, *rest)
    launch(
        attention_key_value_kernel,
        (blocks(key.shape[2], constants["OWN"]) * key.shape[0] * key.shape[1],),
        *(*arguments, dy, dy.stride(), peak, log_sum, delta),
        *(dkey, dkey.stride(), dvalue, dvalue.stride()),
        **constants,
    )
    return dkey, dvalue


def empty_delta(dy: Tensor, y: Tensor) -> Tensor:
    """delta, not computed."""
    return y.new_empty(y.shape[:-1], dtype=statistics_dtype(y))


def check_delta(dy: Tensor, y: Tensor) -> None:
    """dy is like y, of four dimensions."""
    name = "attention_backward_delta"
    check_tensors(name, dy=dy, y=y)
    require(y.dim() == 4, name, "y", "have four dimensions", tuple(y.shape))
    require(dy.shape == y.shape, name, "dy", f"have y's shape {tuple(y.shape)}", tuple(dy.shape))
    check_dtype(name, "dy", dy, y.dtype)


def check_gradient(
    name: str,
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    *rest: Any,
) -> None:
    """dy is like query, the statistics are those of its rows; the rest as forward has it."""
    check_attention(name, query, key, value, *rest)
    check_tensors(name, query=query, dy=dy, peak=peak, log_sum=log_sum, delta=delta)
    require(dy.shape == query.shape, name, "dy", f"have query's shape {tuple(query.shape)}", tuple(dy.shape))
    check_dtype(name, "dy", dy, query.dtype)
    for given, rows in (("peak", peak), ("log_sum", log_sum), ("delta", delta)):
        rule = f"have query's leading shape {tuple(query.shape[:3])}"
        require(rows.shape == query.shape[:3], name, given, rule, tuple(rows.shape))
        check_dtype(name, given, rows, statistics_dtype(query))
        require(rows.is_contiguous(), name, given, "be contiguous", rows.stride())


def check_mask_gradient(name: str, *arguments: Any) -> None:
    """There is a mask, and it is added."""
    check_gradient(name, *arguments)
    mask = arguments[7]
    added = mask is not None and mask.dtype != torch.bool
    require(added, name, "mask", "be added, of floating point", None if mask is None else mask.dtype)


attention_backward_delta = register(
    "attention_backward_delta(Tensor dy, Tensor y) -> Tensor",
    check=check_delta,
    kernel=launch_delta,
    reference=reference_delta,
    fake=empty_delta,
)
attention_backward_query = register(
    f"attention_backward_query({ARGUMENTS}) -> Tensor",
    check=partial(check_gradient, "attention_backward_query"),
    kernel=launch_query,
    reference=reference_backward_query,
    fake=lambda dy, query, *_: shaped_like(query),
)
attention_backward_key_value = register(
    f"attention_backward_key_value({ARGUMENTS}) -> (Tensor dkey, Tensor dvalue)",
    check=partial(check_gradient, "attention_backward_key_value"),
    kernel=launch_key_value,
    reference=reference_backward_key_value,
    fake=lambda dy, query, key, value, *_: (shaped_like(key), shaped_like(value)),
)
attention_backward_mask = register(
    f"attention_backward_mask({ARGUMENTS}) -> Tensor",
    check=partial(check_mask_gradient, "attention_backward_mask"),
    kernel=reference_backward_mask,
    reference=reference_backward_mask,
    fake=lambda *arguments: arguments[7].new_empty(arguments[7].shape),
)
