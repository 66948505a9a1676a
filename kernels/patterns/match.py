"""What a pattern finds: nodes, and the call that can take their place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

Pattern = Callable[[fx.Node], "Match"]  # raises LeftAlone


class LeftAlone(Exception):
    """Why a node does not fit its pattern."""


@dataclass(frozen=True, slots=True)
class Match:
    """Nodes in the order of the graph and the call that can replace them.

    `results` are the nodes whose values the call makes, in the order of its results; the others are read by
    nobody outside. `check` raises TypeError or ValueError for arguments that the operator refuses.
    """

    nodes: tuple[fx.Node, ...]
    operator: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    check: Callable[..., None]
    results: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class Keyed:
    """The targets of nodes that drop elements by keyed bits, as whoever made the graph calls them.

    `bits(position, key, shape, dim, per_sample)` makes what `dropout(x, bits, p)` and
    `attention(query, key, value, bits, mask, p, causal, scale, gqa)` read; the bits are those of
    `kernels.keyed`.
    """

    bits: Any
    dropout: Any
    attention: Any


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an ATen operator by name, with the schema's defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def no_weights(given: Mapping[str, Any], *names: str) -> None:
    """Raise LeftAlone if one of these arguments is given."""
    for name in names:
        if given.get(name) is not None:
            raise LeftAlone(f"it has a {name}, the operator none")


def made(node: fx.Node) -> Tensor:
    """The example value of what a node makes; LeftAlone if there is none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise LeftAlone(f"the shape and dtype of {node.name} are not known")
    return value
