"""A model captured under autocast computes what eager autocast computes, to the bit."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture.capture import Captured, capture
from gpp.capture.export import CaptureError
from gpp.capture.verify import verify
from gpp.capture.weights import build_plain, build_recorded
from gpp.models.mmt import MultiModalTransformer
from gpp.program.autocast import Autocast, under_autocast
from gpp.program.build import Alone, Roots, alone
from gpp.program.carve import carve, interface
from tests.equality import models
from tests.thorough import thorough

BF16 = Autocast("cpu")
CPU = torch.device("cpu")


class Transformer(MultiModalTransformer):
    def __init__(self) -> None:
        super().__init__({"name": 6, "body": 9}, layers=2, hidden=32, heads=2, ffn=64, classes=5)


class Turned(nn.Module):
    """Reads its weights through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.tanh(x @ self.b.t()) @ self.a.t(), y)


class ByHand(nn.Module):
    """Precision in the user's own hands: a block in full, a cast up, a block in half."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            x = self.b(x.float())
        scale = self.c(x).float().square().mean(-1, keepdim=True).rsqrt()
        with torch.autocast("cpu", dtype=torch.float16):
            x = self.d(x * scale)
        return F.cross_entropy(x.float(), y)


def batch(model: nn.Module, samples: int) -> dict[str, Tensor]:
    if not isinstance(model, Transformer):
        return models.batch(model, samples, 7, torch.float32)
    draw = torch.Generator().manual_seed(3)
    found = {k: torch.randint(1, 200, (samples, n), generator=draw) for k, n in (("name", 6), ("body", 9))}
    return {**found, "label": torch.randint(0, 5, (samples,), generator=draw)}


@cache
def made(kind: type[nn.Module], autocast: Autocast | None = BF16) -> tuple[nn.Module, Captured]:
    model = build_plain(kind, 1).model
    return model, capture(model, batch(model, 4), seed=5, autocast=autocast)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def graph_loss(model: nn.Module, captured: Captured, given: dict[str, Tensor]) -> Tensor:
    mode = captured.traced.train
    operators = set(mode.operator_of.values())
    face = interface(mode, operators)
    parameters = dict(model.named_parameters())
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    size = len(next(iter(given.values())))
    run = carve(mode, operators, size, list(parameters), list(buffers), device=CPU)
    keys = [given[key] for key in face.batch_keys]
    results = run(*parameters.values(), *buffers.values(), *keys, torch.zeros(2, dtype=torch.int64))
    terms = dict(zip(face.terms, results, strict=True))

    def total(parts) -> Tensor:
        return sum((c * terms[n] for n, c in parts), torch.zeros(()))

    loss = captured.train.loss
    return total(loss.terms) if loss.weight is None else total(loss.terms) / total(loss.weight).detach()


class Recurrent(nn.Module):
    """Autocast reaches inside of a recurrent layer, and raises what is to be complex."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.GRU(2, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        turned = torch.view_as_complex(self.a(x).unflatten(-1, (4, 2))) * torch.tensor(0.6 + 0.8j)
        return F.cross_entropy(self.c(self.b(torch.view_as_real(turned))[0].mean(1)), y)


KINDS = (
    models.Chain, models.Diamond, models.FanOut, models.Skip, models.Table, models.Tied, models.BatchNorm,
    models.TwoHeads, models.Padded, models.Frozen, models.Clicks, models.PooledClicks, models.Drugs,
    models.IntegerEdge, Transformer, Turned, Recurrent, ByHand,
)  # fmt: skip


FEW = (models.Table, models.BatchNorm, models.Padded, models.Clicks, Transformer, Turned, Recurrent, ByHand)
FEWER = [kind if kind in FEW else pytest.param(kind, marks=thorough) for kind in KINDS]


