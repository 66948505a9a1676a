"""Rewrites a half of a stage's backward: where the gradient of a layer's input is made only to be multiplied
by the derivative of the activation before it, the product itself stores what that gives.

    linear_backward_activation(dz weight, saved)  ->  gpp_kernels.linear_backward_input_activation

The two belong to two layers, so neither's autograd formula can say it; this comes after the joint trace. The
product may be torch's, and seen in other shapes in between. In half precision the result is rounded once
instead of twice.
"""

from typing import Any

import torch
from torch import Tensor, fx

from .linear_gradient import (
    linear_backward_activation,
    linear_backward_input,
    linear_backward_input_activation,
)

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, linear_backward_input)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def differentiate_in_products(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite the graph in place. What is seen in other shapes must carry `meta["val"]`."""
    for node in list(module.graph.nodes):
        if node.target is linear_backward_activation and not node.kwargs:
            _rewrite(module.graph, node)
    module.graph.lint()
    module.recompile()
    return module


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    chain = [node]
    made: Any = node.args[0]
    while isinstance(made, fx.Node) and len(made.users) == 1 and made.target in _VIEWS:
        chain.append(made)
        made = made.args[0]
    if not isinstance(made, fx.Node) or len(made.users) > 1 or made.target not in _PRODUCTS:
        return
    if len(chain) > 1 and _width(made) != _width(node):
        return  # its rows are other rows
    with graph.inserting_before(node):
        call = graph.call_function(linear_backward_input_activation, (*made.args, *node.args[1:]))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    for old in (*chain, made):
        graph.erase_node(old)


def _width(node: fx.Node) -> Any:
    """The size of the last dimension, different for every node whose shape is not known."""
    value = node.meta.get("val")
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() else node
