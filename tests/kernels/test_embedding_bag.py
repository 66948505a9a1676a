"""Embedding bags as torch sees them; on CPU, so by their references."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.embedding_bag import embedding_bag
from kernels.embedding_bag_gradient import (
    embedding_bag_accumulate_weight,
    embedding_bag_backward_sparse,
    embedding_bag_backward_weight,
)

functional = torch.nn.functional
MODES = ("sum", "mean")
INDICES = [torch.tensor([[0, 1], [4, 1], [2, 2]]), torch.tensor([[1, 1], [0, 1], [0, 0]])]
RAGGED = [torch.tensor([0, 4, 1, 1, 2, 0]), torch.tensor([1, 0, 0])]
OFFSETS = [torch.tensor([0, 2, 2]), torch.tensor([0, 0, 1])]
BAGS = [(INDICES, []), (RAGGED, OFFSETS)]


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(r, 4, generator=generator).to(dtype).requires_grad_() for r in (5, 2)]


def plain(
    weights: Sequence[Tensor], indices: Sequence[Tensor], offsets: Sequence[Tensor], mode: str
) -> Tensor:
    starts = offsets or [None] * len(weights)
    return torch.stack(
        [
            functional.embedding_bag(i, w, o, mode=mode)
            for i, w, o in zip(indices, weights, starts, strict=True)
        ]
    )


@pytest.mark.parametrize("indices, offsets", BAGS, ids=["one size", "ragged"])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode: str, indices: list[Tensor], offsets: list[Tensor]) -> None:
    torch.library.opcheck(embedding_bag, (leaves(), indices, offsets, mode, False, False))
    dy = torch.randn(2, 3, 4)
    for operator in (embedding_bag_backward_weight, embedding_bag_backward_sparse):
        torch.library.opcheck(operator, (dy, indices, offsets, [5, 2], mode, False))
    sums = [torch.zeros(5, 4), torch.zeros(2, 4)]
    torch.library.opcheck(embedding_bag_accumulate_weight, (sums, dy, indices, offsets, mode, False))


@pytest.mark.parametrize("indices, offsets", BAGS, ids=["one size", "ragged"])
@pytest.mark.parametrize("mode", MODES)
def test_on_cpu_it_has_the_bits_of_torch(mode: str, indices: list[Tensor], offsets: list[Tensor]) -> None:
    weights, dy = leaves(), torch.randn(2, 3, 4)
    ours, theirs = (
        embedding_bag(weights, indices, offsets, mode, False, False),
        plain(weights, indices, offsets, mode),
    )
    assert torch.equal(ours, theirs)
    expected = torch.autograd.grad(theirs, weights, dy)
    got = torch.autograd.grad(ours, weights, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    sums = [torch.ones_like(w) for w in weights]
    embedding_bag_accumulate_weight(sums, dy, indices, offsets, mode, False)
    assert all(torch.equal(s, 1 + g) for s, g in zip(sums, expected, strict=True))
    sparse = torch.autograd.grad(embedding_bag(weights, indices, offsets, mode, False, True), weights, dy)
    for a, b in zip(sparse, expected, strict=True):
        assert a.is_sparse
        torch.testing.assert_close(a.to_dense(), b)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_by_finite_differences(mode: str) -> None:
    weights = leaves(torch.float64)
    for indices, offsets in BAGS:
        assert torch.autograd.gradcheck(
            lambda *w, i=indices, o=offsets: embedding_bag(w, i, o, mode, False, False), weights
        )


def test_sixteen_bit_sums_are_float32() -> None:
    table = torch.full((1, 2), 0.1, dtype=torch.bfloat16).requires_grad_()
    indices = [torch.zeros(1, 4096, dtype=torch.int64)]
    y = embedding_bag([table], indices, [], "sum", False, False)
    assert torch.equal(y[0], (table.double() * 4096).to(torch.bfloat16))
    many = embedding_bag([table], [indices[0].t()], [], "sum", False, False)
    (gradient,) = torch.autograd.grad(many, table, torch.full_like(many, 0.1))
    assert torch.equal(gradient, (table.double() * 4096).to(torch.bfloat16))


def test_bags_of_one_are_an_embedding() -> None:
    weights = leaves()
    rows = [index[..., None] for index in INDICES]
    y = embedding_bag(weights, rows, [], "sum", False, False)
    expected = [functional.embedding(i, w) for i, w in zip(INDICES, weights, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))


class Model(nn.Module):
    """Two tables by the operator, and what it stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, 4, mode="mean") for rows in (5, 2))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        weights = [bag.weight for bag in self.bags]
        y = torch.ops.gpp_kernels.embedding_bag(weights, [first, second], [], "mean", False, False)
        return torch.cat(y.unbind(0), dim=-1)

    def unfused(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([self.bags[0](first), self.bags[1](second)], dim=-1)


def test_export_with_a_dynamic_number_of_samples() -> None:
    model, samples = Model(), {0: torch.export.Dim("samples")}
    program = torch.export.export(model, tuple(INDICES), dynamic_shapes={"first": samples, "second": samples})
    inputs = [torch.cat([index, index]) for index in INDICES]
    assert torch.equal(program.module()(*inputs), model.unfused(*inputs))
    assert torch.equal(program.run_decompositions().module()(*inputs), model.unfused(*inputs))


def test_export_with_ragged_bags() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 4))

        def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
            return torch.ops.gpp_kernels.embedding_bag([self.table], [rows], [offsets], "sum", True, False)

    model = Ragged()
    shapes = {"rows": {0: torch.export.Dim("places")}, "offsets": {0: torch.export.Dim("ends", min=3)}}
    inputs = (torch.tensor([0, 4, 1, 1]), torch.tensor([0, 2, 4]))
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    longer = (torch.tensor([0, 4, 1, 1, 3, 2]), torch.tensor([0, 2, 4, 4, 6]))
    assert torch.equal(program.module()(*longer), model(*longer))


