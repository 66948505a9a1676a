"""Low precision in a captured graph: casts as nodes of their own, and calls that switch autocast on.

A model captured under autocast has its casts as `aten.to.dtype` calls, marked as such, so that they can be
taken out again and are seen by whoever counts bytes. Blocks of a model that run under the model's own
autocast keep it: each of their calls switches it on for itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_CAST = "gpp_cast"  # in a node's meta: it was put in by `insert_cast`, or switched to autocast by `switch_on`


@dataclass(frozen=True, slots=True)
class Autocast:
    """Whose autocast rules hold ("cpu", "cuda"), and its data type. The device need not be there."""

    device: str
    dtype: torch.dtype = torch.bfloat16


@contextmanager
def rules(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast's rules for tensors of `device`, which only fake tensors may have on this machine: unlike
    torch.autocast it does not ask whether there is such a device. No cast is cached."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype or before[1])
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.set_autocast_cache_enabled(cached)


def under_autocast(device: str, dtype: torch.dtype | None, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an ATen operator as it runs inside `torch.autocast(device, dtype)`."""
    with torch.autocast(device, dtype=dtype, cache_enabled=False):
        return target(*args, **kwargs)


def operator_called(node: fx.Node) -> Any:
    """What a call node calls in the end: a callable, mostly an ATen overload."""
    return node.args[2] if node.target is under_autocast else node.target


def insert_cast(node: fx.Node, used: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A cast of `used` before `node`, which is its only reader so far; `node` itself is left as it is."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(torch.ops.aten.to.dtype, (used, dtype))
    made.meta = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
    made.meta["val"] = used.meta["val"].to(dtype)
    made.meta[_CAST] = True
    return made


def switch_on(node: fx.Node, autocast: Autocast) -> None:
    """Let a call run under autocast."""
    target: Any = node.target
    node.args = (autocast.device, autocast.dtype, target, *node.args)
    node.target = under_autocast
    node.meta[_CAST] = True


def is_cast(node: fx.Node) -> bool:
    """Whether `insert_cast` made the node."""
    return bool(node.meta.get(_CAST)) and node.target is torch.ops.aten.to.dtype


def without_casts(module: fx.GraphModule) -> fx.GraphModule:
    """The graph in the precision that the module was written in. In place."""
    for node in list(module.graph.nodes):
        if is_cast(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
        elif node.meta.get(_CAST):
            node.target, node.args = node.args[2], node.args[3:]
    module.recompile()
    return module
