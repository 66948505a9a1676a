"""Rewrites the weight half of a stage: a weight's gradient that is made only to be added to its sum over
micro-batches is added by the product itself.

    total.add_(dz^T x), through transposes and casts to float32    -> gpp_kernels.linear_accumulate_weight

Gradients of a weight that is used twice are added one after the other. The gradient is then never written: a
third of what the half moves. Its sum is rounded once instead of twice, so it agrees with the graph given, but
not to the bit. An autograd formula cannot write to a sum, so this comes after the joint trace.
"""

from typing import Any

import torch
from torch import Tensor, fx

from .linear import linear_accumulate_weight, linear_backward_weight

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)
_SUMS = (torch.float32, torch.float64)


def accumulate(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite the graph in place. Products must carry `meta["val"]`, others are left alone."""
    additions = [
        n for n in module.graph.nodes if n.target is aten.add_.Tensor and _is_plain(n) and not n.users
    ]
    while additions:
        addition = additions.pop()
        total, made = addition.args
        if isinstance(made, fx.Node) and made.target is aten.add.Tensor and _is_plain(made):
            additions += _split(module.graph, addition, total, made)
        else:
            _rewrite(module.graph, addition)
    module.graph.lint()
    module.recompile()
    return module


def _is_plain(addition: fx.Node) -> bool:
    """Whether two tensors are added, neither of them scaled."""
    return not addition.kwargs and all(isinstance(value, fx.Node) for value in addition.args)


def _split(graph: fx.Graph, addition: fx.Node, total: Any, made: fx.Node) -> list[fx.Node]:
    """What a weight that is used twice is given: one addition after the other, where nobody else reads the
    sum of the two, and both are as large as it."""
    shapes = [v.meta["val"].shape if "val" in v.meta else None for v in (made, *made.all_input_nodes)]
    if len(made.users) > 1 or None in shapes or len(set(shapes)) > 1:
        return []
    with graph.inserting_before(addition):
        parts = [graph.call_function(aten.add_.Tensor, (total, part)) for part in made.args]
    graph.erase_node(addition)
    graph.erase_node(made)
    return parts


def _rewrite(graph: fx.Graph, addition: fx.Node) -> None:
    total, made = addition.args
    chain: list[fx.Node] = [addition]
    turned = False
    while isinstance(made, fx.Node) and len(made.users) == 1 and _passes_on(made):
        turned ^= made.target is aten.t.default
        chain.append(made)
        made = made.args[0]
    if not isinstance(made, fx.Node) or len(made.users) > 1 or not _is_summed_wide(made, len(chain) > 1):
        return
    with graph.inserting_before(addition):
        if made.target is aten.mm.default:
            left, right = made.args
            dz, x = (right, _transposed(graph, left)) if turned else (_transposed(graph, left), right)
        elif made.target is linear_backward_weight and not turned:
            dz, x = made.args
        else:
            return
        graph.call_function(linear_accumulate_weight, (total, dz, x))
    for node in (*chain, made):
        graph.erase_node(node)


def _passes_on(node: fx.Node) -> bool:
    if node.target is aten.t.default:
        return True
    return node.target in _CASTS and torch.float32 in (*node.args[1:], node.kwargs.get("dtype"))


def _is_summed_wide(product: fx.Node, cast: bool) -> bool:
    """Whether the sum is of float32, or of the product's own type, if that is as wide."""
    value = product.meta.get("val")
    return isinstance(value, Tensor) and (cast or value.dtype in _SUMS)


def _transposed(graph: fx.Graph, node: Any) -> Any:
    if isinstance(node, fx.Node) and node.target is aten.t.default:
        return node.args[0]
    return graph.call_function(aten.t.default, (node,))
