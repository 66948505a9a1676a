"""Casts of weights as arguments of the graphs."""

import pytest
import torch
from torch import fx

from gpp.program.autocast import insert_cast, without_casts
from gpp.program.halves import cut
from gpp.program.joint import Joint, trace_joint
from gpp.program.weights import WeightCast, completed, weight_casts, with_weight_casts

LOW = WeightCast(0, torch.bfloat16)


def forward(*, twice: bool = False) -> fx.GraphModule:
    """x W, W in bfloat16; twice: and once more."""
    graph = fx.Graph()
    weight, x = graph.placeholder("weight"), graph.placeholder("x")
    weight.meta["val"], x.meta["val"] = torch.empty(3, 3), torch.empty(2, 3, dtype=torch.bfloat16)
    made = x
    for _ in range(1 + twice):
        made = graph.call_function(torch.ops.aten.mm.default, (made, weight))
        made.args = (made.args[0], insert_cast(made, weight, torch.bfloat16))
    graph.output((made,))
    return fx.GraphModule(torch.nn.Module(), graph)


def joint(module: fx.GraphModule) -> Joint:
    given = [torch.empty(3, 3), torch.empty(2, 3, dtype=torch.bfloat16)]
    return trace_joint(module, given, learning=[0], flowing=[1], outputs=[0], seeds=[])


def copies(module: fx.GraphModule) -> int:
    return sum(n.target is torch.ops.aten._to_copy.default for n in module.graph.nodes)


@pytest.mark.parametrize("twice", [False, True])
def test_no_graph_casts_the_weight_any_more(twice: bool) -> None:
    module = forward(twice=twice)
    casts = weight_casts(module, 1)
    assert casts == (LOW,)
    halves = cut(with_weight_casts(joint(module), 1, casts), 2)
    assert copies(halves.forward) == copies(halves.backward_input) == 0
    assert copies(halves.backward_weight) == 1 + twice  # the gradients', back to float32
    weight, x, ones = torch.randn(3, 3), torch.randn(2, 3).bfloat16(), torch.ones(2, 3).bfloat16()
    low = LOW.of([weight])
    result, *stash = halves.forward(weight, low, x)
    given, *later = halves.backward_input([weight, low, *stash, ones])
    gradient = halves.backward_weight([weight, low, *later])[0]
    leaf, start = weight.clone().requires_grad_(), x.clone().requires_grad_()
    (eager,) = module(leaf, start)
    eager.backward(ones)
    assert torch.equal(result, eager) and torch.equal(given, start.grad)
    assert gradient.dtype == torch.float32 and torch.equal(gradient, leaf.grad)


def test_without_casts_nothing_changes() -> None:
    plain = without_casts(forward())
    plain.graph.lint()
    assert weight_casts(plain, 1) == () and copies(plain) == 0
    traced = joint(forward())
    assert with_weight_casts(traced, 1, ()) is traced


def test_a_cast_that_is_not_given_is_made() -> None:
    weight = torch.randn(3, 3)
    made = completed([weight], 1, [LOW])
    assert made[0] is weight and torch.equal(made[1], weight.bfloat16())
    assert completed(made, 1, [LOW]) is made