@pytest.mark.parametrize("kind", FEWER, ids=lambda kind: kind.__name__)
def test_loss_and_gradients_are_those_of_eager_autocast(kind: type[nn.Module]) -> None:
    model, captured = made(kind)
    given = batch(model, 6)
    ours = graph_loss(model, captured, given)
    mine = gradients(model, ours)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        result = model(**given)
    result = result[0] if isinstance(result, tuple) and isinstance(result[1], dict) else result
    eager = result[0] / result[1].detach() if isinstance(result, tuple) else result
    theirs = gradients(model, eager)
    assert torch.equal(ours, eager)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) and mine[n].dtype == torch.float32 for n in mine)
    full = model(**given)
    full = full[0] if isinstance(full, tuple) and isinstance(full[1], dict) else full
    full = full[0] / full[1] if isinstance(full, tuple) else full
    assert 0 < (full - eager).abs() < 0.02 * full.abs()  # and it does make a difference


@pytest.mark.parametrize("kind", [models.Encoder, models.BatchNorm])
def test_operators_keep_their_names_and_parameters(kind: type[nn.Module]) -> None:
    full, half = made(kind, None)[1].graph, made(kind)[1].graph
    assert [op.name for op in half.operators] == [op.name for op in full.operators]
    assert [op.parameters for op in half.operators] == [op.parameters for op in full.operators]
    assert [op.batch_coupled for op in half.operators] == [op.batch_coupled for op in full.operators]
    assert half.fingerprint() != full.fingerprint()
    for a, b in zip(half.operators, full.operators, strict=True):
        assert sum(t.bytes for t in a.outputs) <= sum(t.bytes for t in b.outputs)


def test_what_crosses_is_half_as_long() -> None:
    full, half = made(models.Chain, None)[1].graph, made(models.Chain)[1].graph
    for pair, tensors in half.edges.items():
        assert [t.dtype for t in tensors] == ["bfloat16"]
        assert 2 * sum(t.bytes for t in tensors) == sum(t.bytes for t in full.edges[pair])


def test_a_cast_is_made_where_fewer_bytes_cross() -> None:
    encoder = made(models.Encoder)[1].graph
    norm = encoder.operators[encoder.index["b.norm1.layer_norm"]]
    assert [t.dtype for t in norm.outputs] == ["float32"]  # the residual needs it so: not in half as well
    padded = made(models.Padded)[1].graph
    last = padded.operators[padded.index["d"]]
    assert [t.dtype for t in last.outputs if t.needs_grad] == ["bfloat16"]  # the loss raises it itself


def test_the_same_graph_without_weights() -> None:
    recorded = build_recorded(Transformer, 1).model
    meta = {key: value.to("meta") for key, value in batch(recorded, 4).items()}
    graph = capture(recorded, meta, seed=5, autocast=BF16).graph
    assert graph.fingerprint() == made(Transformer)[1].graph.fingerprint()


def tower(captured: Captured, size: int) -> tuple[Alone, list[str]]:
    names = [op.name for op in captured.graph.operators if op.name.startswith("branches.name")]
    return alone(captured.traced, names, size, Roots(captured.roots, True), CPU), names


def test_the_stash_holds_no_weights() -> None:
    real: dict[str, int] = {}
    for label, autocast in (("full", None), ("half", BF16)):
        captured = made(Transformer, autocast)[1]
        stage, names = tower(captured, 4)
        count = len(stage.face.parameters)
        given = [torch.zeros_like(v) for v in stage.examples]
        stash = stage.functions.forward(given[:count], [], given[count:-1], given[-1]).stash
        weights = {tuple(v.shape) for v in given[:count] if v.dim() == 2}
        assert not weights & {tuple(v.shape) for v in stash}
        real[label] = sum(v.nbytes for v in stash)
        planned = 4 * sum(op.stash for op in captured.graph.operators if op.name in names)
        assert real[label] <= planned <= 1.15 * real[label]
    assert real["half"] < 0.62 * real["full"]


def test_a_weight_that_is_turned_first_is_no_stash_either() -> None:
    captured = made(Turned)[1]
    names = [op.name for op in captured.graph.operators]
    stage = alone(captured.traced, names, 4, Roots(captured.roots, True), CPU)
    given = [torch.zeros_like(v) for v in stage.examples]
    stash = stage.functions.forward(given[:2], [], given[2:-1], given[-1]).stash
    assert not {(8, 8), (5, 8), (8, 5)} & {tuple(v.shape) for v in stash}
    assert sum(v.nbytes for v in stash) <= 4 * sum(op.stash for op in captured.graph.operators)


