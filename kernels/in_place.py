"""Rewrites the weight half of a stage: a weight's gradient that is made only to be added to its sum over
micro-batches is added by what makes it.

    total.add_(dz^T x), through transposes and casts to float32
        -> gpp_kernels.linear_accumulate_weight, or join_linear_accumulate_weight where x has several parts
    total.add_ of the rows that were looked up of a large table, or of several tables by one call
        -> gpp_kernels.embedding_bag_accumulate_weight

Gradients of a weight that is used twice are added one after the other. The gradient is then never written: a
third of what the half moves, and of a table all but the rows that occur. Its sum is rounded once instead of
twice, so it agrees with the graph given, but not to the bit. An autograd formula cannot write to a sum, so
this comes after the joint trace.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from .embedding_bag_gradient import embedding_bag_accumulate_weight, embedding_bag_backward_weight
from .join_gradient import join_linear_accumulate_weight, join_linear_backward_weight
from .linear_gradient import linear_accumulate_weight, linear_backward_weight

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)
_IN_PLACE: Mapping[Any, Any] = {
    linear_backward_weight: linear_accumulate_weight,
    join_linear_backward_weight: join_linear_accumulate_weight,
}
_LARGE_TABLE = 1 << 20  # elements; all of fewer are added sooner than the rows that occur are sorted
_SUMS = (torch.float32, torch.float64)


def accumulate(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite the graph in place. Products must carry `meta["val"]`, others are left alone."""
    additions = [n for n in module.graph.nodes if n.target is aten.add_.Tensor and _is_sum(n)]
    while additions:
        addition = additions.pop()
        total, made = addition.args
        if isinstance(made, fx.Node) and made.target is aten.add.Tensor and _is_plain(made):
            additions += _split(module.graph, addition, total, made)
        else:
            _rewrite(module.graph, addition)
    for node in list(module.graph.nodes):
        if node.target is embedding_bag_backward_weight:
            _rewrite_tables(module.graph, node)
    module.graph.lint()
    module.recompile()
    return module


def _is_sum(addition: fx.Node) -> bool:
    """Whether an argument of the graph is added to, and nobody reads what comes out."""
    total = addition.args[0]
    given = isinstance(total, fx.Node) and total.op == "placeholder"
    return given and _is_plain(addition) and not addition.users


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
    target: Any = linear_accumulate_weight
    with graph.inserting_before(addition):
        if made.target is aten.mm.default:
            left, right = made.args
            dz, x = (right, _transposed(graph, left)) if turned else (_transposed(graph, left), right)
            given: tuple[Any, ...] = (total, dz, x)
        elif made.target in _IN_PLACE and not turned:
            target, given = _IN_PLACE[made.target], (total, *made.args)
        elif made.target is aten.embedding_dense_backward.default and not turned and _is_sparse(made):
            dy = graph.call_function(aten.unsqueeze.default, (made.args[0], 0))
            bags = graph.call_function(aten.unsqueeze.default, (made.args[1], -1))
            target, given = embedding_bag_accumulate_weight, ([total], dy, [bags], [], "sum", False)
        else:
            return
        graph.call_function(target, given)
    for node in (*chain, made):
        graph.erase_node(node)


def _is_sparse(look_up: fx.Node) -> bool:
    """Whether a gradient of a large table is mostly zero, and every row of it that is not a plain sum."""
    _, indices, rows, padding, by_frequency = cast("tuple[Any, ...]", look_up.args)
    value = indices.meta.get("val") if isinstance(indices, fx.Node) else None
    made = look_up.meta["val"]
    sparse = isinstance(value, Tensor) and value.numel() < rows and made.numel() >= _LARGE_TABLE
    return sparse and padding == -1 and not by_frequency


def _rewrite_tables(graph: fx.Graph, made: fx.Node) -> None:
    """All gradients of one call are added, each to a sum of its own, or they are left."""
    dy, indices, offsets, rows, *options = cast("list[Any]", made.args)
    totals: dict[int, Any] = {}
    gone: list[fx.Node] = []
    for part in made.users:
        chain = [part]
        while len(chain[-1].users) == 1 and _passes_on(next(iter(chain[-1].users))):
            chain.append(next(iter(chain[-1].users)))
        addition = next(iter(chain[-1].users), None)
        if addition is None or len(chain[-1].users) > 1 or addition.target is not aten.add_.Tensor:
            return
        fits = _is_plain(addition) and not addition.users and addition.args[1] is chain[-1]
        if not fits or not _is_summed_wide(part, len(chain) > 1):
            return
        totals[cast("int", part.args[1])] = addition.args[0]
        gone += [addition, *reversed(chain)]
    if len(totals) < len(rows) or len(set(totals.values())) < len(rows):
        return
    additions = [node for node in gone if node.target is aten.add_.Tensor]
    last = next(node for node in reversed(graph.nodes) if node in additions)
    with graph.inserting_before(last):
        given = ([totals[place] for place in range(len(rows))], dy, indices, offsets, *options)
        graph.call_function(embedding_bag_accumulate_weight, given)
    for node in (*gone, made):
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
