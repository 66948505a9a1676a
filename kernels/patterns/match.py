"""What a pattern finds: nodes, and the call that can take their place."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)

Pattern = Callable[[fx.Node], "Match | None"]  # None: nothing of the kind starts here; raises LeftAlone


class LeftAlone(Exception):
    """Why a node does not fit its pattern."""


@dataclass(frozen=True, slots=True)
class Call:
    """An argument of a match that a call of its own makes, in front of the operator's."""

    target: torch._ops.OpOverload
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """Nodes in the order of the graph and the call that can replace them.

    `results` are the nodes whose values the call makes, in the order of its results; the others are read by
    nobody outside. `copies` are nodes that have the value of the first result too. A `stacked` call makes
    one tensor, which has its results in its dimension 0. `arguments` are nodes, calls, constants and lists of
    these. `check` raises TypeError or ValueError for arguments that the operator refuses.
    """

    nodes: tuple[fx.Node, ...]
    operator: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    check: Callable[..., None]
    results: tuple[fx.Node, ...]
    stacked: bool = False
    copies: tuple[fx.Node, ...] = ()


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


def mapped(item: Any, of_node: Callable[[fx.Node], Any], of_call: Callable[..., Any]) -> Any:
    """The arguments of a match with its nodes replaced, and its calls by `of_call(target, *arguments)`."""
    if isinstance(item, fx.Node):
        return of_node(item)
    if isinstance(item, Call):
        return of_call(item.target, *mapped(item.arguments, of_node, of_call))
    if isinstance(item, list | tuple):
        return type(item)(mapped(part, of_node, of_call) for part in item)
    return item


def nodes_of(arguments: Any) -> list[fx.Node]:
    """The nodes among the arguments of a match."""
    found: list[fx.Node] = []
    mapped(arguments, found.append, lambda *_: None)
    return found


def made(node: fx.Node) -> Tensor:
    """The example value of what a node makes; LeftAlone if there is none."""
    value = known(node)
    if value is None:
        raise LeftAlone(f"the shape and dtype of {node.name} are not known")
    return value


def known(node: fx.Node) -> Tensor | None:
    """The example value of a node; of an attribute the attribute itself if it has no other."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = attribute(node)
    return value if isinstance(value, Tensor) else None


def attribute(node: fx.Node) -> Any:
    """What a node of an attribute gives; None if there is no such."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def in_order(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Nodes of one graph in its order."""
    chosen = set(nodes)
    return tuple(node for node in next(iter(chosen)).graph.nodes if node in chosen)


def with_sources(nodes: Iterable[fx.Node], sources: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes, and those calls of `sources` that nobody else reads, in the order of the graph."""
    taken = set(nodes)
    for source in reversed(in_order({*taken, *sources})):
        if source.op == "call_function" and set(source.users) <= taken:
            taken.add(source)
    return in_order(taken)


def without_casts(node: fx.Node) -> fx.Node:
    """The value of which a node is a copy in another dtype."""
    while node.target in _CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, or two shapes, are equal whatever the number of samples."""
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(statically_known_true(a == b))