def test_weights_are_read_in_half_and_kept_so() -> None:
    full, half = (made(models.Chain, a)[1].graph.operators[0] for a in (None, BF16))
    weights = sum(p.bytes for p in full.parameters)
    assert (full.forward.bytes_per_call, full.buffer_bytes) == (weights, 0)
    assert (half.forward.bytes_per_call, half.buffer_bytes) == (weights / 2, weights / 2)
    assert half.forward.bytes < full.forward.bytes + 2 * 8  # the samples' own cast is all that may be added


def test_weights_are_cast_by_whoever_keeps_them() -> None:
    stage, _ = tower(made(Transformer)[1], 4)
    count = len(stage.face.parameters)
    casts = stage.functions.casts
    matrices = {i for i, v in enumerate(stage.examples[:count]) if v.dim() == 2}
    tables = {i for i, n in enumerate(stage.face.parameters) if "embedding" in n}
    assert {c.position for c in casts} >= matrices - tables and all(c.dtype == torch.bfloat16 for c in casts)
    draw = torch.Generator().manual_seed(0)
    given = [
        torch.randn(v.shape, generator=draw) if v.is_floating_point() else torch.zeros_like(v)
        for v in stage.examples
    ]
    weights, rest, position = given[:count], given[count:-1], given[-1]

    def outputs(parameters: list[Tensor]) -> list[Tensor]:
        return list(stage.functions.forward(parameters, [], rest, position).outputs)

    copies = [cast.of(weights) for cast in casts]
    own, kept = outputs(weights), outputs([*weights, *copies])
    assert all(torch.equal(a, b) for a, b in zip(own, kept, strict=True))
    other = outputs([*weights, *(torch.zeros_like(copy) for copy in copies)])
    assert not torch.equal(other[0], kept[0])  # it is these that are read


def test_what_casts_in_front_cannot_say_runs_under_autocast_itself() -> None:
    model, captured = made(Recurrent)
    under = [n.args[2] for n in captured.traced.train.graph.nodes if n.target is under_autocast]
    assert under == [torch.ops.aten.gru.input]
    verify(model, batch(model, 4), captured)


def test_verify_holds_the_graph_against_the_module_in_full_precision() -> None:
    model, captured = made(Transformer)
    before = str(captured.traced.train.graph)
    verify(model, batch(model, 4), captured)
    assert str(captured.traced.train.graph) == before

    class Hooked(models.Chain):
        def forward(self, x: Tensor, y: Tensor):
            if not torch.compiler.is_exporting():
                x = x * 1.01  # bfloat16's rounding would hide it
            return super().forward(x, y)

    hooked, seen = made(Hooked)
    with pytest.raises(CaptureError, match="does not see"):
        verify(hooked, batch(hooked, 4), seen)


def test_a_module_that_cannot_run_under_autocast_is_named() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.b(torch.lerp(x, self.a(x), 0.5)), y)

    assert made(Strict, None)[1].graph.operators
    with pytest.raises(
        CaptureError, match=r"does not run under autocast to torch.bfloat16: .* precision=fp32"
    ):
        made(Strict)


NEEDS_CUDA = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is not built for CUDA")


@pytest.mark.parametrize(
    "kind",
    [
        models.Chain,
        models.Encoder,
        *(pytest.param(k, marks=NEEDS_CUDA) for k in (models.BatchNorm, Transformer)),
    ],
)
def test_the_rules_of_a_device_that_is_not_here(kind: type[nn.Module]) -> None:
    model, captured = made(kind, Autocast("cuda"))
    graph = captured.traced.train.graph
    assert not any(node.target is under_autocast for node in graph.nodes)
    norms = [n for n in graph.nodes if "layer_norm" in str(n.target)]
    assert all(n.meta["val"].dtype == n.all_input_nodes[0].meta["val"].dtype == torch.float32 for n in norms)
    full = made(kind, None)[1]
    given = batch(model, 6)
    ours = gradients(model, graph_loss(model, captured, given))
    theirs = gradients(model, graph_loss(model, full, given))
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 0.05 * theirs[name].norm() + 1e-3
