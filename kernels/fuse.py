"""Rewrites the forward ATen graph of a stage to use this package's operators.

The patterns of `patterns` are looked for in phases, each of which walks the graph once: what wins most comes
first. The report names every node that a pattern could have started at, with what became of it.
"""

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .library import KERNEL_DTYPES
from .patterns.add_norm import add_norms
from .patterns.attention import attentions
from .patterns.dropout import dropouts
from .patterns.embedding import EMBEDDINGS
from .patterns.interaction import INTERACTIONS
from .patterns.join import JOINS
from .patterns.linear import linears
from .patterns.loss import LOSSES
from .patterns.match import Keyed, LeftAlone, Match, Pattern, known, mapped, nodes_of
from .patterns.norm import NORMS
from .patterns.storage import storage, written
from .patterns.sum import SUMS


@dataclass(frozen=True, slots=True)
class Fused:
    """The nodes that one operator replaced, by their names in the graph given, and the user's module whose
    forward made the one that the pattern starts at ("" for the outermost, or if the graph does not say)."""

    operator: str
    nodes: tuple[str, ...]
    module: str = ""


@dataclass(frozen=True, slots=True)
class Left:
    """A node that could have been part of a pattern and was left as it is."""

    node: str
    target: str
    reason: str
    module: str = ""


@dataclass(frozen=True, slots=True)
class FuseReport:
    """What was fused and what was left, in the order of the graph."""

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        nodes = sum(len(item.nodes) for item in self.fused)
        lines = [f"fused {nodes} nodes to {len(self.fused)}, left {len(self.left)}"]
        lines += [f"  {i.operator} <- {' + '.join(i.nodes)}{_inside(i.module)}" for i in self.fused]
        lines += [f"  left {i.node} ({i.target}){_inside(i.module)}: {i.reason}" for i in self.left]
        return "\n".join(lines)


def _inside(module: str) -> str:
    return module and f" in {module}"


def _name(node: fx.Node) -> str:
    """An operator's name with its overload, a function's own."""
    plain = isinstance(node.target, str | torch._ops.OpOverload)
    return str(node.target) if plain else str(getattr(node.target, "__name__", node.target))


def _module_of(node: fx.Node) -> str:
    """The path of the user's innermost module that made the node, as exported graphs note it."""
    stack = node.meta.get("nn_module_stack") or {}
    path, _ = next(reversed(stack.values()), ("", None))
    return str(path).removeprefix("L['self']").lstrip(".")


def phases(keyed: Keyed | None, attention: bool) -> tuple[Mapping[Any, Pattern], ...]:
    """The patterns by the targets of the nodes they start at."""
    return (
        attentions(keyed, plain=attention),
        EMBEDDINGS,
        INTERACTIONS,
        LOSSES,
        add_norms(keyed),
        NORMS,
        JOINS,
        linears(keyed),
        SUMS,
        {} if keyed is None else dropouts(keyed),
    )


def fuse(
    graph_module: fx.GraphModule, keyed: Keyed | None = None, *, attention: bool = False
) -> tuple[fx.GraphModule, FuseReport]:
    """A copy of the graph with patterns replaced (parameters are shared, not copied), and what was done.

    Calls must carry `meta["val"]`, as exported and traced ones do; one without is left alone. Sub-graphs of
    higher-order operators are not entered, their nodes are listed as left. `keyed` names the nodes that drop
    elements, if any do; `attention` takes attention without dropout too, which torch's operator keeps
    otherwise.
    """
    result = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    result.meta.update(graph_module.meta)
    fused: list[Fused] = []
    left: list[Left] = []
    patterns = phases(keyed, attention)
    for phase in patterns:
        gone: set[fx.Node] = set()
        for node in list(result.graph.nodes):
            if node in gone or node.op != "call_function" or node.target not in phase:
                continue
            try:
                match = phase[node.target](node)
                if match is not None:
                    fused.append(_replace(result, _checked(match), _module_of(node)))
                    gone.update(match.nodes)
            except LeftAlone as error:
                left.append(Left(node.name, _name(node), str(error), _module_of(node)))
    targets = {target for phase in patterns for target in phase}
    for path, module in graph_module.named_modules():
        if path and isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and node.target in targets:
                    reason = f"it is inside the sub-graph {path}"
                    left.append(Left(f"{path}.{node.name}", _name(node), reason, _module_of(node)))
    result.graph.lint()
    result.recompile()
    taken = {name for item in fused for name in item.nodes}
    reasons = {item.node: item for item in left if item.node not in taken}  # the last pattern's, if several
    place = {node.name: index for index, node in enumerate(graph_module.graph.nodes)}
    fused.sort(key=lambda item: place.get(item.nodes[0], len(place)))
    left = sorted(reasons.values(), key=lambda item: place.get(item.node, len(place)))
    return result, FuseReport(tuple(fused), tuple(left))


