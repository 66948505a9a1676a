"""Normalisations of a residual sum.

[dropout(x, keyed bits, p) ->] add(residual, x) -> layer_norm or rms_norm [-> cast]    -> gpp_kernels.add_norm

The addends stand in either order. The sum may be read by others, as where the norm comes first in a block; a
cast to 16 bits is taken where it alone reads the norm, as under autocast, or several alike casts do, which
become one: their gradients are then added in that type, which rounds them once more. Additions in place are
left to torch: those that nobody else sees are functional in a captured graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from ..add_norm import add_norm, check_forward
from .dropout import keyed_arguments
from .match import Keyed, LeftAlone, Match, Pattern, arguments, in_order, made, same
from .norm import norm_arguments
from .storage import storage, written

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)
_NARROW = (torch.bfloat16, torch.float16)


def _add_norm(keyed: Keyed | None, node: fx.Node) -> Match | None:
    norm = norm_arguments(node)
    total = norm.input
    if total.target is not aten.add.Tensor:
        return None
    first, second = _addends(total)
    x, residual = second, first
    dropped: tuple[Any, ...] = (None, 0, 0, 0.0)
    nodes: tuple[fx.Node, ...] = (total, node)
    for addend, other in ((second, first), (first, second)) if first is not second else ():
        found = _dropout(keyed, addend, total)
        if found is not None:
            x, residual, dropped = found.x, other, found.arguments
            nodes = (*found.nodes, *nodes)
            break
    casts = _casts(node)
    result, *copies = casts or (node,)
    taken = (x, residual, norm.weight, norm.bias, norm.eps, norm.centred, made(result).dtype, *dropped)
    return Match((*nodes, *casts), add_norm, taken, check_forward, (result, total), copies=tuple(copies))


def _addends(total: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Two tensors of the sum's shape; LeftAlone for other additions."""
    given = arguments(total)
    first, second = given["self"], given["other"]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or given["alpha"] != 1:
        raise LeftAlone(f"{total.name} adds a number or a multiple")
    if not all(same(made(addend).shape, made(total).shape) for addend in (first, second)):
        raise LeftAlone(f"{total.name} stretches what it adds")
    return first, second


@dataclass(frozen=True, slots=True)
class _Dropout:
    """The dropout of an addend: what is dropped, the operator's arguments for it, and its nodes."""

    x: fx.Node
    arguments: tuple[Any, ...]
    nodes: tuple[fx.Node, ...]


def _dropout(keyed: Keyed | None, addend: fx.Node, total: fx.Node) -> _Dropout | None:
    """The dropout that makes the addend, if it is for this sum alone and has the operator's bits."""
    if keyed is None or addend.target is not keyed.dropout or list(addend.users) != [total]:
        return None
    x, bits, p = addend.args
    assert isinstance(x, fx.Node) and isinstance(bits, fx.Node)
    if bits.target is not keyed.bits or not same(made(bits).shape, made(x).shape):
        return None
    try:
        key = keyed_arguments(bits)
    except LeftAlone:
        return None  # dropped apart, by whoever can
    return _Dropout(x, (*key, p), (bits, addend) if len(bits.users) == 1 else (addend,))


def _casts(node: fx.Node) -> tuple[fx.Node, ...]:
    """The casts to one type of 16 bits that alone read the node; none if others do, or write to several."""
    readers = in_order(node.users) if node.users and made(node).dtype not in _NARROW else ()
    dtypes = set()
    for reader in readers:
        given = arguments(reader) if reader.target in _CASTS else {}
        plain = not any(value for key, value in given.items() if key not in ("self", "dtype"))
        dtypes.add(given.get("dtype") if plain else None)
    alone = len(dtypes) == 1 and dtypes <= set(_NARROW)
    if not alone or len(readers) == 1:
        return readers if alone else ()
    storages = {storage(reader) for reader in readers}
    return () if any(written(other) & storages for other in node.graph.nodes) else readers


def add_norms(keyed: Keyed | None) -> Mapping[Any, Pattern]:
    """The patterns of a graph whose keyed nodes have these targets."""
    pattern = partial(_add_norm, keyed)
    return {aten.layer_norm.default: pattern, aten.rms_norm.default: pattern}
