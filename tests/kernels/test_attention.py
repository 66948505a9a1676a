"""Attention as torch sees it, and the patterns that put it in a stage; on CPU, so by its reference."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gpp.capture.capture import capture
from gpp.program.carve import carve, interface
from gpp.program.random import key_of, keyed_attention, keyed_bits, keyed_dropout
from kernels.attention import attention, attention_forward
from kernels.fuse import FuseReport, fuse
from kernels.launches import launches, with_gradients
from kernels.patterns.match import Keyed

functional = nn.functional
ops = torch.ops.gpp_kernels
KEYED = Keyed(torch.ops.gpp.keyed_bits.default, keyed_dropout, keyed_attention)
POSITION = torch.tensor([3, 8])
NODE = key_of(0, "node")


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def triple(dtype: torch.dtype = torch.float32, shared: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value of two samples, of four and of `shared` heads."""
    return (leaf(2, 4, 3, 8, dtype=dtype), *(leaf(2, shared, 5, 8, dtype=dtype, seed=i) for i in (1, 2)))


def dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    y: Tensor = attention(q, k, v, mask, POSITION, NODE, 60, 0.25, causal, None)
    return y


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    bits = keyed_bits(POSITION, NODE, [*q.shape[:3], k.shape[2]], 0, 1)
    return keyed_attention(q, k, v, bits, mask, 0.25, causal, None, True)


def test_opcheck() -> None:
    q, k, v = triple()
    torch.library.opcheck(attention, (q, k, v, leaf(4, 3, 5, seed=3), POSITION, NODE, 60, 0.25, False, None))
    turned = leaf(2, 3, 4, 8).detach().transpose(1, 2)
    torch.library.opcheck(attention, (turned, k, k, turned[..., :5] > 0, None, 0, 0, 0.0, False, 0.3))
    q, k, v = (t.detach() for t in (q, k, v))
    rest = (leaf(3, 5, seed=3).detach(), POSITION, NODE, 60, 0.25, False, None)
    torch.library.opcheck(attention_forward, (q, k, v, *rest))
    y, peak, log_sum = attention_forward(q, k, v, *rest)
    torch.library.opcheck(ops.attention_backward_delta.default, (q, y))
    arguments = (q, q, k, v, peak, log_sum, ops.attention_backward_delta(q, y), *rest)
    for name in ("query", "key_value", "mask"):
        torch.library.opcheck(getattr(ops, f"attention_backward_{name}").default, arguments)


