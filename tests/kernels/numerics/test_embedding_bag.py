from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.embedding_bag import embedding_bag
from kernels.embedding_bag_gradient import (
    embedding_bag_accumulate_weight,
    embedding_bag_backward_sparse,
    embedding_bag_backward_weight,
)
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch

functional = torch.nn.functional
MODES = ("sum", "mean")


def torchs(
    weights: Sequence[Tensor], indices: Sequence[Tensor], offsets: Sequence[Tensor], mode: str, last: bool
) -> Tensor:
    if offsets:
        rows = zip(indices, weights, offsets, strict=True)
        return torch.stack(
            [functional.embedding_bag(i, w, o, mode=mode, include_last_offset=last) for i, w, o in rows]
        )
    leading = indices[0].shape[:-1]
    flat = [index.reshape(-1, index.shape[-1]) for index in indices]
    bags = [functional.embedding_bag(i, w, mode=mode) for i, w in zip(flat, weights, strict=True)]
    return torch.stack([bag.view(*leading, weights[0].shape[1]) for bag in bags])


def tables(*rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(r, width, generator=generator).to(device, dtype) for r in rows]


def draw(weights: Sequence[Tensor], *shape: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, w.shape[0], shape, generator=generator).to(w.device) for w in weights]


def assert_right(
    weights: list[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    mode: str = "sum",
    last: bool = False,
) -> None:
    leading = (offsets[0].shape[0] - last,) if offsets else indices[0].shape[:-1]
    dy = torch.randn(len(weights), *leading, weights[0].shape[1], generator=torch.Generator().manual_seed(2))
    assert_as_good_as_torch(
        lambda *w: embedding_bag(w, indices, offsets, mode, last, False),
        lambda *w: torchs(w, indices, offsets, mode, last),
        weights,
        dy.to(weights[0].device, weights[0].dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_ragged_bags_of_three_tables(mode: str, dtype: torch.dtype, device: str) -> None:
    weights = tables(30, 1, 7, width=12, dtype=dtype, device=device)
    indices = [index[: 20 + 3 * place] for place, index in enumerate(draw(weights, 26))]
    offsets = [
        torch.tensor(o, device=device) for o in ([0, 0, 2, 17, 20], [0, 1, 1, 1, 5], [0, 9, 9, 10, 26])
    ]
    if dtype == torch.float16:
        ends = [index.numel() for index in indices]
        whole = [torch.cat([o, o.new_tensor([e])]) for o, e in zip(offsets, ends, strict=True)]
        assert_right(weights, indices, whole, mode, last=True)
    else:
        assert_right(weights, indices, offsets, mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_bags_of_one_size(mode: str, dtype: torch.dtype, device: str) -> None:
    weights = tables(5, 40, width=9, dtype=dtype, device=device)
    assert_right(weights, draw(weights, 2, 3, 5), [], mode)
    assert_right(weights[1:], draw(weights[1:], 11, 1), [], mode)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=2), min_size=1, max_size=5),
    rows=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    width=st.integers(1, 20),
    mode=st.sampled_from(MODES),
    small=st.booleans(),
)
def test_any_bags(
    lengths: list[list[int]], rows: list[int], width: int, mode: str, small: bool, device: str
) -> None:
    dtype = torch.int32 if small else torch.int64
    weights = tables(*rows, width=width, dtype=torch.float32, device=device)
    counts = torch.tensor(lengths).T
    ends = functional.pad(counts.cumsum(1), (1, 0)).to(device, dtype)
    indices = [draw([w], int(c.sum()))[0].to(dtype) for w, c in zip(weights, counts, strict=True)]
    assert_right(weights, indices, list(ends), mode, last=True)


def test_a_row_of_many_chunks(device: str) -> None:
    weights = tables(3, 2, width=2, dtype=torch.float32, device=device)
    indices = [torch.zeros(size, dtype=torch.int64, device=device) for size in (330, 140)]
    indices[0][5:14], indices[0][300:320], indices[1][:] = 2, 1, 1
    offsets = [torch.arange(0, 140, 20, device=device) for _ in weights]
    assert_right(weights, indices, offsets, "mean")
    dy = torch.ones(2, 7, 2, device=device)
    exact = embedding_bag_backward_weight(dy, indices, offsets, [3, 2], "sum", False)
    assert [g[:, 0].tolist() for g in exact] == [[301.0, 20.0, 9.0], [0.0, 140.0]]
    row, value = embedding_bag_backward_sparse(dy, indices, offsets, [3, 2], "sum", False)
    assert row.tolist() == [0] * 301 + [1] * 20 + [2] * 9 + [1] * 140
    assert value[:, 1].nonzero().flatten().tolist() == [0, 301, 321, 330]
    assert value[[0, 301, 321, 330], 1].tolist() == [301.0, 20.0, 9.0, 140.0]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(st.integers(0, 40), min_size=1, max_size=4), width=st.sampled_from((3, 20)))
