"""Rewrites the halves of a stage's backward: the gradients of a value that several nodes read are one sum.

Autograd adds them up one after the other, from the last reader to the first. The order is kept, so results in
float32 keep their bits; in 16 bits they are rounded once instead of each time. This comes after the joint
trace, which makes these additions, and after `in_place.accumulate`, which adds a weight's gradients to their
sum one by one and better.
"""

import torch
from torch import fx

from .gradient_sum import sum_of
from .patterns.match import known
from .patterns.storage import storage, written
from .patterns.sum import Chain, chain_ending_at

aten = torch.ops.aten


def sum_gradients(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite the graph in place. Nodes must carry `meta["val"]`, others are left alone."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten.add.Tensor:
            chain = chain_ending_at(node)
            if chain is not None and not _overwritten(chain):
                _replace(graph, chain)
    graph.lint()
    module.recompile()
    return module


def _replace(graph: fx.Graph, chain: Chain) -> None:
    """The sum is made where the last addition was."""
    last = chain.nodes[-1]
    value = known(last)
    assert value is not None
    with graph.inserting_before(last):
        call = graph.call_function(sum_of, (list(chain.parts), value.dtype))
    call.meta.update(last.meta)
    last.replace_all_uses_with(call)
    for node in reversed(chain.nodes):
        graph.erase_node(node)


def _overwritten(chain: Chain) -> bool:
    """Whether a part is written to before the last addition, which now is when all are read."""
    read = {storage(part) for part in chain.parts}
    node = chain.nodes[0]
    while node is not chain.nodes[-1] and not written(node) & read:
        node = node.next
    return node is not chain.nodes[-1]