def test_gradients_by_finite_differences() -> None:
    wide = triple(torch.float64)
    mask = leaf(4, 1, 5, dtype=torch.float64, seed=3)
    assert torch.autograd.gradcheck(dropped, (*wide, mask))
    assert torch.autograd.gradcheck(lambda *t: dropped(*t, None, True), wide)
    some = torch.arange(15).view(3, 5) % 2 == 0
    assert torch.autograd.gradcheck(lambda *t: dropped(*t, some), wide)


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_the_stage_with_its_weights_written_out(causal: bool, shared: int) -> None:
    given = triple(shared=shared)
    mask = None if causal else torch.arange(5).expand(2, 1, 1, 5) < 4
    got, expected = dropped(*given, mask, causal), written_out(*given, mask, causal)
    torch.testing.assert_close(got, expected)
    dy = leaf(2, 4, 3, 8, seed=4)
    for a, b in zip(*(torch.autograd.grad(y, given, dy) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_query_without_keys_gets_zeros_as_in_torch() -> None:
    given, none = triple(), torch.zeros(3, 5, dtype=torch.bool)
    for y in (dropped(*given, none), written_out(*given, none)):
        assert not y.any() and not any(g.any() for g in torch.autograd.grad(y.sum(), given))
    assert not functional.scaled_dot_product_attention(*given, none, enable_gqa=True).any()


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        made: Tensor = attention(q, k, v, None, position, NODE, 60, 0.25, True, None)
        return made


def test_export_and_compile() -> None:
    module, given = Layer(), tuple(t.detach() for t in triple())
    batch = {0: torch.export.Dim("batch")}
    shapes = {"q": batch, "k": batch, "v": batch, "position": None}
    program = torch.export.export(module, (*given, POSITION), dynamic_shapes=shapes)
    more = tuple(torch.cat([t, t[:1]]) for t in given)
    expected = module(*more, POSITION)
    assert torch.equal(program.run_decompositions().module()(*more, POSITION), expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    leaves = [t.clone().requires_grad_() for t in more]
    got = torch.autograd.grad(compiled(*leaves, POSITION).square().sum(), leaves)
    plain = torch.autograd.grad(module(*leaves, POSITION).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_a_half_that_is_not_needed_is_not_run() -> None:
    def targets(wanted: slice) -> list[str]:
        def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(dropped(*leaves), leaves, q)[wanted]

        graph = make_fx(step)(*(t.detach() for t in triple())).graph
        graph.eliminate_dead_code()
        return [str(n.target).split(".")[1] for n in graph.nodes if "gpp_kernels" in str(n.target)]

    before = ["attention_forward", "attention_backward_delta"]
    assert targets(slice(0, 1)) == [*before, "attention_backward_query"]
    assert targets(slice(1, 3)) == [*before, "attention_backward_key_value"]


def test_aligned_rows_are_not_copied_and_others_are() -> None:
    def kernels(head: int, keys: int, dtype: torch.dtype = torch.bfloat16) -> Counter[str]:
        q, k, v = torch.randn(2, keys, 3 * 2 * head, dtype=dtype).unflatten(-1, (3, 2, head)).unbind(2)
        mask = torch.ones(2, 1, keys, keys, dtype=torch.bool)
        turned = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
        return launches(with_gradients(lambda *t: dropped(*t, mask)), *turned)

    whole = kernels(80, 32)
    kinds = ("forward", "delta", "query", "key_value")
    assert whole == {f"attention_{kind}_kernel": 1 for kind in kinds}
    assert kernels(80, 33) - whole == {"aten.copy_.default": 3}  # the mask, in each of the large ones
    widened = kernels(20, 32) - whole
    # three of forward and four of each half get zeros behind their rows; four results are taken out again
    assert widened == {"aten.new_zeros.default": 11, "aten.copy_.default": 15}
    assert kernels(80, 32, torch.float32) - whole == widened


def test_shapes_are_known_of_meta_and_fake_tensors() -> None:
    q = torch.empty(2, 6, 4, 8, device="meta", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    y = attention(q, q, q, None, None, 0, 0, 0.0, False, None)
    (dq,) = torch.autograd.grad(y.sum(), q)
    assert y.shape == dq.shape == (2, 4, 6, 8) and y.stride() == dq.stride() == q.stride()
    with FakeTensorMode():
        fake = torch.empty(2, 4, 6, 8, device="cuda")
        y, peak, log_sum = attention_forward(fake, fake, fake, None, None, 0, 0, 0.0, False, None)
        assert (y.device.type, peak.shape, log_sum.dtype) == ("cuda", (2, 4, 6), torch.float32)


Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)


def call(
    q: Tensor = Q,
    k: Tensor = K,
    v: Tensor = K,
    mask: Tensor | None = None,
    p: float = 0.0,
    drop: bool = False,
) -> object:
    return attention(q, k, v, mask, POSITION if drop else None, NODE, 60, p, False, None)


MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: call(Q[0]), ValueError, r"attention: query must have four dimensions.*it is \(4, 3, 8\)"),
    (lambda: call(k=K.half()), TypeError, "key must be torch.float32, it is torch.float16"),
    (
        lambda: call(k=K[:1]),
        ValueError,
        r"key must have query's 2 samples and head size 8, it is \(1, 2, 5, 8\)",
    ),
    (lambda: call(v=K[:, :, 1:]), ValueError, r"value must have key's shape \(2, 2, 5, 8\)"),
    (lambda: call(Q[:, :3]), ValueError, "key must have a number of heads that divides query's 3, it is 2"),
    (lambda: call(*[torch.ones(1, 1, 2, 129)] * 3), ValueError, "query must have a head size from 1 to 128"),
    (lambda: call(mask=Q[0, 0]), ValueError, r"mask must broadcast to \(2, 4, 3, 5\), it is \(3, 8\)"),
    (lambda: call(mask=torch.ones(3, 5).int()), TypeError, "mask must be torch.bool or torch.float32"),
    (
        lambda: attention(Q, K, K, torch.ones(3, 5), None, 0, 0, 0.0, True, None),
        ValueError,
        "causal must be False beside a mask, as torch has it, it is True",
    ),
    (lambda: call(p=0.1), ValueError, "p must be 0 without a position, it is 0.1"),
    (lambda: call(p=1.1, drop=True), ValueError, r"p must lie in \[0, 1\], it is 1.1"),
    (lambda: ops.attention_backward_delta(Q, Q[:1]), ValueError, r"dy must have y's shape \(1, 4, 3, 8\)"),
    (
        lambda: ops.attention_backward_query(
            Q, Q, Q, Q, Q[..., 0], Q[..., 0], Q[0, ..., 0], None, None, 0, 0, 0.0, False, None
        ),
        ValueError,
        "peak must be contiguous",
    ),
]


@pytest.mark.parametrize("mistake, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(mistake: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mistake()


class Encoder(nn.Module):
    """Both of torch's modules with attention, one of them with a padding mask."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 4, dropout, batch_first=True)
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x, src_key_padding_mask=x[:, :, 0] > 1.0)
        mixed, _ = self.attention(h, h, h, need_weights=False)
        return self.out(mixed + h).square().mean()


def stage(model: nn.Module, samples: int) -> tuple[fx.GraphModule, list[Tensor]]:
    """The whole model as one stage of so many samples, and its parameters as the stage takes them."""
    captured = capture(model, {"x": torch.randn(4, 6, 16)})
    mode = captured.traced.train
    operators = [operator.name for operator in captured.graph.operators]
    face = interface(mode, operators)
    carved = carve(mode, operators, samples, face.parameters, face.buffers, device=torch.device("cpu"))
    named = dict(model.named_parameters())
    return carved, [named[name] for name in face.parameters]


def replaced(report: FuseReport) -> list[str]:
    return [item.nodes[-1] for item in report.fused if item.operator == "gpp_kernels.attention.default"]


class Plain(nn.Module):
    """Attention without dropout, with `options` or, without any, a mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        options = {"attn_mask": mask, **self.options} if self.options == {} else self.options
        made: Tensor = functional.scaled_dot_product_attention(q, k, k, **options)
        return made


def traced(q: Tensor, k: Tensor, **options: Any) -> fx.GraphModule:
    module = make_fx(Plain(**options), pre_dispatch=True, tracing_mode="fake")(q, k, torch.ones(3, 5).bool())
    assert isinstance(module, fx.GraphModule)
    return module


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"is_causal": True}, {}, {"enable_gqa": True}], ids=str)
def test_attention_without_dropout_is_taken_where_it_is_asked_for(options: dict[str, Any]) -> None:
    k = K if "enable_gqa" in options else torch.randn(2, 4, 5, 8)
    plain = traced(Q, k, **options)
    left = fuse(plain)[1].left
    assert [item.reason.partition(";")[0] for item in left] == ["torch's SDPA has no dropout to key here"]
    fused, report = fuse(plain, attention=True)
    assert [item.operator for item in report.fused] == ["gpp_kernels.attention.default"] and not report.left
    mask = torch.rand(3, 5) > 0.4
    torch.testing.assert_close(fused(Q, k, mask), plain(Q, k, mask))


