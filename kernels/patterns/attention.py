"""Attention.

attention with keyed dropout on its weights           -> gpp_kernels.attention
scaled_dot_product_attention, where it is asked for   -> gpp_kernels.attention

With dropout the graph would write all weights out. Without, torch has kernels of its own, and there is
nothing to key: those are left to it unless the user wants these.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from ..attention import attention
from ..attention_tiles import check_attention
from .dropout import keyed_arguments
from .match import Keyed, LeftAlone, Match, Pattern, arguments, made

aten = torch.ops.aten
_check = partial(check_attention, "attention")


def _keyed(keyed: Keyed, node: fx.Node) -> Match:
    query, key, value, bits, mask, p, causal, scale, gqa = cast("tuple[Any, ...]", node.args)
    if bits.target is not keyed.bits:
        raise LeftAlone(f"its bits are made by {bits.name}")
    heads, queries, keys = _sizes(query, key)
    drawn = bits.args[2]  # the value noted for the bits is that of the attention
    if len(drawn) != 4 or tuple(drawn[1:]) != (heads, queries, keys):
        raise LeftAlone(f"its bits have shape {tuple(drawn)}, not that of its weights")
    _shared_heads(query, key, gqa)
    taken = (query, key, value, mask, *keyed_arguments(bits), p, causal, scale)
    nodes = (bits, node) if len(bits.users) == 1 else (node,)
    return Match(nodes, attention, taken, _check, (node,))


def _without_dropout(node: fx.Node) -> Match:
    given = arguments(node)
    if given["dropout_p"] > 0.0:
        raise LeftAlone("it draws random numbers of its own, the operator only keyed ones")
    query, key, value = given["query"], given["key"], given["value"]
    _sizes(query, key)
    _shared_heads(query, key, given["enable_gqa"])
    numbers = (None, 0, 0, 0.0, given["is_causal"], given["scale"])
    return Match((node,), attention, (query, key, value, given["attn_mask"], *numbers), _check, (node,))


def _left_to_torch(node: fx.Node) -> Match:
    raise LeftAlone("torch's SDPA has no dropout to key here; kernels.attention=triton takes it")


def _sizes(query: fx.Node, key: fx.Node) -> tuple[Any, Any, Any]:
    """(heads, queries, keys)."""
    for name, node in (("query", query), ("key", key)):
        if made(node).dim() != 4:
            shape = tuple(made(node).shape)
            raise LeftAlone(f"its {name} has shape {shape}, the operator takes four dimensions")
    return made(query).shape[1], made(query).shape[2], made(key).shape[2]


def _shared_heads(query: fx.Node, key: fx.Node, grouped: bool) -> None:
    """Without grouping, torch stretches one head to all and no other number."""
    heads, shared = made(query).shape[1], made(key).shape[1]
    if not grouped and shared not in (1, heads):
        raise LeftAlone(f"{heads} heads of queries meet {shared} of keys, and it does not group them")


def attentions(keyed: Keyed | None, *, plain: bool) -> Mapping[Any, Pattern]:
    """The patterns of a graph with these targets; `plain` takes attention without dropout too."""
    start = aten.scaled_dot_product_attention.default
    patterns: dict[Any, Pattern] = {start: _without_dropout if plain else _left_to_torch}
    if keyed is not None:
        patterns[keyed.attention] = partial(_keyed, keyed)
    return patterns
