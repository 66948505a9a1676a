"""Attention and its gradients in ATen, with all weights written out: what CPU tensors take.

Scores and the statistics of rows are those of the kernels, in base 2.
"""

from typing import Any

import torch
from torch import Tensor

from .attention_layout import score_scale, shaped_like
from .attention_tiles import LOG2_E, LOWEST
from .keyed import reference_factor
from .rows import statistics_dtype


def reference_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """t [samples, heads, queries, keys], float32 or float64."""
    wide = statistics_dtype(query)
    factor = score_scale(scale, query.shape[-1]) * LOG2_E
    t = (query.to(wide) * factor) @ _of_all_heads(key, query).to(wide).transpose(-2, -1)
    if causal:
        after = torch.ones(t.shape[-2:], dtype=torch.bool, device=t.device).triu(1)
        t = t.masked_fill(after, float("-inf"))
    if mask is None:
        return t
    if mask.dtype == torch.bool:
        return t.masked_fill(mask.logical_not(), float("-inf"))
    added = mask.to(wide) * LOG2_E
    lost = added.isneginf() & mask.isneginf().logical_not()
    return t + added.masked_fill(lost, LOWEST * torch.finfo(wide).min)


def reference_forward(
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
    """(y, peak, log_sum)."""
    t = reference_scores(query, key, mask, causal, scale)
    if key.shape[2] == 0:
        peak, total = (t.new_zeros(t.shape[:-1]) for _ in range(2))
    else:
        best = t.amax(-1)
        peak = best.masked_fill(best.isneginf(), 0.0)
        total = torch.exp2(t - peak[..., None]).sum(-1)
    log_sum = total.log2().masked_fill(total == 0.0, float("inf"))
    weights = torch.exp2(t - peak[..., None] - log_sum[..., None])
    dropped = _dropped(weights, position, node_key, elements, p)
    y = shaped_like(query)
    y.copy_(dropped @ _of_all_heads(value, query).to(t.dtype))
    return y, peak, log_sum


def reference_delta(dy: Tensor, y: Tensor) -> Tensor:
    """The sums over the head of dy * y."""
    wide = statistics_dtype(y)
    return (dy.to(wide) * y.to(wide)).sum(-1).contiguous()


def reference_backward_scores(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    node_key: int,
    elements: int,
    p: float,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(dropped weights, gradients of the scores in base e before their scale)."""
    t = reference_scores(query, key, mask, causal, scale)
    weights = torch.exp2(t - peak[..., None] - log_sum[..., None])
    dweights = dy.to(t.dtype) @ _of_all_heads(value, query).to(t.dtype).transpose(-2, -1)
    dweights = _dropped(dweights, position, node_key, elements, p)
    dropped = _dropped(weights, position, node_key, elements, p)
    return dropped, weights * (dweights - delta[..., None])


def reference_backward_query(dy: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    """dquery."""
    _, dscores = reference_backward_scores(dy, query, key, *rest)
    dquery = shaped_like(query)
    dquery.copy_(dscores @ _of_all_heads(key, query).to(dscores.dtype) * _scale(query, rest))
    return dquery


def reference_backward_key_value(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(dkey, dvalue)."""
    dropped, dscores = reference_backward_scores(dy, query, key, value, *rest)
    wide = dropped.dtype
    dkey, dvalue = shaped_like(key), shaped_like(value)
    dkey.copy_(_per_head(dscores.transpose(-2, -1) @ query.to(wide), key) * _scale(query, rest))
    dvalue.copy_(_per_head(dropped.transpose(-2, -1) @ dy.to(wide), value))
    return dkey, dvalue


def reference_backward_mask(*arguments: Any) -> Tensor:
    """dmask, summed to the mask's shape."""
    mask: Tensor = arguments[7]
    _, dscores = reference_backward_scores(*arguments)
    return dscores.sum_to_size(mask.shape).to(mask.dtype).contiguous()


def _scale(query: Tensor, rest: tuple[Any, ...]) -> float:
    return score_scale(rest[-1], query.shape[-1])


def _of_all_heads(shared: Tensor, query: Tensor) -> Tensor:
    """Keys or values, once for every head of the queries."""
    heads = query.shape[1]
    return shared if shared.shape[1] == heads else shared.repeat_interleave(heads // shared.shape[1], 1)


def _per_head(gradient: Tensor, shared: Tensor) -> Tensor:
    """Gradients of keys or values, summed over the heads that share them."""
    samples, heads, rows, head = shared.shape
    if gradient.shape[1] == heads:
        return gradient
    return gradient.reshape(samples, heads, gradient.shape[1] // heads, rows, head).sum(2)


def _dropped(weights: Tensor, position: Tensor | None, node_key: int, elements: int, p: float) -> Tensor:
    if position is None or p == 0.0:
        return weights
    return weights * reference_factor(weights, position, node_key, elements, p)
