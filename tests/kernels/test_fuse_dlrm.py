"""The patterns of recommendation models: look-ups of tables and the pairwise interaction."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from gpp.capture.capture import capture
from gpp.models.dlrm import Dlrm, _dots
from gpp.program.autocast import Autocast
from gpp.program.carve import carve, interface
from gpp.runtime.synthetic import clicks
from kernels.fuse import FuseReport, fuse

SIZES = {"dense": 2, "features": 5, "tables": 3, "rows": 11, "bag": 4}


def stage(pooling: str, interaction: str, autocast: Autocast | None = None) -> fx.GraphModule:
    """A whole model as one stage's forward graph."""
    layers = {"dense_layers": 1, "hidden": 8, "dimension": 4, "top_layers": 1}
    model = Dlrm(**SIZES, **layers, pooling=pooling, interaction=interaction)
    data = clicks(8, **SIZES)
    captured = capture(model, data.read(range(4), data.keys), autocast=autocast)
    operators = [operator.name for operator in captured.graph.operators]
    face = interface(captured.traced.train, operators)
    device = torch.device("cpu")
    return carve(captured.traced.train, operators, 4, face.parameters, face.buffers, device=device)


def operators(report: FuseReport) -> list[str]:
    return [item.operator.split(".")[1] for item in report.fused]


def targets(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_bags_are_one_launch_and_the_interaction_another(pooling: str, precision: str) -> None:
    fused, report = fuse(stage(pooling, "dot", Autocast("cpu") if precision == "bf16" else None))
    found = operators(report)
    assert found.count("embedding_bag") == found.count("interaction") == 1
    (call,) = (node for node in fused.graph.nodes if "interaction" in str(node.target))
    assert call.args[1] == 2, "the rows of the towers are written by the same call"
    left = {
        "aten.embedding_bag.padding_idx",
        "aten.bmm.default",
        "aten.cat.default",
        "aten.arange.start_step",
    }
    assert not left & set(targets(fused)) and "aten.tril_indices.default" not in targets(fused)


def test_bags_side_by_side_are_one_launch_of_bags_of_one() -> None:
    fused, report = fuse(stage("concat", "concat"))
    assert "embedding_bag" in operators(report) and "aten.embedding.default" not in targets(fused)
    call = next(node for node in fused.graph.nodes if "embedding_bag" in str(node.target))
    assert call.meta["val"].shape[0] == 3 and call.meta["val"].shape[2:] == (4, 4)


def same_gradients(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], others: tuple[Tensor, ...] = ()
) -> FuseReport:
    """Trace and fuse a function; its result and every gradient are those of the plain graph."""
    plain = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*leaves, *others)
    assert isinstance(plain, fx.GraphModule)
    fused, report = fuse(plain)
    given = [leaf.clone().requires_grad_() for leaf in leaves]
    expected, got = function(*given, *others), fused(*given, *others)
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, given, dy) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
    return report


def ragged(kind: str) -> Callable[..., Tensor]:
    def bags(a: Tensor, b: Tensor, c: Tensor, i: Tensor, j: Tensor, offsets: Tensor) -> Tensor:
        first = functional.embedding_bag(i, a, offsets, mode=kind)
        second = functional.embedding_bag(j, b, offsets, mode=kind)
        third = functional.embedding_bag(i, a, offsets, mode=kind)  # of a table that is there already
        return torch.cat([first, second + third, functional.embedding_bag(i, c, offsets, mode=kind)], 1)

    return bags


TABLES = (torch.randn(5, 4), torch.randn(7, 4), torch.randn(5, 3))
INDICES = (torch.tensor([4, 0, 0, 2, 1]), torch.tensor([6, 0, 3]))
OFFSETS = torch.tensor([0, 0, 2])


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_ragged_bags_of_one_width_are_one_launch(kind: str) -> None:
    report = same_gradients(ragged(kind), TABLES, (*INDICES, OFFSETS))
    assert operators(report) == ["embedding_bag"] * 3  # a and b; a again; c, which is narrower
    assert [sum("embedding_bag" in name for name in item.nodes) for item in report.fused] == [2, 1, 1]


