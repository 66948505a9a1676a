"""Transformer blocks as people write them, captured and fused: each residual sum goes with its norm."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from gpp.capture.capture import Captured, capture
from gpp.program.autocast import Autocast
from gpp.program.build import Hooks, Roots, alone
from gpp.program.carve import carve, interface
from gpp.program.random import keyed_attention, keyed_dropout
from kernels.fuse import FuseReport, fuse
from kernels.patterns.match import Keyed

KEYED = Keyed(torch.ops.gpp.keyed_bits.default, keyed_dropout, keyed_attention)
POSITION = torch.tensor([2, 4])
WIDTH = 8


class Blocks(nn.Module):
    """Two residual parts that normalise before them or behind them, with the operands in either order."""

    def __init__(self, norm: Callable[[int], nn.Module], first: bool, p: float) -> None:
        super().__init__()
        self.first = first
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.norms
        if self.first:
            x = x + self.dropout(self.mix(one(x)))
            x = self.dropout(self.ffn(two(x))) + x
            last: Tensor = three(x)
            return last
        x = one(self.dropout(self.mix(x)) + x)
        last = two(x + self.dropout(self.ffn(x)))
        return last


def encoder(first: bool, p: float) -> nn.Module:
    layer = partial(nn.TransformerEncoderLayer, WIDTH, 2, 16, p, batch_first=True, norm_first=first)
    return layer()


class Classifier(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.body(x).mean(1)), y)


def captured(body: nn.Module, bf16: bool) -> Captured:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 3, WIDTH), "y": torch.randint(5, (4,))}
    return capture(Classifier(body), batch, autocast=Autocast("cpu") if bf16 else None)


def stage(model: Captured) -> fx.GraphModule:
    """All of it as one stage for four samples."""
    operators = [operator.name for operator in model.graph.operators]
    face = interface(model.traced.train, operators)
    return carve(model.traced.train, operators, 4, face.parameters, face.buffers, device=torch.device("cpu"))


def gradients(module: fx.GraphModule) -> list[Tensor]:
    """The loss and its gradients, for arguments drawn from a seed."""
    generator = torch.Generator().manual_seed(1)
    given: list[Tensor] = []
    leaves: list[Tensor] = []
    for node in module.graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("parameter"):
            leaves.append((torch.rand(node.meta["val"].shape, generator=generator) - 0.3).requires_grad_())
    given = [*leaves, torch.randn(4, 3, WIDTH, generator=generator), torch.tensor([0, 3, 1, 4]), POSITION]
    loss = module(*given)[0]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def sums(report: FuseReport) -> list[tuple[str, ...]]:
    """The nodes of each fused sum, without the numbers behind their names."""
    return [
        tuple(name.rstrip("_0123456789") for name in item.nodes)
        for item in report.fused
        if item.operator == "gpp_kernels.add_norm.default"
    ]


DROPPED = ("keyed_bits_default", "keyed_dropout")
MODELS: dict[str, tuple[Callable[[], nn.Module], bool, list[tuple[str, ...]]]] = {
    "norm first": (
        lambda: Blocks(nn.LayerNorm, True, 0.3),
        False,
        [(*DROPPED, "add", "layer_norm")] * 2,
    ),
    "norm last": (
        lambda: Blocks(nn.LayerNorm, False, 0.3),
        False,
        [(*DROPPED, "add", "layer_norm")] * 2,
    ),
    "norm first under autocast": (
        lambda: Blocks(nn.RMSNorm, True, 0.3),
        True,
        [(*DROPPED, "add", "rms_norm", "to_dtype"), (*DROPPED, "add", "rms_norm")],
    ),
    "norm last under autocast": (
        lambda: Blocks(nn.LayerNorm, False, 0.0),
        True,
        [("add", "layer_norm")] * 2,
    ),
    "torch's encoder, norm first": (
        lambda: encoder(True, 0.3),
        False,
        [(*DROPPED, "add", "layer_norm")],
    ),
    "torch's encoder, norm last": (
        lambda: encoder(False, 0.3),
        True,
        [(*DROPPED, "add", "layer_norm")] * 2,
    ),
}


@pytest.mark.parametrize("make, bf16, expected", MODELS.values(), ids=list(MODELS))
def test_blocks_keep_their_numbers(
    make: Callable[[], nn.Module], bf16: bool, expected: list[tuple[str, ...]]
) -> None:
    plain = stage(captured(make(), bf16))
    fused, report = fuse(plain, KEYED)
    assert sums(report) == expected
    for got, right in zip(gradients(fused), gradients(plain), strict=True):
        if bf16:  # a rounding here and there is another
            assert (got - right).norm() <= 0.02 * right.norm() + 1e-3
        else:
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


def test_the_halves_of_a_stage_keep_their_numbers() -> None:
    model = captured(Blocks(nn.LayerNorm, True, 0.3), False)
    operators = [operator.name for operator in model.graph.operators]
    roots = Roots({term: 1.0 for term in model.traced.train.terms}, mean=True)

    def run(hooks: Hooks) -> tuple[list[Tensor], int]:
        """The sums of the weights' gradients, and the bytes that forward keeps for them."""
        part = alone(model.traced, operators, 4, roots, torch.device("cpu"), hooks)
        generator = torch.Generator().manual_seed(1)
        given = [
            torch.rand(t.shape, generator=generator) if t.is_floating_point() else torch.zeros_like(t)
            for t in part.examples
        ]
        weights = given[: len(part.face.parameters)]
        made = part.functions.forward(weights, [], given[len(weights) : -1], POSITION)
        kept = sum(t.numel() * t.element_size() for t in made.stash)
        back = part.functions.backward_input(weights, list(made.stash), [])
        totals = [torch.zeros_like(weight) for weight in weights]
        part.functions.backward_weight(weights, list(back.stash), totals)
        return totals, kept

    plain, plain_bytes = run(Hooks())
    fused, fused_bytes = run(Hooks(fuse=lambda module: fuse(module, KEYED)[0]))
    for got, right in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)
    mask = 4 * 3 * WIDTH * 4
    assert fused_bytes <= plain_bytes - mask, "what the dropouts kept is not stashed"


