"""Normalisations of a residual sum.

[dropout(x, keyed bits, p) ->] add(residual, x) -> layer_norm or rms_norm [-> cast]    -> gpp_kernels.add_norm

The addends stand in either order. The sum may be read by others, as where the norm comes first in a block; a
cast to 16 bits is taken where it alone reads the norm, as under autocast. Additions in place are left to
torch: those that nobody else sees are functional in a captured graph.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from ..add_norm import add_norm, check_forward
from .dropout import keyed_arguments
from .match import Keyed, LeftAlone, Match, Pattern, arguments, made, same
from .norm import norm_arguments

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)
_NARROW = (torch.bfloat16, torch.float16)


def _add_norm(keyed: Keyed | None, node: fx.Node) -> Match | None:
    norm = norm_arguments(node)
    total = norm.input
    if total.target is not aten.add.Tensor:
        return None
    first, second = _addends(total)
    if first is second:
        keyed = None  # dropping one of them would drop both
    if _is_dropped(keyed, first, total) and not _is_dropped(keyed, second, total):
        first, second = second, first
    dropped: tuple[Any, ...] = (None, 0, 0, 0.0)
    nodes: tuple[fx.Node, ...] = (total, node)
    if _is_dropped(keyed, second, total):
        x, bits, p = second.args
        assert isinstance(x, fx.Node) and isinstance(bits, fx.Node)
        if keyed is not None and bits.target is keyed.bits and same(made(bits).shape, made(x).shape):
            dropped = (*keyed_arguments(bits), p)
            nodes = (*((bits,) if len(bits.users) == 1 else ()), second, *nodes)
            second = x
    last = _narrowed(node)
    if last is not node:
        nodes = (*nodes, last)
    taken = (second, first, norm.weight, norm.bias, norm.eps, norm.centred, made(last).dtype, *dropped)
    return Match(nodes, add_norm, taken, check_forward, (last, total))


def _addends(total: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Two tensors of the sum's shape; LeftAlone for other additions."""
    given = arguments(total)
    first, second = given["self"], given["other"]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or given["alpha"] != 1:
        raise LeftAlone(f"{total.name} adds a number or a multiple")
    if not all(same(made(addend).shape, made(total).shape) for addend in (first, second)):
        raise LeftAlone(f"{total.name} stretches what it adds")
    return first, second


def _is_dropped(keyed: Keyed | None, addend: fx.Node, total: fx.Node) -> bool:
    """Whether dropout makes the addend, for this sum alone."""
    return keyed is not None and addend.target is keyed.dropout and list(addend.users) == [total]


def _narrowed(node: fx.Node) -> fx.Node:
    """The cast to 16 bits that alone reads the node, else the node."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].target not in _CASTS or made(node).dtype in _NARROW:
        return node
    given = {key: value for key, value in arguments(readers[0]).items() if key != "self"}
    plain = not any(value for key, value in given.items() if key != "dtype")
    return readers[0] if plain and given["dtype"] in _NARROW else node


def add_norms(keyed: Keyed | None) -> Mapping[Any, Pattern]:
    """The patterns of a graph whose keyed nodes have these targets."""
    pattern = partial(_add_norm, keyed)
    return {aten.layer_norm.default: pattern, aten.rms_norm.default: pattern}