def test_compile_in_one_graph() -> None:
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    weights = list(model.parameters())
    got = torch.autograd.grad(compiled(*INDICES).square().sum(), weights)
    expected = torch.autograd.grad(model.unfused(*INDICES).square().sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def targets(module: torch.fx.GraphModule) -> list[str]:
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    return [name.removeprefix("gpp_kernels.").removesuffix(".default") for name in names if "gpp_k" in name]


def test_the_gradient_is_an_operator_of_its_own_that_does_not_read_the_tables() -> None:
    def step(dy: Tensor, *weights: Tensor) -> list[Tensor]:
        tables = [w.detach().requires_grad_() for w in weights]
        y = embedding_bag(tables, INDICES, [], "sum", False, False)
        return [y, *torch.autograd.grad(y, tables, dy)]

    traced = make_fx(step)(torch.randn(2, 3, 4), *(w.detach() for w in leaves()))
    assert targets(traced) == ["embedding_bag", "embedding_bag_backward_weight"]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        embedding_bag(leaves(), RAGGED, OFFSETS, "sum", False, False)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (*RAGGED, *OFFSETS)]


def test_shapes_are_known_without_data() -> None:
    weights = [w.detach().to("meta").requires_grad_() for w in leaves(torch.bfloat16)]
    y = embedding_bag(weights, [i.to("meta") for i in INDICES], [], "sum", False, False)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 4), torch.bfloat16, "meta")
    y.sum().backward()
    assert all(w.grad is not None and w.grad.shape == w.shape for w in weights)
    with FakeTensorMode():
        table, rows = torch.empty(9, 4, device="cuda"), torch.zeros(6, dtype=torch.int32, device="cuda")
        ends = torch.zeros(3, dtype=torch.int32, device="cuda")
        y = embedding_bag([table], [rows], [ends], "mean", True, False)
        (gradient,) = embedding_bag_backward_weight(y, [rows], [ends], [9], "mean", True)
        row, value = embedding_bag_backward_sparse(y, [rows], [ends], [9], "mean", True)
        embedding_bag_accumulate_weight([gradient], y, [rows], [ends], "mean", True)
        assert (y.shape, gradient.shape, gradient.device.type) == ((1, 2, 4), (9, 4), "cuda")
        assert (row.shape, row.dtype, value.shape) == ((6,), torch.int64, (6, 4))