def traced(function: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    assert isinstance(module, fx.GraphModule)
    return module


X, ROW = torch.randn(4, WIDTH), torch.randn(WIDTH)


def norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, (WIDTH,))


@pytest.mark.parametrize(
    "function, inputs",
    [
        (lambda x, y: norm(x + y), (X, ROW)),  # stretched
        (lambda x, y: norm(torch.add(x, y, alpha=2)), (X, X)),
        (lambda x, y: norm(x + 1.0), (X, X)),
        (lambda x, y: norm(x * y), (X, X)),
        (lambda x, y: norm(x.clone().add_(y)), (X, X)),  # in place: capture makes it functional where it may
    ],
)
def test_other_sums_are_left_and_their_norms_are_not(
    function: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor]
) -> None:
    plain = traced(function, *inputs)
    fused, report = fuse(plain)
    assert [item.operator for item in report.fused] == ["gpp_kernels.layer_norm.default"] and not report.left
    torch.testing.assert_close(fused(*inputs), plain(*inputs))


def test_alike_casts_of_a_norm_become_one() -> None:
    """As where the projections of attention are layers of their own, under autocast."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        normal = norm(x + y)
        return normal.bfloat16().sin(), normal.bfloat16() * 2, normal.bfloat16().cos()

    def other(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        normal = norm(x + y)
        return normal.bfloat16().sin(), normal.half() * 2

    def written(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        normal = norm(x + y)
        return normal.bfloat16()[1:].sin_(), normal.bfloat16() * 2

    for case, count in ((function, 5), (other, 2), (written, 2)):
        plain = traced(case, X, X)
        fused, report = fuse(plain)
        assert [len(item.nodes) for item in report.fused] == [count]
        for got, right in zip(fused(X, X), plain(X, X), strict=True):
            assert torch.equal(got, right)


def test_a_sum_whose_addend_is_overwritten_before_the_norm_is_left() -> None:
    def function(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        s = x + y
        z.mul_(2)
        return norm(s), s

    plain = traced(function, X, X, X)
    report = fuse(plain)[1]
    assert [item.operator for item in report.fused] == ["gpp_kernels.layer_norm.default"]


def test_a_sum_that_nobody_else_reads_is_not_picked_out() -> None:
    fused, _ = fuse(traced(lambda x, y: norm(x + y), X, X))
    calls = [str(n.target) for n in fused.graph.nodes if n.op == "call_function"]
    assert calls == ["gpp_kernels.add_norm.default", "<built-in function getitem>"]


def dropped_graph(dim: int, addend: int, returned: bool) -> fx.GraphModule:
    """The norm of a dropped value plus x or itself, and the dropped value too if it is `returned`."""
    graph = fx.Graph()
    x, position = graph.placeholder("x"), graph.placeholder("position")
    bits = graph.call_function(KEYED.bits, (position, 5, [4, WIDTH], dim, 1))
    dropped = graph.call_function(keyed_dropout, (x, bits, 0.3))
    total = graph.call_function(torch.ops.aten.add.Tensor, (dropped, (x, dropped)[addend]))
    result = graph.call_function(torch.ops.aten.layer_norm.default, (total, [WIDTH]))
    graph.output((result, dropped if returned else total))
    for node in (x, dropped, total, result):
        node.meta["val"] = torch.empty(4, WIDTH, device="meta")
    bits.meta["val"] = torch.empty(4, WIDTH, device="meta", dtype=torch.int32)
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    "dim, addend, returned, operators",
    [
        (0, 0, False, {"add_norm"}),
        (0, 0, True, {"add_norm", "dropout"}),  # others read what is dropped
        (0, 1, False, {"add_norm", "dropout"}),  # it is added to itself
        (1, 0, False, {"add_norm"}),  # torch drops it
    ],
)
def test_a_value_may_be_dropped_apart(dim: int, addend: int, returned: bool, operators: set[str]) -> None:
    plain = dropped_graph(dim, addend, returned)
    fused, report = fuse(plain, KEYED)
    assert {item.operator.split(".")[1] for item in report.fused} == operators
    for got, right in zip(fused(X, POSITION), plain(X, POSITION), strict=True):
        torch.testing.assert_close(got, right)


def test_a_sum_that_is_read_before_the_weight_of_its_norm_is_made_stays() -> None:
    """The weight is made of the sum itself, so no call can stand before all who read the sum."""

    def made(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return functional.layer_norm(total, (WIDTH,), total.mean(0))

    x, y = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    plain = make_fx(made, pre_dispatch=True)(x, y)
    result, report = fuse(plain)
    assert [item.operator for item in report.fused] == ["gpp_kernels.layer_norm.default"]
    torch.testing.assert_close(result(x, y), plain(x, y))


def test_what_is_overwritten_through_a_part_of_it_is_not_read_later() -> None:
    """The sum is made before half of an addend is doubled, its norm's weight only then."""

    def made(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        total = x + y
        x.chunk(2, -1)[0].mul_(2.0)
        return functional.layer_norm(total, (WIDTH,), weight.sin())

    x, y, weight = torch.randn(3, WIDTH), torch.randn(3, WIDTH), torch.randn(WIDTH)
    plain = make_fx(made, pre_dispatch=True)(x.clone(), y, weight)
    result, report = fuse(plain)
    assert [item.operator for item in report.fused] == ["gpp_kernels.layer_norm.default"]
    torch.testing.assert_close(result(x.clone(), y, weight), plain(x.clone(), y, weight))