def test_runs_across_chunks(runs: list[int], width: int, device: str) -> None:
    numbers = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))].to(device)
    dy = torch.randint(-99, 99, (1, len(numbers), width), device=device).float()
    arguments = (dy, [shuffled[:, None]], [], [len(runs)], "sum", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.bag_sums.CHUNK", 8)
        (dense,) = embedding_bag_backward_weight(*arguments)
        row, value = embedding_bag_backward_sparse(*arguments)
    exact = dy.new_zeros(len(runs), width).index_add_(0, shuffled, dy[0])
    assert torch.equal(dense, exact) and torch.equal(row.cpu(), numbers)
    first = functional.pad(torch.tensor(runs).cumsum(0), (1, 0))[:-1]
    sums = torch.zeros_like(value)
    for place, count, total in zip(first.tolist(), runs, exact, strict=True):
        if count:
            sums[place] = total
    assert torch.equal(value, sums)


@pytest.mark.parametrize("mode", MODES)
def test_sparse_and_accumulated_gradients_are_the_dense_ones(mode: str, device: str) -> None:
    weights = tables(6, 4, width=10, dtype=torch.bfloat16, device=device)
    indices, offsets = draw(weights, 14), [torch.tensor([0, 3, 3, 12], device=device)] * 2
    dy = torch.randn(2, 4, 10, device=device).bfloat16()
    dense = embedding_bag_backward_weight(dy, indices, offsets, [6, 4], mode, False)
    leaves = [w.clone().requires_grad_() for w in weights]
    sparse = torch.autograd.grad(embedding_bag(leaves, indices, offsets, mode, False, True), leaves, dy)
    assert all(torch.equal(s.to_dense(), d) for s, d in zip(sparse, dense, strict=True))
    sums = [torch.full(w.shape, 3.0, device=device) for w in weights]
    embedding_bag_accumulate_weight(sums, dy, indices, offsets, mode, False)
    wide = embedding_bag_backward_weight(dy.float(), indices, offsets, [6, 4], mode, False)
    assert all(torch.equal(s, 3.0 + w) for s, w in zip(sums, wide, strict=True))


def test_strides(device: str) -> None:
    base = torch.randn(12, 3, 16, device=device)
    for table in (base[::2, 1], base[:, 0, 3:9], base[:, 0].t(), base[:1, 0].expand(5, 16)):
        assert_right([table, table.clone()], draw([table, table], 4, 6), [])
    weights = tables(5, 6, width=8, dtype=torch.float32, device=device)
    indices = [index.t()[::2] for index in draw(weights, 3, 6)]
    assert_right(weights, indices, [])
    assert_right(weights, [index[:1].expand(4, 3) for index in indices], [])
    offsets = [torch.arange(0, 12, device=device)[::4]] * 2
    flat = [index[::2] for index in draw(weights, 24)]
    assert_right(weights, flat, offsets)
    leaves = [w.requires_grad_() for w in weights]
    y = embedding_bag(leaves, flat, offsets, "mean", False, False)
    dy = torch.randn(8, 3, 2, device=device).permute(2, 1, 0)
    for gradient in (dy, dy[:1, :1, :1].expand(y.shape), dy.contiguous()[..., :1].expand(y.shape)):
        got = torch.autograd.grad(y, leaves, gradient, retain_graph=True)
        plain = torchs(leaves, flat, offsets, "mean", False)
        expected = torch.autograd.grad(plain, leaves, gradient.contiguous())
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_nothing_to_sum(device: str) -> None:
    weights = [w.requires_grad_() for w in tables(4, 3, width=6, dtype=torch.float32, device=device)]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for indices, offsets, shape in (
        ([none, none], [none, none], (2, 0, 6)),
        ([none, none], [none.new_zeros(3)] * 2, (2, 3, 6)),
        ([none.view(0, 5)] * 2, [], (2, 0, 6)),
        ([none.view(3, 0)] * 2, [], (2, 3, 6)),
    ):
        y = embedding_bag(weights, indices, offsets, "mean", False, False)
        gradients = torch.autograd.grad(y.sum(), weights)
        assert torch.equal(y, torch.zeros(shape, device=device))
        assert all(torch.equal(g, torch.zeros_like(w)) for g, w in zip(gradients, weights, strict=True))


def test_more_tables_than_a_launch_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.embedding_bag.GROUP", 2)
    monkeypatch.setattr("kernels.bag_sums.GROUP", 2)
    weights = tables(3, 1, 5, 2, 4, width=3, dtype=torch.float32, device=device)
    assert_right(weights, draw(weights, 2, 3), [], "mean")
    indices, dy = draw(weights, 2, 3), torch.randn(5, 2, 3, device=device)
    rows = [w.shape[0] for w in weights]
    row, value = embedding_bag_backward_sparse(dy, indices, [], rows, "sum", False)
    dense = embedding_bag_backward_weight(dy, indices, [], rows, "sum", False)
    for r, v, d in zip(row.split(6), value.split(6), dense, strict=True):
        assert torch.equal(torch.zeros_like(d).index_add_(0, r, v), d)


def test_only_the_tables_that_want_a_gradient_get_one(device: str) -> None:
    weights = tables(4, 5, 6, width=3, dtype=torch.float32, device=device)
    indices = draw(weights, 2, 3)
    leaves = [weights[0].clone().requires_grad_(), weights[1], weights[2].clone().requires_grad_()]
    y = embedding_bag(leaves, indices, [], "sum", False, False)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [leaves[0], leaves[2]], dy)
    dense = embedding_bag_backward_weight(dy, indices, [], [4, 5, 6], "sum", False)
    assert torch.equal(got[0], dense[0]) and torch.equal(got[1], dense[2])