def _checked(match: Match) -> Match:
    """The match; raise LeftAlone with the reason for which its operator would refuse the arguments.

    The values of its results must be known. Arguments whose values are not (placeholders often have none)
    are taken to fit, since ATen took them.
    """
    for result in match.results:
        made = result.meta.get("val")
        if not isinstance(made, Tensor):
            raise LeftAlone("its shape and dtype are not known")
        if made.dtype not in KERNEL_DTYPES:
            raise LeftAlone(f"its dtype is {made.dtype}, the kernels compute in float32")
    for node in match.nodes:
        made_by_call = node in match.results or node in match.copies
        if not made_by_call and not set(node.users) <= set(match.nodes):
            raise LeftAlone(f"{node.name} is read by others too")
    if all(known(node) is not None for node in nodes_of(match.arguments)):
        try:
            match.check(*mapped(match.arguments, known, lambda target, *values: target(*values)))
        except (TypeError, ValueError) as error:
            raise LeftAlone(str(error)) from None
    return match


def _replace(module: fx.GraphModule, match: Match, inside: str) -> Fused:
    """Put one call behind its last argument; LeftAlone if somebody reads a result before that."""
    graph = module.graph
    place = {node: index for index, node in enumerate(graph.nodes)}
    given = [node.next for node in nodes_of(match.arguments)]
    start = max((match.nodes[0], *given), key=place.__getitem__)
    for result in (*match.results, *match.copies):
        for reader in result.users:
            if reader not in match.nodes and place[reader] < place[start]:
                raise LeftAlone(f"{reader.name} reads {result.name} before all arguments are there")
    last = max(start, match.nodes[-1], key=place.__getitem__)
    read = {storage(used) for node in match.nodes for used in node.all_input_nodes}
    for node in list(graph.nodes)[place[match.nodes[0]] : place[last]]:
        if node not in match.nodes and written(node) & read:
            raise LeftAlone(f"{node.name} overwrites what it reads before all of it is read")
    with graph.inserting_before(start):
        call = graph.call_function(
            match.operator, mapped(match.arguments, lambda n: n, partial(_call, graph))
        )
        call.meta.update(match.results[-1].meta)
        made = [call]
        several = match.stacked or len(match.results) > 1
        if several:
            values = tuple(result.meta["val"] for result in match.results)
            call.meta["val"] = torch.stack(values) if match.stacked else values
            if match.stacked:
                call = graph.call_function(torch.ops.aten.unbind.int, (call,))
                call.meta.update(match.results[-1].meta, val=list(values))
            made = [graph.call_function(operator.getitem, (call, i)) for i in range(len(match.results))]
    for old, new in zip(match.results, made, strict=True):
        if several:
            new.meta.update(old.meta)
        old.replace_all_uses_with(new)
    for copied in match.copies:
        copied.replace_all_uses_with(made[0])
    for node in reversed(match.nodes):
        graph.erase_node(node)
    for node in made:
        if node is not call and not node.users:
            graph.erase_node(node)
    return Fused(str(match.operator), tuple(node.name for node in match.nodes), inside)


def _call(graph: fx.Graph, target: torch._ops.OpOverload, *arguments: Any) -> fx.Node:
    """A call that makes an argument, with its value where those of its own arguments are known."""
    node = graph.call_function(target, arguments)
    if all(known(used) is not None for used in node.all_input_nodes):
        node.meta["val"] = target(*fx.map_arg(arguments, known))
    return node