def test_what_cannot_wait_is_a_launch_of_its_own() -> None:
    def chained(a: Tensor, b: Tensor, c: Tensor, i: Tensor) -> Tensor:
        first = functional.embedding_bag(i, a).relu()
        number = first.argmax(-1, keepdim=True) + i
        return functional.embedding_bag(number, b) * functional.embedding_bag(i, c) + first

    report = same_gradients(chained, (TABLES[0], TABLES[1][:, :4], TABLES[1]), (INDICES[0][None] % 4,))
    # c waits for nobody and goes with a; b needs what is made of a
    assert [item.nodes.count("embedding_bag_2") for item in report.fused] == [1, 0]


def test_what_is_written_in_between() -> None:
    """In-place calls elsewhere are in nobody's way; a result that is written to must be a tensor alone."""

    def look_up(a: Tensor, b: Tensor, x: Tensor, i: Tensor) -> Tensor:
        first = functional.embedding_bag(i, a)
        x = (x + 1).relu_()
        return (
            first
            + functional.embedding_bag(i, b)
            + x
            + functional.embedding_bag(i, a[:, :4]).view(-1).relu_()
        )

    report = same_gradients(look_up, (TABLES[0], TABLES[1], torch.randn(4)), (INDICES[0][None],))
    assert [sum("embedding_bag" in name for name in item.nodes) for item in report.fused] == [2]
    assert [item.reason for item in report.left] == ["what it makes is overwritten later"]

    def moved(a: Tensor, b: Tensor, c: Tensor, i: Tensor) -> Tensor:
        first, j = functional.embedding_bag(i, a), i + 0
        second = functional.embedding_bag(j, b)
        j.remainder_(2)
        return (first + second) * functional.embedding_bag(j, c)

    given = (*TABLES[:2], TABLES[1] + 1, INDICES[0][None])
    fused, report = fuse(make_fx(moved, pre_dispatch=True, tracing_mode="fake")(*given))
    assert ["remainder_ overwrites what it reads" in item.reason for item in report.left] == [True] * 2
    assert operators(report).count("embedding_bag") == 1
    assert torch.equal(fused(*given), moved(*given))


def test_embeddings_of_other_shapes_are_left_alone() -> None:
    def look_up(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return functional.embedding(i, a).sum() + functional.embedding(j, b).sum()

    report = same_gradients(look_up, TABLES[:2], INDICES)
    assert [item.reason for item in report.left] == [
        "no other table is read by alike indices: a single look-up stays with torch"
    ] * 2
    report = same_gradients(look_up, TABLES[:2], (INDICES[0], INDICES[0]))
    assert operators(report) == ["embedding_bag"]


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda a, i, o: functional.embedding_bag(i, a, o, mode="max"), "its bags are neither of sum, mean"),
        (lambda a, i, o: functional.embedding_bag(i, a, o, padding_idx=0), "it has a padding_idx"),
        (lambda a, i, o: functional.embedding(i, a, padding_idx=0), "it has a padding_idx"),
        (lambda a, i, o: functional.embedding(i, a, scale_grad_by_freq=True), "divided by how often a row"),
        (
            lambda a, i, o: functional.embedding_bag(
                i, a, o, mode="sum", per_sample_weights=torch.ones(len(i))
            ),
            "it has a per_sample_weights, the operator none",
        ),
    ],
    ids=["max", "padding", "padding of one", "frequency", "weights"],
)
def test_look_ups_that_do_not_fit_are_left(function: Callable[..., Tensor], reason: str) -> None:
    report = same_gradients(function, TABLES[:1], (INDICES[0], OFFSETS))
    assert not report.fused and [reason in item.reason for item in report.left] == [True]


