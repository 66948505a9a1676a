"""Dropout by keyed bits, where no other pattern took it.

dropout(x, keyed bits, p) -> gpp_kernels.dropout
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from torch import fx

from ..dropout import check_forward, dropout
from .match import Keyed, LeftAlone, Match, Pattern, made


def keyed_arguments(node: fx.Node) -> tuple[fx.Node, int, int]:
    """(position, key, elements of one sample) of a node that makes keyed bits.

    Raises LeftAlone where the counter of an element is not the first sample times the elements of a sample
    plus its place.
    """
    position, key, shape, dim, per_sample = cast("tuple[fx.Node, int, list[Any], int, int]", node.args)
    if dim == -1:
        return position, key, 0
    if dim != 0:
        raise LeftAlone(f"the samples are its dimension {dim}, the operator counts them in dimension 0")
    elements = per_sample
    for size in shape[1:]:
        if not isinstance(size, int):
            raise LeftAlone(f"its shape {shape} has more than one size that is not known")
        elements *= size
    return position, key, elements


def dropout_arguments(keyed: Keyed, node: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[Any, ...]]:
    """The nodes of a dropout by keyed bits, and (position, key, elements of one sample, p); may raise
    LeftAlone."""
    x, bits, p = node.args
    assert isinstance(x, fx.Node) and isinstance(bits, fx.Node)
    if bits.target is not keyed.bits:
        raise LeftAlone(f"its bits are made by {bits.name}")
    if made(bits).shape != made(x).shape:
        raise LeftAlone(f"its bits have shape {tuple(made(bits).shape)}, not that of what it drops")
    nodes = (bits, node) if len(bits.users) == 1 else (node,)
    return nodes, (*keyed_arguments(bits), p)


def _dropout(keyed: Keyed, node: fx.Node) -> Match:
    nodes, taken = dropout_arguments(keyed, node)
    return Match(nodes, dropout, (node.args[0], *taken), check_forward, (node,))


def dropouts(keyed: Keyed) -> Mapping[Any, Pattern]:
    """The pattern of a graph with these targets."""
    return {keyed.dropout: partial(_dropout, keyed)}
