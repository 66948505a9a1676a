"""Linear layers with what follows them.

linear -> relu, gelu or silu, if it is there -> dropout by keyed bits -> addition -> gpp_kernels.linear

each step the only reader of the one before, and an activation or dropout among them: a product that nothing
or an addition alone follows stays with torch, whose library's is faster.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from ..linear import check_forward as check_linear
from ..linear import linear
from .dropout import dropout_arguments
from .match import Keyed, LeftAlone, Match, Pattern, arguments, made

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)


def _linear(keyed: Keyed | None, node: fx.Node) -> Match:
    given = arguments(node)
    readers = list(node.users)
    if len(readers) != 1:
        raise LeftAlone(f"{len(readers)} nodes read its output, an activation must be the only one")
    nodes, last = [node], node
    activation = activation_of(readers[0])
    if activation is not None:
        last = readers[0]
        nodes.append(last)
    drops, dropped = _dropout(keyed, last)
    nodes += dropped
    if activation is None and not dropped:
        raise LeftAlone(f"no activation follows but {readers[0].name}: a plain product stays with torch")
    residual, added = _addition(nodes[-1])
    nodes += added
    taken = (given["input"], given["weight"], given["bias"], activation or "none", residual, *drops)
    return Match(tuple(nodes), linear, taken, check_linear, (nodes[-1],))


def activation_of(node: fx.Node) -> str | None:
    """The operator's name for an activation; in-place ones count, nothing else reads what they overwrite."""
    if node.target in (aten.relu.default, aten.relu_.default):
        return "relu"
    if node.target in (aten.silu.default, aten.silu_.default):
        return "silu"
    if node.target in (aten.gelu.default, aten.gelu_.default):
        return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu_erf"
    return None


def _dropout(keyed: Keyed | None, value: fx.Node) -> tuple[tuple[Any, ...], list[fx.Node]]:
    """What the operator takes for the dropout that alone reads the value, and its nodes; nothing if there is
    none that fits."""
    reader = _reader(value)
    if keyed is None or reader is None or reader.target is not keyed.dropout or reader.args[0] is not value:
        return (), []
    try:
        nodes, taken = dropout_arguments(keyed, reader)
    except LeftAlone:
        return (), []
    return taken, list(nodes)


def _addition(value: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """What is added to a value that nobody else reads, and the addition; nothing if none fits: one in place
    must overwrite the value itself."""
    reader = _reader(value)
    if reader is None or reader.target not in ADDITIONS or len(reader.args) != 2 or reader.kwargs:
        return None, []
    others = [other for other in reader.args if other is not value]
    overwrites_other = reader.target is aten.add_.Tensor and reader.args[0] is not value
    if len(others) != 1 or not isinstance(others[0], fx.Node) or overwrites_other:
        return None, []
    try:
        mine, residual = made(value), made(others[0])
    except LeftAlone:
        return None, []
    alike = mine.shape == residual.shape and mine.dtype == residual.dtype
    return (others[0], [reader]) if alike else (None, [])


def _reader(value: fx.Node) -> fx.Node | None:
    return next(iter(value.users)) if len(value.users) == 1 else None


def linears(keyed: Keyed | None) -> Mapping[Any, Pattern]:
    """The pattern of a graph in which these targets, if any, drop elements."""
    return {aten.linear.default: partial(_linear, keyed)}