def by_hand(x: Tensor, *others: Tensor) -> Tensor:
    """The interaction of the model that comes with its paper, and of many that follow it."""
    samples, width = x.shape
    t = torch.cat([x, *others], dim=1).view((samples, -1, width))
    z = torch.bmm(t, torch.transpose(t, 1, 2))
    count = z.shape[1]
    li = torch.tensor([i for i in range(count) for _ in range(i)])
    lj = torch.tensor([j for i in range(count) for j in range(i)])
    return torch.cat([x, z[:, li, lj]], dim=1)


def raised(x: Tensor, *others: Tensor) -> Tensor:
    t = torch.cat([x.unsqueeze(1), torch.stack(others, 1)], dim=1)
    i, j = torch.tril_indices(t.shape[1], t.shape[1], offset=-1)
    return torch.cat([x, torch.matmul(t, t.mT)[:, i, j]], -1)


def products_first(x: Tensor, *others: Tensor) -> Tensor:
    t = torch.stack([x, *others], 1)
    i, j = torch.tril_indices(t.shape[1], t.shape[1], offset=-1)
    return torch.cat([torch.bmm(t, t.permute(0, 2, 1))[:, j, i], x], 1)


@pytest.mark.parametrize(
    "function, dense",
    [(by_hand, 1), (raised, 1), (products_first, 0), (lambda *rows: _dots([*rows[:2]], [*rows[2:]]), 2)],
    ids=["by hand", "raised", "products first", "ours"],
)
def test_interactions_as_they_are_written(function: Callable[..., Tensor], dense: int) -> None:
    class Model(nn.Module):
        def forward(self, *rows: Tensor) -> Tensor:
            return function(*rows)

    rows = tuple(torch.randn(6, 5) for _ in range(4))
    shapes = {"rows": tuple({0: torch.export.Dim("batch")} for _ in rows)}
    plain = torch.export.export(Model(), rows, dynamic_shapes=shapes).module()
    assert isinstance(plain, fx.GraphModule)
    fused, report = fuse(plain)
    assert operators(report) == ["interaction"] and not report.left
    (call,) = (node for node in fused.graph.nodes if "interaction" in str(node.target))
    assert call.args[1] == dense
    given = [torch.randn(9, 5, requires_grad=True) for _ in rows]
    expected, got = plain(*given), fused(*given)
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, given, dy) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


PAIRS = torch.tril_indices(3, 3, -1)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda t, i: torch.bmm(t, t.mT)[:, i[0], i[1]], "which pairs are taken is not known"),
        (
            lambda t, i: torch.bmm(t, t.mT)[:2, [1, 2, 2], [0, 0, 1]],
            "slice_1 reads its products, not an index",
        ),
        (lambda t, i: torch.bmm(t, t.mT)[:, [1, 2], [0, 0]], "are not those below the diagonal, row by row"),
        (lambda t, i: torch.bmm(t, t.mT)[:, [2, 2, 1], [0, 1, 0]], "are not those below the diagonal"),
        (lambda t, i: torch.bmm(t, t.mT)[:, [1, 2]], "takes no pairs of all samples"),
        (lambda t, i: (z := torch.bmm(t, t.mT)) + z[:, i[0], i[1]].sum(), "2 nodes read its products"),
    ],
    ids=["argument", "some samples", "fewer", "in another order", "no pairs", "two readers"],
)
def test_products_that_are_no_interaction_are_left(function: Callable[..., Tensor], reason: str) -> None:
    report = same_gradients(function, (torch.randn(4, 3, 5),), (PAIRS,))
    assert not report.fused and [reason in item.reason for item in report.left] == [True], report


def test_other_products_are_not_in_the_report() -> None:
    report = same_gradients(lambda t: torch.bmm(t, t.flip(0).mT), (torch.randn(4, 3, 5),))
    assert not report.fused and not report.left
