"""The kernel of the gradient of attention's queries: one program a block of queries of one head.

dquery = scale * ds key,   ds = w * (factor * (dy value^T) - delta)
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from .attention_tiles import (
    LOG2_E,
    NOT_SPECIALIZED,
    allowed_scores,
    head_base,
    head_of_block,
    head_rows,
    key_range,
    masked_scores,
    store_head_rows,
    weights_again,
)
from .keyed import keyed_ahead, keyed_kept, keyed_place, keyed_stream

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _take_keys(
    dq,
    q,
    dy,
    peak,
    log_sum,
    delta,
    places,
    row,
    start,
    k,
    v,
    mask,
    queries,
    keys,
    threshold,
    drop_scale,
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
    """dq with one more block of keys; only a BOUNDED block may have keys that do not count."""
    column = start + tl.arange(0, STEP)
    key = head_rows(k[0], column, k[1], keys, HEAD, WIDTH, BOUNDED)
    value = head_rows(v[0], column, v[1], keys, HEAD, WIDTH, BOUNDED)
    t = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
    t = masked_scores(t, row[:, None], column[None, :], mask, queries, keys, MASK, MASK_ROWS)
    if BOUNDED:
        t = allowed_scores(t, row[:, None], column[None, :], keys, CAUSAL)
    weight = weights_again(t, peak[:, None], log_sum[:, None], MASK)
    dweight = tl.dot(dy, tl.trans(value), input_precision=PRECISION)
    if DROPOUT:
        place = places[:, None] + keyed_ahead(column.to(tl.int64))[None, :]
        dweight = tl.where(keyed_kept(place, threshold), dweight * drop_scale, 0.0)
    ds = weight * (dweight - delta[:, None])
    return tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_query_kernel(
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
    dy_ptr,
    dy_strides,
    peak_ptr,
    log_sum_ptr,
    delta_ptr,
    dq_ptr,
    dq_strides,
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
    """dquery of one block of queries."""
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
    dy_base = head_base(dy_ptr, dy_strides, sample, head)
    dy = head_rows(dy_base, row, dy_strides[2], queries, HEAD, WIDTH, True)
    statistic = index * queries + row
    peak = tl.load(peak_ptr + statistic, mask=row < queries, other=0.0)
    log_sum = tl.load(log_sum_ptr + statistic, mask=row < queries, other=float("inf"))
    delta = tl.load(delta_ptr + statistic, mask=row < queries, other=0.0)
    dq = tl.zeros((OWN, WIDTH), tl.float32)
    whole, end = key_range(first_row, keys, CAUSAL, OWN, STEP)
    for start in range(0, whole, STEP):
        dq = _take_keys(
            *(dq, q, dy, peak, log_sum, delta, places, row, start, k, v, mask),
            *(queries, keys, threshold, drop_scale, scale, False),
            *(CAUSAL, DROPOUT, MASK, MASK_ROWS, PRECISION, HEAD, WIDTH, STEP),
        )
    for start in range(whole, end, STEP):
        dq = _take_keys(
            *(dq, q, dy, peak, log_sum, delta, places, row, start, k, v, mask),
            *(queries, keys, threshold, drop_scale, scale, True),
            *(CAUSAL, DROPOUT, MASK, MASK_ROWS, PRECISION, HEAD, WIDTH, STEP),
        )
    dq_base = head_base(dq_ptr, dq_strides, sample, head)
    store_head_rows(dq_base, row, dq_strides[2], queries, dq * (scale / _LOG2_E), HEAD, WIDTH)
