"""The linear layer over several parts as torch sees it, and the pattern; on CPU, so by its reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from kernels import join_parts
from kernels.fuse import fuse
from kernels.join_gradient import join_linear_accumulate_weight, join_linear_backward_weight
from kernels.join_linear import join_linear, join_linear_keeping
from kernels.join_parts import GROUP


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("activation", ["none", "relu", "gelu_erf"])
def test_opcheck_and_gradients_by_finite_differences(activation: str) -> None:
    xs = [leaf(2, 2, width, dtype=torch.float64) for width in (3, 1)]
    weight, bias = leaf(3, 4, dtype=torch.float64), leaf(3, dtype=torch.float64)
    torch.library.opcheck(join_linear, (xs, weight, bias, activation))
    assert torch.autograd.gradcheck(
        lambda a, b, weight, bias: join_linear([a, b], weight, bias, activation), (*xs, weight, bias)
    )


def test_opcheck_of_the_parts_of_a_gradient() -> None:
    xs, weight = [leaf(5, width).detach() for width in (3, 1)], leaf(2, 4).detach()
    dz = leaf(5, 2).detach()
    torch.library.opcheck(join_linear_keeping, (xs, weight, None, "silu"))
    torch.library.opcheck(join_linear_backward_weight, (dz, xs))
    for dtype in (torch.float32, torch.bfloat16):
        given = (weight.clone(), dz.to(dtype), [x.to(dtype) for x in xs])
        torch.library.opcheck(join_linear_accumulate_weight, given)


class Joined(nn.Module):
    def forward(self, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return join_linear([a, b], weight, None, "gelu_tanh").sin()


def test_export_with_a_dynamic_batch_and_compile() -> None:
    weight = leaf(4, 8)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Joined(), (leaf(3, 5), leaf(3, 3), weight), dynamic_shapes=({0: batch}, {0: batch}, None)
    )
    given = (leaf(7, 5), leaf(7, 3), weight)
    expected = Joined()(*given)
    assert torch.equal(program.module()(*given), expected)
    compiled = torch.compile(Joined(), backend="aot_eager", fullgraph=True)
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), given) for y in (compiled(*given), expected)), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert Joined()(*(t.to("meta") for t in given)).shape == (7, 4)


def test_a_half_makes_the_gradients_that_it_needs() -> None:
    def gradients(a: Tensor, b: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        needed = [t.detach().requires_grad_() for t in (a, c)]
        y = join_linear([needed[0], b, needed[1]], weight, None, "relu")
        return torch.autograd.grad(y.sum(), needed)

    given = [leaf(4, 3).detach(), leaf(4, 2).detach(), leaf(4, 5).detach(), leaf(6, 10).detach()]
    traced = make_fx(gradients)(*given)
    names = [str(n.target).split(".")[1] for n in traced.graph.nodes if "gpp_kernels" in str(n.target)]
    assert names == ["join_linear", "linear_backward_activation", *["linear_backward_input"] * 2]


X, W, DZ = leaf(4, 3).detach(), leaf(2, 6).detach(), leaf(4, 2).detach()
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: join_linear([], W, None, "none"), ValueError, "join_linear: xs must have at least one part"),
    (lambda: join_linear([X, X[:2]], W, None, "none"), ValueError, r"xs\[1\] must have the leading shape of"),
    (lambda: join_linear([X, X.half()], W, None, "none"), TypeError, r"xs\[1\] must be torch.float32"),
    (lambda: join_linear([X], W, None, "none"), ValueError, r"weight must be \[columns, 3\], the widths"),
    (lambda: join_linear([X, X], W, W[0], "none"), ValueError, r"bias must have shape \(2,\), the rows of"),
    (lambda: join_linear([X, X], W.half(), None, "none"), TypeError, "weight must be torch.float32"),
    (lambda: join_linear([X, X], W, None, "tanh"), ValueError, "activation must be one of none, relu"),
    (lambda: join_linear_keeping([X, X], W, None, "relu"), ValueError, "activation must be one of gelu_erf"),
    (lambda: join_linear_backward_weight(DZ[:2], [X]), ValueError, "dz must have the leading shape of xs"),
    (lambda: join_linear_accumulate_weight(W, DZ, [X]), ValueError, r"total must have shape \(2, 3\)"),
    (
        lambda: join_linear_accumulate_weight(W.half(), DZ, [X, X]),
        TypeError,
        "total must be torch.float32, it is torch.float16",
    ),
    (
        lambda: join_linear_accumulate_weight(leaf(6, 2).detach().t(), DZ, [X, X]),
        ValueError,
        "total must be contiguous",
    ),
]


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class Towers(nn.Module):
    """Two joins: one with an activation and more parts than a launch takes, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Linear(4, width) for width in range(1, GROUP + 3))
        self.top = nn.Linear(sum(range(1, GROUP + 3)), 6)
        self.head = nn.Linear(10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.top(torch.cat([tower(x) for tower in self.towers], dim=2)))
        y: Tensor = self.head(torch.cat((h, x), -1))
        return y


def test_joins_keep_their_numbers() -> None:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch")},)
    plain = torch.export.export(Towers(), (torch.randn(3, 2, 4),), dynamic_shapes=shapes).module()
    assert isinstance(plain, fx.GraphModule)
    fused, report = fuse(plain)
    assert [item.operator for item in report.fused] == ["gpp_kernels.join_linear.default"] * 2
    assert "aten.cat.default" not in {str(node.target) for node in fused.graph.nodes}
    x = torch.randn(5, 2, 4, requires_grad=True)
    expected, got = plain(x), fused(x)
    assert torch.equal(got, expected)
    leaves = (x, *plain.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda a, w: functional.linear(torch.cat([a, a]), w), "it joins along dimension 0"),
        (lambda a, w: functional.linear(torch.cat([a], -1), w), "it joins nothing"),
        (lambda a, w: functional.linear(c := torch.cat([a, a], 1), w).sum() + c.sum(), "2 nodes read it"),
        (lambda a, w: functional.linear(torch.cat([a, a.half()], 1), w), r"xs[1] must be torch.float32"),
    ],
    ids=["dimension", "one", "two readers", "dtypes"],
)
def test_joins_that_do_not_fit_are_left(function: Callable[..., Tensor], reason: str) -> None:
    weight = torch.randn(3, 6)
    a = torch.randn(4, 6 if reason.startswith(("it joins along", "it joins nothing")) else 3)
    plain = make_fx(function, pre_dispatch=True, tracing_mode="fake")(a, weight)
    assert isinstance(plain, fx.GraphModule)
    fused, report = fuse(plain)
    reasons = {item.node: item.reason for item in report.left}
    assert not report.fused and reason in reasons["cat"]
    assert torch.equal(fused(a, weight), plain(a, weight))


def test_joins_that_no_linear_layer_reads_are_not_in_the_report() -> None:
    plain = make_fx(lambda a, w: functional.linear(w, torch.cat([a, a], 1)).relu(), pre_dispatch=True)(X, W)
    assert [item.operator for item in fuse(plain)[1].fused] == ["gpp_kernels.linear.default"]
    assert not fuse(plain)[1].left


@pytest.mark.parametrize(("chip", "described"), [(80, False), (90, True), (100, True), (120, False)])
def test_descriptors_are_for_chips_with_memory_for_their_tiles(
    chip: int, described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_parts, "architecture", lambda _: chip)
    weight, x = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((256, 128), (64, 64)))
    assert join_parts.is_described(weight, [[x, x]]) is described
