"""Weight halves whose products add to the sums themselves."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gpp.api.start import pipeline
from gpp.program.build import Hooks
from kernels.fuse import fuse
from kernels.in_place import accumulate
from tests.thorough import thorough

aten = torch.ops.aten
ADD = torch.ops.gpp_kernels.linear_accumulate_weight.default


class Shared(nn.Module):
    """One layer is used twice, one has no bias, one weight is not transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8, bias=False), nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.b(functional.gelu(self.a(x))) + functional.gelu(self.a(x.flip(1)))
        return functional.mse_loss((h @ self.c)[:, -1].float(), y)


class Tables(nn.Module):
    """Bags of two tables, a large table, a small one, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, 3, mode="sum") for rows in (9, 20))
        self.large, self.small = nn.Embedding(2**20 // 3 + 1, 3), nn.Embedding(9, 3)

    def forward(self, i: Tensor, y: Tensor) -> Tensor:
        bags = [bag(i) for bag in self.bags] + [self.bags[0](i.flip(1))]
        h = sum(bags) + self.large(i).mean(1) * self.small(i[:, :3]).sum(1)
        return functional.mse_loss(h, y)


class Joined(nn.Module):
    """Two branches, joined by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(14, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.cat([functional.gelu(self.a(x)), self.b(x)], dim=-1)
        return functional.mse_loss(functional.relu(self.top(h))[:, -1].float(), y)


BATCHES = {
    Joined: lambda: {"x": torch.randn(8, 5, 4), "y": torch.randn(8, 3)},
    Shared: lambda: {"x": torch.randn(8, 5, 4), "y": torch.randn(8, 3)},
    Tables: lambda: {"i": torch.randint(9, (8, 4)), "y": torch.randn(8, 3)},
}


def trained(
    hooks: Hooks, precision: str, seen: list[fx.GraphModule], kind: type[nn.Module] = Shared
) -> dict[str, Tensor]:
    """The weights after some steps of two micro-batches; `seen` gets the weight halves that have run."""

    def watched(module: fx.GraphModule) -> fx.GraphModule:
        seen.append(hooks.backward(module))
        return seen[-1]

    torch.manual_seed(0)
    model, batch = kind(), BATCHES[kind]()
    with pipeline(
        model,
        batch,
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        mini_batch=8,
        micro_batch=4,
        devices=1,
        device="cpu",
        precision=precision,
        hooks=Hooks(fuse=hooks.fuse, backward=watched),
    ) as pipe:
        for _ in range(3):
            pipe.step(batch)
        return pipe.state_dict()


def count(graphs: list[fx.GraphModule], target: object) -> int:
    return sum(node.target == target for node in graphs[-1].graph.nodes)


BOUNDS = [("fp32", 1e-6), ("bf16", 1e-2)]
FEWER = [BOUNDS[0], pytest.param(*BOUNDS[1], marks=thorough)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("precision", "bound"), BOUNDS)
def test_sums_are_those_of_products_then_additions(precision: str, bound: float, fused: bool) -> None:
    plain: list[fx.GraphModule] = []
    rewritten: list[fx.GraphModule] = []
    first = Hooks(fuse=lambda module: fuse(module)[0]) if fused else Hooks()
    expected = trained(first, precision, plain)
    found = trained(Hooks(fuse=first.fuse, backward=accumulate), precision, rewritten)
    assert count(plain, aten.add_.Tensor) == 4 and count(plain, ADD) == 0
    # a twice, b and c; of a's bias both uses are left
    assert count(rewritten, ADD) == 4 and count(rewritten, aten.add_.Tensor) == 2
    for name, value in expected.items():
        assert (found[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize(("precision", "bound"), FEWER)
def test_a_join_adds_to_the_columns_of_its_parts(precision: str, bound: float) -> None:
    rewritten: list[fx.GraphModule] = []
    expected = trained(Hooks(), precision, [], Joined)
    found = trained(
        Hooks(fuse=lambda module: fuse(module)[0], backward=accumulate), precision, rewritten, Joined
    )
    join = torch.ops.gpp_kernels.join_linear_accumulate_weight.default
    assert count(rewritten, join) == 1 and count(rewritten, ADD) == 2
    for name, value in expected.items():
        assert (found[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize(("precision", "bound"), FEWER)
def test_only_rows_that_occur_are_added(precision: str, bound: float) -> None:
    plain: list[fx.GraphModule] = []
    rewritten: list[fx.GraphModule] = []
    fused = Hooks(fuse=lambda module: fuse(module)[0], backward=accumulate)
    expected = trained(Hooks(), precision, plain, Tables)
    found = trained(fused, precision, rewritten, Tables)
    tables = torch.ops.gpp_kernels.embedding_bag_accumulate_weight.default
    # the bags of two tables, those of the first again, and the large table; of the small one all is added
    assert count(plain, aten.add_.Tensor) == 4 and count(rewritten, aten.add_.Tensor) == 1
    assert count(rewritten, tables) == 3
    for name, value in expected.items():
        assert (found[name] - value).norm() <= bound * value.norm(), name


def graph_of(*lines: tuple[object, ...], arguments: int) -> fx.GraphModule:
    """A graph of calls; a number among their arguments is a placeholder, a negative one a call before."""
    graph = fx.Graph()
    given = [graph.placeholder(f"a{i}") for i in range(arguments)]
    made: list[fx.Node] = []
    for target, *numbers in lines:
        made.append(graph.call_function(target, tuple((given if n >= 0 else made)[n] for n in numbers)))
        made[-1].meta["val"] = torch.empty(3, 3, dtype=torch.bfloat16)
    graph.output(())
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    "lines",
    [
        ((aten.mm.default, 1, 2), (aten.add_.Tensor, 0, -1)),  # a sum of bfloat16 stays one
        ((aten.mm.default, 1, 2), (aten.relu.default, -1), (aten.add_.Tensor, 0, -1)),
        ((aten.mm.default, 1, 2), (aten.relu.default, 0), (aten.add_.Tensor, 0, -2), (aten.neg.default, -3)),
    ],
)
def test_what_is_left(lines: tuple[tuple[object, ...], ...]) -> None:
    before = str(graph_of(*lines, arguments=3).graph)
    assert str(accumulate(graph_of(*lines, arguments=3)).graph) == before


def test_a_sum_of_two_gradients_is_split_only_where_that_is_the_same() -> None:
    """Not where another reads it, nor where one of the two is stretched."""

    def given(*, read: bool, rows: int) -> fx.GraphModule:
        graph = fx.Graph()
        total, x, other = (graph.placeholder(name) for name in ("total", "x", "other"))
        product = graph.call_function(aten.mm.default, (x, x))
        both = graph.call_function(aten.add.Tensor, (product, other))
        graph.call_function(aten.add_.Tensor, (total, both))
        for node, shape in ((total, (3, 3)), (x, (3, 3)), (product, (3, 3)), (both, (3, 3))):
            node.meta["val"] = torch.empty(shape)
        other.meta["val"] = torch.empty(rows, 3)
        graph.output((both,) if read else ())
        return fx.GraphModule(nn.Module(), graph)

    assert count([accumulate(given(read=False, rows=3))], ADD) == 1
    for read, rows in ((True, 3), (False, 1)):
        before = str(given(read=read, rows=rows).graph)
        assert str(accumulate(given(read=read, rows=rows)).graph) == before
