"""Blocks that torch.export keeps as graphs of their own (`no_grad`, autocast) made part of the whole one.

A no_grad block reads detached values. A call of an autocast block switches autocast on for itself, so that
the block can be cut between its calls.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from gpp.program.autocast import under_autocast

_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"
# in a node's meta: (device, dtype) of the autocast block that it came from, or _OFF where it is switched off
_SETTING = "gpp_autocast"
_OFF = "off"


def inline_blocks(module: fx.GraphModule, learnable: set[str]) -> None:
    """Inline every block, nested ones too; `learnable` are the placeholders that may need a gradient."""
    while True:
        node = next((n for n in module.graph.nodes if _name(n) in (_GRAD, _AUTOCAST)), None)
        if node is None:
            return
        _inline(module, node, learnable)


def wrap_autocast(graph: fx.Graph) -> None:
    """Let every call that came from an autocast block run under it. In place; views and updates stay."""
    for node in list(graph.nodes):
        setting = node.meta.get(_SETTING)
        target = node.target
        if setting in (None, _OFF) or not isinstance(target, torch._ops.OpOverload):
            continue
        if target.namespace != "aten":
            continue
        if target.is_view or target._schema.is_mutable or not isinstance(node.meta.get("val"), Tensor):
            continue
        node.args = (*setting, target, *node.args)
        node.target = under_autocast


def in_own_autocast(node: fx.Node) -> bool:
    """Whether the model itself says how this call is to run, with autocast or without."""
    return node.meta.get(_SETTING) is not None


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _inline(module: fx.GraphModule, node: fx.Node, learnable: set[str]) -> None:
    setting = node.meta.get(_SETTING)
    detach = False
    if _name(node) == _GRAD:
        enabled, sub, *args = node.args
        detach = not enabled
    else:
        device, dtype, enabled, _, sub, *args = node.args
        setting = (device, dtype) if enabled else _OFF
    assert isinstance(sub, fx.Node)
    inner = getattr(module, str(sub.target))
    graph = module.graph
    mapping: dict[fx.Node, Any] = {}
    returned: Any = None
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(node):
        for placeholder, value in zip(placeholders, args, strict=True):
            mapping[placeholder] = _detached(graph, value, learnable) if detach else value
        for n in inner.graph.nodes:
            if n.op == "output":
                returned = fx.node.map_arg(n.args[0], mapping.__getitem__)
            elif n.op == "get_attr":
                name = f"{sub.target}_{n.target}".replace(".", "_")
                setattr(module, name, getattr(inner, n.target))
                mapping[n] = graph.get_attr(name)
            elif n.op != "placeholder":
                mapping[n] = graph.node_copy(n, mapping.__getitem__)
                mapping[n].meta = {k: v for k, v in n.meta.items() if k != _SETTING}
                if setting is not None:
                    mapping[n].meta[_SETTING] = setting
    if isinstance(returned, tuple | list):
        for user in list(node.users):
            assert user.target is operator.getitem, user
            user.replace_all_uses_with(returned[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(returned)
    graph.erase_node(node)
    if not sub.users:
        graph.erase_node(sub)


def _detached(graph: fx.Graph, value: Any, learnable: set[str]) -> Any:
    """The value without its history; what never has one stays itself, so that updates of it are seen."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    if value.op != "call_function" and value.name not in learnable:
        return value
    if not (value.meta["val"].is_floating_point() or value.meta["val"].is_complex()):
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta.update({k: v for k, v in value.meta.items() if k in ("val", "nn_module_stack")})
    return node