def test_a_wrong_row_number_spoils_its_bag_alone(device: str) -> None:
    (table,) = weights = tables(4, width=3, dtype=torch.float32, device=device)
    indices = [torch.tensor([[0, 1], [4, 1], [2, -1], [3, 3]], device=device)]
    y = embedding_bag(weights, indices, [], "sum", False, False)[0]
    assert y[1].isnan().all() and y[2].isnan().all()
    assert torch.equal(y[0], table[0] + table[1]) and torch.equal(y[3], 2 * table[3])
    dy = torch.ones(1, 4, 3, device=device)
    (gradient,) = embedding_bag_backward_weight(dy, indices, [], [4], "sum", False)
    assert gradient[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0]
    row, value = embedding_bag_backward_sparse(dy, indices, [], [4], "sum", False)
    assert row.tolist() == [0, 1, 1, 2, 3, 3, 0, 0]
    assert value[:, 0].tolist() == [1.0, 2.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0]


def test_row_numbers_outside_all_bags_have_no_gradient(device: str) -> None:
    weights = tables(4, width=3, dtype=torch.float32, device=device)
    indices = [torch.tensor([0, 1, 2, 3, 3], device=device)]
    offsets = [torch.tensor([1, 3, 4], device=device)]
    y = embedding_bag(weights, indices, offsets, "sum", True, False)
    torch.testing.assert_close(y[0], torch.stack([weights[0][1] + weights[0][2], weights[0][3]]))
    (gradient,) = embedding_bag_backward_weight(torch.ones_like(y), indices, offsets, [4], "sum", True)
    assert gradient[:, 0].tolist() == [0.0, 1.0, 1.0, 1.0]


def test_bags_do_not_depend_on_how_many_there_are(device: str) -> None:
    weights = tables(50, 9, width=33, dtype=torch.float32, device=device)
    indices = draw(weights, 10, 19)
    whole = embedding_bag(weights, indices, [], "mean", False, False)
    for size in (3, 8):
        parts = [
            embedding_bag(weights, pair, [], "mean", False, False)
            for pair in zip(*(index.split(size) for index in indices), strict=True)
        ]
        assert torch.equal(torch.cat(parts, dim=1), whole)
