"""Scaled dot-product attention, with keyed dropout on the weights; the weights are never written out.

    t = scale * query key^T + mask,   w = softmax(t),   y = (w * factor) value

query [samples, heads, queries, head], key and value [samples, shared heads, keys, head]: as many heads of
queries as `heads / shared heads` share one. The mask, boolean (False hides a key) or added, broadcasts to
[samples, heads, queries, keys]; `causal` hides the keys with a higher index than the query. A query that no
key is left for gets zeros, and gives zero gradients, as in torch. The factors are those of `keyed` for
the elements of w; without a position nothing is dropped.

One program a block of queries takes the keys block by block in their order (arXiv 2307.08691): a sample's
numbers depend neither on timing nor on the other samples. For backward it keeps, beside its arguments and y,
two float32 numbers a query: the highest score and the logarithm of the sum of all exp(score - highest).
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_gradient import (
    attention_backward_delta,
    attention_backward_key_value,
    attention_backward_mask,
    attention_backward_query,
)
from .attention_layout import is_whole, narrowed, score_scale, shaped_like, widened
from .attention_reference import reference_forward
from .attention_tiles import (
    NOT_SPECIALIZED,
    allowed_scores,
    check_attention,
    common,
    head_base,
    head_of_block,
    head_rows,
    key_range,
    masked_scores,
    store_head_rows,
)
from .keyed import keyed_ahead, keyed_kept, keyed_place, keyed_stream
from .launch import blocks, launch
from .library import register, register_autograd
from .rows import statistics_dtype

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? position, int node_key, int elements, "
    "float p, bool causal, float? scale"
)


@triton.jit
def _take_keys(
    y,
    peak,
    total,
    q,
    places,
    row,
    start,
    k,
    v,
    mask,
    queries,
    keys,
    threshold,
    scale,
    BOUNDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """(y, peak, total) with one more block of keys; only a BOUNDED block may have keys that do not count."""
    column = start + tl.arange(0, STEP)
    key = head_rows(k[0], column, k[1], keys, HEAD, WIDTH, BOUNDED)
    t = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
    t = masked_scores(t, row[:, None], column[None, :], mask, queries, keys, MASK, MASK_ROWS)
    if BOUNDED:
        t = allowed_scores(t, row[:, None], column[None, :], keys, CAUSAL)
    best = tl.maximum(peak, tl.max(t, axis=1))
    origin = tl.where(best == float("-inf"), 0.0, best)
    weight = tl.exp2(t - origin[:, None])
    shrink = tl.exp2(peak - origin)
    total = total * shrink + tl.sum(weight, axis=1)
    if DROPOUT:
        place = places[:, None] + keyed_ahead(column.to(tl.int64))[None, :]
        weight = tl.where(keyed_kept(place, threshold), weight, 0.0)
    value = head_rows(v[0], column, v[1], keys, HEAD, WIDTH, BOUNDED)
    y = tl.dot(weight.to(value.dtype), value, y * shrink[:, None], input_precision=PRECISION)
    return y, best, total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_forward_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    mask_ptr,
    mask_strides,
    position_ptr,
    heads,
    group,
    queries,
    keys,
    node_key,
    elements,
    threshold,
    drop_scale,
    scale,
    y_ptr,
    y_strides,
    peak_ptr,
    log_sum_ptr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """y and the statistics of one block of queries of one head."""
    row_blocks = tl.cdiv(queries, OWN)
    index, sample, head = head_of_block(row_blocks, heads)
    first_row = (
        row_blocks - 1 - tl.program_id(0) % row_blocks
    ) * OWN  # a causal program's longest come first
    row = first_row + tl.arange(0, OWN)
    k = (head_base(k_ptr, k_strides, sample, head // group), k_strides[2])
    v = (head_base(v_ptr, v_strides, sample, head // group), v_strides[2])
    mask = (head_base(mask_ptr, mask_strides, sample, head), mask_strides)
    places = row
    if DROPOUT:
        stream, first = keyed_stream(position_ptr, node_key, elements)
        places = keyed_place(stream, first + (index * queries + row) * keys)

    q_base = head_base(q_ptr, q_strides, sample, head)
    q = head_rows(q_base, row, q_strides[2], queries, HEAD, WIDTH, True)
    y = tl.zeros((OWN, WIDTH), tl.float32)
    peak = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    whole, end = key_range(first_row, keys, CAUSAL, OWN, STEP)
    for start in range(0, whole, STEP):
        y, peak, total = _take_keys(
            *(y, peak, total, q, places, row, start, k, v, mask, queries, keys, threshold, scale, False),
            *(CAUSAL, DROPOUT, MASK, MASK_ROWS, PRECISION, HEAD, WIDTH, STEP),
        )
    for start in range(whole, end, STEP):
        y, peak, total = _take_keys(
            *(y, peak, total, q, places, row, start, k, v, mask, queries, keys, threshold, scale, True),
            *(CAUSAL, DROPOUT, MASK, MASK_ROWS, PRECISION, HEAD, WIDTH, STEP),
        )

    empty = total == 0.0
    y = y * tl.where(empty, 0.0, drop_scale / tl.where(empty, 1.0, total))[:, None]
    y_base = head_base(y_ptr, y_strides, sample, head)
    store_head_rows(y_base, row, y_strides[2], queries, y, HEAD, WIDTH)
    statistic = index * queries + row
    tl.store(peak_ptr + statistic, tl.where(empty, 0.0, peak), mask=row < queries)
    log_sum = tl.where(empty, float("inf"), tl.log2(tl.where(empty, 1.0, total)))
    tl.store(log_sum_ptr + statistic, log_sum, mask=row < queries)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    node_key: int,
    elements: int,
    p: float,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, peak, log_sum): y like query, the statistics float32 [samples, heads, queries]."""
    options = (mask, position, node_key, elements, p, causal, score_scale(scale, query.shape[3]))
    if not is_whole(query):
        wide, key, value = widened(query, key, value)
        y, peak, log_sum = launch_forward(wide, key, value, *options)
        return narrowed(y, query), peak, log_sum
    y, peak, log_sum = empty_forward(query)
    arguments, constants = common("forward", query, key, value, *options)
    launch(
        attention_forward_kernel,
        (blocks(query.shape[2], constants["OWN"]) * query.shape[0] * query.shape[1],),
        *(*arguments, y, y.stride(), peak, log_sum),
        **constants,
    )
    return y, peak, log_sum


