"""Halves of a backward in which products multiply by the derivative of the activation before them."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gpp.capture.capture import Captured
from gpp.program.build import Hooks, build_stage, mode_plan
from gpp.program.random import keyed_attention, keyed_dropout
from kernels.backward import rewrite_backward
from kernels.derivatives import differentiate_in_products
from kernels.fuse import fuse
from kernels.patterns.match import Keyed
from tests.program.stitched import (
    CPU,
    Ran,
    assert_same,
    captured_and_verified,
    plan_of,
    roots_of,
    run_stages,
    run_uncut,
    state_of,
)

aten = torch.ops.aten
FUSED = torch.ops.gpp_kernels.linear_backward_input_activation.default
ACTIVATION = torch.ops.gpp_kernels.linear_backward_activation.default
INPUT = torch.ops.gpp_kernels.linear_backward_input.default
KEYED = Keyed(torch.ops.gpp.keyed_bits.default, keyed_dropout, keyed_attention)


class Towers(nn.Module):
    """Two layers, then two with dropout and a residual; one activation is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 12)
        self.d, self.e, self.f = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = functional.gelu(self.b(functional.relu(self.a(x))))
        h = h + self.drop(functional.silu(self.d(self.drop(functional.relu(self.c(h))))))
        h = functional.gelu(self.e(h), approximate="tanh")
        return functional.mse_loss((self.f(h) + self.f(h.flip(1)))[:, -1], y)


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


SHAPES = {"x": (4, 5, 8), "y": (4, 3)}


def ran(captured: Captured, state: dict[str, Tensor], hooks: Hooks, values: dict[str, Tensor]) -> Ran:
    """Both stages: the first two layers, and the rest."""
    count = len(captured.graph.operators)
    plan = plan_of(captured, [(0, 1), tuple(range(2, count))], size=4)
    evaluation = mode_plan(plan, captured.traced.evaluate)
    stages = [
        build_stage(
            captured.traced, plan, evaluation, i, roots_of(captured),
            train_sizes=[4], evaluation_sizes=[4], device=CPU, hooks=hooks,
        )
        for i in range(2)
    ]  # fmt: skip
    return run_stages(stages, state, values, step=3, first=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, values, seen = Towers().to(dtype), batch(dtype), []
    captured, state = captured_and_verified(model, values), state_of(model)

    def watched(module: fx.GraphModule) -> fx.GraphModule:
        seen.append([str(n.target) for n in differentiate_in_products(module).graph.nodes])
        return module

    fused = Hooks(fuse=lambda module: fuse(module, KEYED)[0])
    plain = ran(captured, state, fused, values)
    found = ran(captured, state, Hooks(fuse=fused.fuse, backward=watched), values)
    assert_same(found, plain)  # references compute one after the other what the kernel does at once
    uncut = run_uncut(captured, state, values, step=3, first=8)
    assert_same(found, uncut, bound=1e-6 if dtype == torch.float32 else 3e-2)
    counts = [(half.count(str(FUSED)), half.count(str(ACTIVATION))) for half in seen]
    # input and weight half of the first stage, whose input takes no gradient: relu's product stands before
    # gelu's. Then of the second: h is read twice and gelu's gradient is a sum; silu's comes from a sum too
    assert counts == [(0, 0), (1, 1), (1, 2), (0, 0)]


def test_weight_halves_add_besides() -> None:
    torch.manual_seed(0)
    model, values = Towers(), batch()
    captured, state = captured_and_verified(model, values), state_of(model)
    both = Hooks(fuse=lambda module: fuse(module, KEYED)[0], backward=rewrite_backward)
    uncut = run_uncut(captured, state, values, step=3, first=8)
    assert_same(ran(captured, state, both, values), uncut, bound=1e-6)


def backward_graph(made: object, *views: object, twice: bool = False, known: bool = True) -> fx.GraphModule:
    """What an activation's backward reads is made by this operator and seen in these shapes."""
    graph = fx.Graph()
    dz, weight, saved = (graph.placeholder(name) for name in ("dz", "weight", "saved"))
    node = graph.call_function(made, (dz, weight))
    values = [torch.empty(6, 4)]
    for shape in views:
        node = graph.call_function(aten.view.default, (node, shape))
        values.append(torch.empty(shape))
    derived = graph.call_function(ACTIVATION, (node, saved, "relu"))
    values.append(values[-1])
    made_nodes = [n for n in graph.nodes if n.op == "call_function"]
    for item, value in zip(made_nodes, values, strict=True):
        item.meta.update({"val": value} if known else {})
    graph.output((derived, node) if twice else derived)
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("made", [aten.mm.default, INPUT])
def test_products_in_other_shapes_are_rewritten(made: object) -> None:
    dz, weight = torch.randn(6, 5), torch.randn(5, 4)
    for views in ((), ([2, 3, 4],), ([24, 1], [3, 2, 4])):
        plain, saved = backward_graph(made, *views), torch.randn(*(views[-1] if views else (6, 4)))
        rewritten = differentiate_in_products(backward_graph(made, *views))
        assert [n.target for n in rewritten.graph.nodes if n.op == "call_function"] == [FUSED]
        assert torch.equal(rewritten(dz, weight, saved), plain(dz, weight, saved))


@pytest.mark.parametrize(
    "make",
    [
        lambda: backward_graph(aten.mm.default, [2, 3, 4], twice=True),
        lambda: backward_graph(aten.mm.default, [4, 6]),  # its rows are not those of the product
        lambda: backward_graph(aten.mm.default, [2, 3, 4], known=False),
        lambda: backward_graph(aten.mul.Tensor),
    ],
)
def test_what_is_left(make: object) -> None:
    before = str(make().graph)
    assert str(differentiate_in_products(make()).graph) == before