LEFT = [
    (
        (Q, Q[..., :3, :], {"dropout_p": 0.1}),
        "it draws random numbers of its own, the operator only keyed ones",
    ),
    ((Q[0], Q[0], {"scale": 1.0}), "its query has shape (4, 3, 8), the operator takes four dimensions"),
    (
        (Q.repeat(1, 1, 1, 20), Q.repeat(1, 1, 1, 20), {"scale": 1.0}),
        "query must have a head size from 1 to 128, it is 160",
    ),
    ((Q.double(), Q.double(), {"scale": 1.0}), "its dtype is torch.float64"),
]


@pytest.mark.parametrize("given, reason", LEFT, ids=[reason[:30] for _, reason in LEFT])
def test_attention_that_does_not_fit_is_left(
    given: tuple[Tensor, Tensor, dict[str, Any]], reason: str
) -> None:
    q, k, options = given
    plain = traced(q, k, **options)
    fused, report = fuse(plain, attention=True)
    assert not report.fused and reason in report.left[0].reason and len(report.left) == 1
    assert str(fused.graph) == str(plain.graph)


def test_bits_that_do_not_fit_are_left() -> None:
    def graph(sizes: list[int], dim: int) -> fx.GraphModule:
        made = fx.Graph()
        q, position = made.placeholder("q"), made.placeholder("position")
        bits = made.call_function(KEYED.bits, (position, NODE, sizes, dim, 1))
        y = made.call_function(keyed_attention, (q, q, q, bits, None, 0.3, False, None, False))
        made.output(y)
        for node in (q, bits, y):
            node.meta["val"] = Q.to("meta")
        return fx.GraphModule(nn.Module(), made)

    for sizes, dim, reason in (
        ([2, 4, 3, 3], 1, "the samples are its dimension 1"),
        ([2, 1, 3, 3], 0, "its bits have shape (2, 1, 3, 3), not that of its weights"),
    ):
        report = fuse(graph(sizes, dim), KEYED)[1]
        assert not report.fused and reason in report.left[0].reason
    for dim in (0, -1):
        plain = graph([2, 4, 3, 3], dim)
        fused, report = fuse(plain, KEYED)
        assert replaced(report) == ["keyed_attention"]
        torch.testing.assert_close(fused(Q, POSITION), plain(Q, POSITION))


def test_a_stage_of_encoder_layers_keeps_its_numbers() -> None:
    torch.manual_seed(0)
    plain, parameters = stage(Encoder(0.2), 4)
    fused, report = fuse(plain, KEYED)
    assert replaced(report) == ["keyed_attention", "keyed_attention_1"]
    assert not any(node.target is keyed_attention for node in fused.graph.nodes)
    x = torch.randn(4, 6, 16)
    inputs = (*parameters, x, POSITION)
    losses = [module(*inputs)[0] for module in (plain, fused)]
    torch.testing.assert_close(losses[1], losses[0])
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)
