"""Rewrites the forward ATen graph of a stage to use this package's operators.

Patterns, each found by walking the graph once:

    layer_norm over the last dimension                     -> gpp_kernels.layer_norm
    linear whose only reader is relu, gelu or silu         -> gpp_kernels.linear with that activation

A product without an activation stays with torch: its library's is faster and there is nothing to fuse. The
report names every layer norm and linear node, with what became of it.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .layer_norm import check_forward as check_layer_norm
from .layer_norm import layer_norm
from .library import KERNEL_DTYPES
from .linear import check_forward as check_linear
from .linear import linear

aten = torch.ops.aten


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


class _LeftAlone(Exception):
    """Why a node does not fit its pattern."""


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
        pattern = _PATTERNS.get(node.target) if node.op == "call_function" else None
        if pattern is None:
            continue
        try:
            fused.append(pattern(result, node))
        except _LeftAlone as error:
            left.append(Left(node.name, str(node.target), str(error)))
    for path, module in graph_module.named_modules():
        if path and isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and node.target in _PATTERNS:
                    reason = f"it is inside the sub-graph {path}"
                    left.append(Left(f"{path}.{node.name}", str(node.target), reason))
    result.graph.lint()
    result.recompile()
    return result, FuseReport(tuple(fused), tuple(left))


def _fuse_layer_norm(module: fx.GraphModule, node: fx.Node) -> Fused:
    given = _arguments(node)
    arguments = tuple(given[key] for key in ("input", "weight", "bias", "eps"))
    if len(given["normalized_shape"]) != 1:
        raise _LeftAlone(f"it normalises {len(given['normalized_shape'])} dimensions, the operator one")
    _check(module, node, check_layer_norm, arguments)
    return _replace(module, (node,), layer_norm, arguments)


def _fuse_linear(module: fx.GraphModule, node: fx.Node) -> Fused:
    given = _arguments(node)
    readers = list(node.users)
    if len(readers) != 1:
        raise _LeftAlone(f"{len(readers)} nodes read its output, an activation must be the only one")
    activation = _activation(readers[0])
    if activation is None:
        raise _LeftAlone(f"no activation follows but {readers[0].name}: a plain product stays with torch")
    arguments = (given["input"], given["weight"], given["bias"], activation)
    _check(module, node, check_linear, arguments)
    return _replace(module, (node, readers[0]), linear, arguments)


_PATTERNS: Mapping[Any, Callable[[fx.GraphModule, fx.Node], Fused]] = {
    aten.layer_norm.default: _fuse_layer_norm,
    aten.linear.default: _fuse_linear,
}


def _activation(node: fx.Node) -> str | None:
    """The operator's name for an activation; in-place ones count, nothing else reads what they overwrite."""
    if node.target in (aten.relu.default, aten.relu_.default):
        return "relu"
    if node.target in (aten.silu.default, aten.silu_.default):
        return "silu"
    if node.target in (aten.gelu.default, aten.gelu_.default):
        return "gelu_tanh" if _arguments(node)["approximate"] == "tanh" else "gelu_erf"
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, with the schema's defaults."""
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


def _check(
    module: fx.GraphModule, node: fx.Node, check: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Raise _LeftAlone with the reason for which the operator would refuse the arguments.

    The node's own value must be known. Arguments whose values are not (placeholders often have none) are
    taken to fit, since ATen took them.
    """
    made = node.meta.get("val")
    if not isinstance(made, Tensor):
        raise _LeftAlone("its shape and dtype are not known")
    if made.dtype not in KERNEL_DTYPES:
        raise _LeftAlone(f"its dtype is {made.dtype}, the kernels compute in float32")
    values = [_value(module, a) if isinstance(a, fx.Node) else a for a in arguments]
    if any(value is _UNKNOWN for value in values):
        return
    try:
        check(*values)
    except (TypeError, ValueError) as error:
        raise _LeftAlone(str(error)) from None


_UNKNOWN = object()


def _value(module: fx.GraphModule, node: fx.Node) -> Any:
    """The example value of a node; of an attribute the attribute itself if it has no other."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else _UNKNOWN


def _replace(
    module: fx.GraphModule,
    nodes: tuple[fx.Node, ...],
    operator: torch._ops.OpOverload,
    arguments: tuple[Any, ...],
) -> Fused:
    """Put one call where the chain `nodes` starts: only its first node reads from outside."""
    with module.graph.inserting_before(nodes[0]):
        call = module.graph.call_function(operator, arguments)
    call.meta.update(nodes[-1].meta)
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        module.graph.erase_node(node)
    return Fused(str(operator), tuple(node.name for node in nodes))
