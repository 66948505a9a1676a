"""Rewrites the forward ATen graph of a stage to use this package's operators.

Each pattern of `patterns` is looked for by walking the graph once. The report names every node that a pattern
could have started at, with what became of it.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .library import KERNEL_DTYPES
from .patterns import PATTERNS, LeftAlone, Match


@dataclass(frozen=True, slots=True)
class Fused:
    """The nodes that one operator replaced, by their names in the graph given."""

    operator: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Left:
    """A node that could have been part of a pattern and was left as it is."""

    node: str
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class FuseReport:
    """What was fused and what was left, in the order of the graph."""

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        nodes = sum(len(item.nodes) for item in self.fused)
        lines = [f"fused {nodes} nodes to {len(self.fused)}, left {len(self.left)}"]
        lines += [f"  {item.operator} <- {' + '.join(item.nodes)}" for item in self.fused]
        lines += [f"  left {item.node} ({item.target}): {item.reason}" for item in self.left]
        return "\n".join(lines)


def fuse(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, FuseReport]:
    """A copy of the graph with patterns replaced (parameters are shared, not copied), and what was done.

    Calls must carry `meta["val"]`, as exported and traced ones do; one without is left alone. Sub-graphs of
    higher-order operators are not entered, their nodes are listed as left.
    """
    result = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    result.meta.update(graph_module.meta)
    fused: list[Fused] = []
    left: list[Left] = []
    for node in list(result.graph.nodes):
        pattern = PATTERNS.get(node.target) if node.op == "call_function" else None
        if pattern is None:
            continue
        try:
            fused.append(_replace(result, _checked(result, pattern(node))))
        except LeftAlone as error:
            left.append(Left(node.name, str(node.target), str(error)))
    for path, module in graph_module.named_modules():
        if path and isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and node.target in PATTERNS:
                    reason = f"it is inside the sub-graph {path}"
                    left.append(Left(f"{path}.{node.name}", str(node.target), reason))
    result.graph.lint()
    result.recompile()
    return result, FuseReport(tuple(fused), tuple(left))


def _checked(module: fx.GraphModule, match: Match) -> Match:
    """The match; raise LeftAlone with the reason for which its operator would refuse the arguments.

    The first node's own value must be known. Arguments whose values are not (placeholders often have none)
    are taken to fit, since ATen took them.
    """
    made = match.nodes[0].meta.get("val")
    if not isinstance(made, Tensor):
        raise LeftAlone("its shape and dtype are not known")
    if made.dtype not in KERNEL_DTYPES:
        raise LeftAlone(f"its dtype is {made.dtype}, the kernels compute in float32")
    values = [_value(module, a) if isinstance(a, fx.Node) else a for a in match.arguments]
    if not any(value is _UNKNOWN for value in values):
        try:
            match.check(*values)
        except (TypeError, ValueError) as error:
            raise LeftAlone(str(error)) from None
    return match


_UNKNOWN = object()


def _value(module: fx.GraphModule, node: fx.Node) -> Any:
    """The example value of a node; of an attribute the attribute itself if it has no other."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else _UNKNOWN


def _replace(module: fx.GraphModule, match: Match) -> Fused:
    """Put one call where the chain starts."""
    first, last = match.nodes[0], match.nodes[-1]
    with module.graph.inserting_before(first):
        call = module.graph.call_function(match.operator, match.arguments)
    call.meta.update(last.meta)
    last.replace_all_uses_with(call)
    for node in reversed(match.nodes):
        module.graph.erase_node(node)
    return Fused(str(match.operator), tuple(node.name for node in match.nodes))