def empty_forward(query: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """The results of the forward operator, not computed."""
    peak, log_sum = (query.new_empty(query.shape[:3], dtype=statistics_dtype(query)) for _ in range(2))
    return shaped_like(query), peak, log_sum


attention_forward = register(
    f"attention_forward({ARGUMENTS}) -> (Tensor y, Tensor peak, Tensor log_sum)",
    check=partial(check_attention, "attention"),
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)
attention = register(
    f"attention({ARGUMENTS}) -> Tensor",
    check=partial(check_attention, "attention"),
    kernel=lambda *arguments: launch_forward(*arguments)[0],
    reference=lambda *arguments: reference_forward(*arguments)[0],
    fake=lambda *arguments: empty_forward(*arguments)[0],
)


class _Attention(torch.autograd.Function):
    """Saves query, key, value, y and two numbers a query."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y: Tensor
        query, key, value, mask, position, *ctx.numbers = arguments
        y, peak, log_sum = attention_forward(*arguments)
        ctx.save_for_backward(query, key, value, y, peak, log_sum, mask, position)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, y, peak, log_sum, mask, position = ctx.saved_tensors
        delta = attention_backward_delta(dy, y)
        arguments = (dy, query, key, value, peak, log_sum, delta, mask, position, *ctx.numbers)
        needs_query, needs_key, needs_value, needs_mask, *_ = ctx.needs_input_grad
        dquery = attention_backward_query(*arguments) if needs_query else None
        both = (None, None)
        if needs_key or needs_value:
            both = attention_backward_key_value(*arguments)
        dmask = attention_backward_mask(*arguments) if needs_mask else None
        return dquery, *both, dmask, *(None,) * 6


register_autograd(attention, _Attention)
