"""Weight gradients added to their sums as soon as they are there, inside the weight half.

A graph that returned them would hold all of a stage's gradients twice while it runs: as much again as its
parameters. An autograd formula cannot write to a sum, so this is done after the cut.
"""

import torch
from torch import fx
from torch.fx.graph import _BoxedCodeGen


def with_sums(weight_half: fx.GraphModule, parameters: int) -> tuple[fx.GraphModule, tuple[bool, ...]]:
    """The weight half that takes sums behind its first `parameters` arguments, one for each gradient that it
    computes, adds to them and returns nothing; and for each result whether it is computed. In place.

    Sums have the gradients' shapes and data types.
    """
    graph = weight_half.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    end = next(n for n in graph.nodes if n.op == "output")
    results = list(end.args[0])
    first = placeholders[parameters] if parameters < len(placeholders) else None
    order = {node: number for number, node in enumerate(graph.nodes)}
    body = next((n for n in graph.nodes if n.op != "placeholder"), end)
    for number, gradient in enumerate(results):
        if gradient is None:
            continue
        with graph.inserting_before(first or body):
            total = graph.placeholder(f"sum{number}")
        place = gradient.next if order[gradient] >= order[body] else body
        with graph.inserting_before(place):
            graph.call_function(torch.ops.aten.add_.Tensor, (total, gradient))
    end.args = ((),)
    graph.set_codegen(_BoxedCodeGen())
    weight_half.recompile()
    return weight_half, tuple(gradient is not None for gradient in results)
