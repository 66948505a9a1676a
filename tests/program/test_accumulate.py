import torch
from torch import fx

from gpp.program.accumulate import with_sums


def weight_half() -> fx.GraphModule:
    """Of two parameters and a stash of two: the product's gradient, none, the second stashed value itself."""
    graph = fx.Graph()
    _, _, x, dy = (graph.placeholder(name) for name in ("p", "q", "x", "dy"))
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, dy))
    double = graph.call_function(torch.ops.aten.mul.Tensor, (product, 2.0))
    graph.output((double, None, dy, product))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_gradients_are_added_where_they_are_made():
    module, reached = with_sums(weight_half(), 2)
    assert reached == (True, False, True, True)
    sums = [torch.full((3,), float(i)) for i in range(3)]
    p, x, dy = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    arguments = [p, p, *sums, x, dy]
    assert module(arguments) == () and arguments == []
    assert sums[0].tolist() == [2.0, 4.0, 6.0]
    assert sums[1].tolist() == [2.0, 2.0, 2.0]
    assert sums[2].tolist() == [3.0, 4.0, 5.0]
    targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
    add, mul = torch.ops.aten.add_.Tensor, torch.ops.aten.mul.Tensor
    assert targets == [add, mul, add, mul, add]  # none waits for the end


def test_without_a_stash():
    graph = fx.Graph()
    graph.placeholder("p")
    one = graph.call_function(torch.ops.aten.ones.default, ([2],))
    graph.output((one,))
    module, reached = with_sums(fx.GraphModule(torch.nn.Module(), graph), 1)
    total = torch.zeros(2)
    module([torch.zeros(2), total])
    assert reached == (True,) and total.tolist() == [1.0, 1.0]