def bag(*arguments: object) -> Callable[[], object]:
    return lambda: embedding_bag(*arguments)


W, DY = [w.detach() for w in leaves()], torch.randn(2, 3, 4)
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (bag(W, INDICES, [], "max", False, False), ValueError, "pooling must be one of sum, mean, it is 'max'"),
    (
        bag([], INDICES, [], "sum", False, False),
        ValueError,
        "embedding_bag: weights must have at least one table",
    ),
    (bag(W, INDICES[:1], [], "sum", False, False), ValueError, "indices must have one tensor a table, 2"),
    (bag(W, RAGGED, OFFSETS[:1], "sum", False, False), ValueError, "offsets must have no tensor or one a"),
    (bag(W, RAGGED, [], "sum", False, False), ValueError, r"indices\[1\] must have the shape of.*\(3,\)"),
    (bag(W, INDICES, OFFSETS, "sum", False, False), ValueError, r"indices\[0\] must have one dimension"),
    (bag([W[0], W[1][0]], INDICES, [], "sum", False, False), ValueError, r"weights\[1\] must have two"),
    (bag([W[0], W[1][:0]], INDICES, [], "sum", False, False), ValueError, "must have at least one row"),
    (bag([W[0], W[1][:, :3]], INDICES, [], "sum", False, False), ValueError, "must have 4 columns like"),
    (bag([W[0], W[1].half()], INDICES, [], "sum", False, False), TypeError, "must be torch.float32, it is"),
    (
        bag(W, [INDICES[0].float(), INDICES[1]], [], "sum", False, False),
        TypeError,
        r"indices\[0\] must be torch.int64 or torch.int32, it is torch.float32",
    ),
    (bag(W, [INDICES[0], INDICES[1].int()], [], "sum", False, False), TypeError, r"indices\[1\] must be"),
    (
        bag(W, [i.to("meta") for i in INDICES], [], "sum", False, False),
        ValueError,
        r"indices\[0\] must be on cpu like the tables, it is meta",
    ),
    (
        bag(W, RAGGED, [OFFSETS[0], OFFSETS[1][:2]], "sum", False, False),
        ValueError,
        r"offsets\[1\] must have 3 entries like offsets\[0\], it is \(2,\)",
    ),
    (
        bag(W, RAGGED, [o[:0] for o in OFFSETS], "sum", True, False),
        ValueError,
        r"offsets\[0\] must have the end of the last bag",
    ),
    (
        lambda: embedding_bag_backward_weight(DY[:, :2], INDICES, [], [5, 2], "sum", False),
        ValueError,
        r"embedding_bag_backward_weight: dy must have shape \(2, 3\) and",
    ),
    (
        lambda: embedding_bag_backward_weight(DY, INDICES, [], [4, 2], "sum", False),
        IndexError,
        r"indices\[0\] must be rows of a table of 4, they are from 0 to 4",
    ),
    (
        lambda: embedding_bag_accumulate_weight([W[0], W[1][:, :3]], DY, INDICES, [], "sum", False),
        ValueError,
        r"gradients\[1\] must be \[rows, 4\]",
    ),
    (
        lambda: embedding_bag_accumulate_weight([W[0].half(), W[1]], DY, INDICES, [], "sum", False),
        TypeError,
        r"gradients\[0\] must be torch.float32",
    ),
    (
        lambda: embedding_bag_accumulate_weight([torch.zeros(4, 5).t(), W[1]], DY, INDICES, [], "sum", False),
        ValueError,
        r"gradients\[0\] must be contiguous",
    ),
]


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
