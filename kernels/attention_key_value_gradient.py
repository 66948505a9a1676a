"""The kernel of the gradients of attention's keys and values: one program a block of keys.

    dkey = scale * ds^T query,   dvalue = (w * factor)^T dy,   ds = w * (factor * (dy value^T) - delta)

Tiles are [keys, queries]. The program takes the queries of all heads that share its keys, head by head and
block by block in their order.
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
    masked_scores,
    store_head_rows,
    weights_again,
)
from .keyed import keyed_ahead, keyed_kept, keyed_place, keyed_stream

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _take_queries(
    dk,
    dv,
    k,
    v,
    places,
    column,
    start,
    q,
    dy,
    peak_base,
    log_sum_base,
    delta_base,
    mask,
    queries,
    keys,
    threshold,
    drop_scale,
    scale,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """(dk, dv) with one more block of queries. Those that do not exist have weights of zero; keys that do not
    exist are not stored."""
    row = start + tl.arange(0, STEP)
    query = head_rows(q[0], row, q[1], queries, HEAD, WIDTH, True)
    gradient = head_rows(dy[0], row, dy[1], queries, HEAD, WIDTH, True)
    peak = tl.load(peak_base + row, mask=row < queries, other=0.0)
    log_sum = tl.load(log_sum_base + row, mask=row < queries, other=float("inf"))
    delta = tl.load(delta_base + row, mask=row < queries, other=0.0)
    t = tl.dot(k, tl.trans(query), input_precision=PRECISION) * scale
    t = masked_scores(t, row[None, :], column[:, None], mask, queries, keys, MASK, MASK_ROWS)
    if CAUSAL:
        t = allowed_scores(t, row[None, :], column[:, None], keys, True)
    weight = weights_again(t, peak[None, :], log_sum[None, :], MASK)
    dweight = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
    dropped = weight
    if DROPOUT:
        place = places[:, None] + keyed_ahead(row.to(tl.int64) * keys)[None, :]
        factor = tl.where(keyed_kept(place, threshold), drop_scale, 0.0)
        dropped = weight * factor
        dweight = dweight * factor
    dv = tl.dot(dropped.to(gradient.dtype), gradient, dv, input_precision=PRECISION)
    ds = weight * (dweight - delta[None, :])
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_key_value_kernel(
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
    dk_ptr,
    dk_strides,
    dv_ptr,
    dv_strides,
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
    """dkey and dvalue of one block of keys."""
    key_blocks = tl.cdiv(keys, OWN)
    _, sample, shared = head_of_block(key_blocks, heads // group)
    first_column = tl.program_id(0) % key_blocks * OWN
    column = first_column + tl.arange(0, OWN)
    k_base = head_base(k_ptr, k_strides, sample, shared)
    k = head_rows(k_base, column, k_strides[2], keys, HEAD, WIDTH, True)
    v_base = head_base(v_ptr, v_strides, sample, shared)
    v = head_rows(v_base, column, v_strides[2], keys, HEAD, WIDTH, True)
    dk = tl.zeros((OWN, WIDTH), tl.float32)
    dv = tl.zeros((OWN, WIDTH), tl.float32)
    begin = 0
    if CAUSAL:
        begin = first_column // STEP * STEP
    for member in range(0, group):
        head = shared * group + member
        first_row = (sample * heads + head) * queries
        q = (head_base(q_ptr, q_strides, sample, head), q_strides[2])
        dy = (head_base(dy_ptr, dy_strides, sample, head), dy_strides[2])
        mask = (head_base(mask_ptr, mask_strides, sample, head), mask_strides)
        places = column
        if DROPOUT:
            stream, first = keyed_stream(position_ptr, node_key, elements)
            places = keyed_place(stream, first + first_row * keys + column)
        for start in range(begin, queries, STEP):
            dk, dv = _take_queries(
                *(dk, dv, k, v, places, column, start, q, dy, peak_ptr + first_row),
                *(log_sum_ptr + first_row, delta_ptr + first_row, mask),
                *(queries, keys, threshold, drop_scale, scale),
                *(CAUSAL, DROPOUT, MASK, MASK_ROWS, PRECISION, HEAD, WIDTH, STEP),
            )
    dk_base = head_base(dk_ptr, dk_strides, sample, shared)
    store_head_rows(dk_base, column, dk_strides[2], keys, dk * (scale / _LOG2_E), HEAD, WIDTH)
    dv_base = head_base(dv_ptr, dv_strides, sample, shared)
    store_head_rows(dv_base, column, dv_strides[2], keys, dv, HEAD, WIDTH)
