from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpp.program.random import key_of, keyed_attention, keyed_bits, threshold
from kernels.attention import attention
from kernels.attention_tiles import configuration
from kernels.launch import INTERPRETED
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch

functional = torch.nn.functional
DEVICE = "cpu" if INTERPRETED else "cuda"
NODE = key_of(0, "attention")
ops = torch.ops.gpp_kernels


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(
    samples: int,
    heads: int,
    queries: int,
    keys: int,
    head: int,
    dtype: torch.dtype = torch.float32,
    shared: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(query, key, value), dy."""
    of_keys = (samples, heads if shared is None else shared, keys, head)
    query = draw(samples, heads, queries, head, dtype=dtype)
    triple = query, draw(*of_keys, dtype=dtype, seed=1), draw(*of_keys, dtype=dtype, seed=2)
    return triple, draw(*query.shape, dtype=dtype, seed=3)


def fused(
    mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, mask, None, 0, 0, 0.0, causal, scale)


def torchs(
    mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Callable[..., Tensor]:
    """Torch's own, with its weights written out: the others have other gradients beside lowest numbers."""

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        added = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        with sdpa_kernel(SDPBackend.MATH):
            return functional.scaled_dot_product_attention(
                q, k, v, added, 0.0, causal, scale=scale, enable_gqa=True
            )

    return written_out


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("head, causal", [(32, True), (64, False), (128, True), (20, False)])
def test_head_sizes(dtype: torch.dtype, head: int, causal: bool) -> None:
    triple, dy = inputs(1, 2, 40, 50, head, dtype)
    assert_as_good_as_torch(fused(causal=causal), torchs(causal=causal), triple, dy)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 2),
    shared=st.integers(1, 2),
    group=st.integers(1, 2),
    queries=st.integers(8, 70),
    keys=st.integers(8, 70),
    head=st.integers(1, 33),
    causal=st.booleans(),
)
def test_shapes(
    samples: int, shared: int, group: int, queries: int, keys: int, head: int, causal: bool
) -> None:
    triple, dy = inputs(samples, shared * group, queries, keys, head, shared=shared)
    assert_as_good_as_torch(fused(causal=causal, scale=0.3), torchs(causal=causal, scale=0.3), triple, dy)


@pytest.mark.parametrize("keys", [1, 9])
def test_a_query_of_one_key_gets_its_value(keys: int) -> None:
    leaves = [t.requires_grad_() for t in inputs(2, 2, 1, keys, 20)[0]]
    y = fused(causal=True)(*leaves)
    dy = draw(*y.shape, seed=3)
    dq, dk, dv = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(y, leaves[2][:, :, :1]) and torch.equal(dv[:, :, :1], dy)
    assert (
        max(t.abs().max().item() for t in (dq, dk, dv[:, :, 1:]) if t.numel()) < 1e-5
    )  # zero but for rounding


@pytest.mark.parametrize("causal", [False, True])
def test_the_tiles_of_hopper(causal: bool) -> None:
    tiles = [configuration(kind, 64, torch.bfloat16, False) for kind in ("forward", "query", "key_value")]
    assert [(tile.own, tile.step) for tile in tiles] == [(128, 64), (128, 32), (128, 32)]
    triple, dy = inputs(1, 1, 200, 210, 64, torch.bfloat16)
    assert_as_good_as_torch(fused(causal=causal), torchs(causal=causal), triple, dy)


def lowest(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, device=DEVICE).masked_fill(draw(*shape) > 0, torch.finfo(torch.float32).min)


MASKS = {
    "padding": lambda: draw(2, 1, 1, 40) > -0.5,
    "of each query": lambda: draw(2, 1, 36, 40) > 0,
    "of all samples": lambda: draw(36, 40) > 0,
    "of heads": lambda: (draw(40, 2) > 0).t()[None, :, None, :],
    "stretched": lambda: (draw(2, 1, 36, 1) > 0).expand(2, 2, 36, 40),
    "added": lambda: draw(1, 2, 36, 40),
    "added padding": lambda: torch.zeros(2, 1, 1, 40, device=DEVICE).masked_fill(
        draw(2, 1, 1, 40) > 0, -torch.inf
    ),
    "lowest": lambda: lowest((2, 1, 36, 40)),
    "nothing": lambda: torch.zeros(2, 1, 1, 40, dtype=torch.bool, device=DEVICE),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    mask = MASKS[name]()
    if name in ("of each query", "lowest"):
        mask[0, 0, 3] = mask.flatten()[mask.flatten().to(torch.float32).argmin()]  # no key is left for it
    triple, dy = inputs(2, 2, 36, 40, 16)
    assert_as_good_as_torch(fused(mask), torchs(mask), triple, dy)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=DTYPE_NAMES[1:])
def test_half_precision_masks(dtype: torch.dtype) -> None:
    triple, dy = inputs(1, 2, 36, 70, 32, dtype)
    for mask in (draw(1, 1, 36, 70, dtype=dtype), draw(1, 1, 1, 70) > 0, draw(2, 36, 70)):
        assert_as_good_as_torch(fused(mask), torchs(mask), triple, dy)


def test_a_query_without_keys_is_zero_and_gives_nothing() -> None:
    (q, k, v), dy = inputs(1, 1, 4, 6, 16)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for none in (torch.zeros(4, 6, dtype=torch.bool), torch.full((4, 6), -torch.inf)):
        y = fused(none.to(DEVICE))(q, k, v)
        assert not y.any() and not any(g.any() for g in torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("shape", [(1, 1, 36, 40), (2, 1, 1, 40), (36, 40)])
def test_a_learned_mask_has_its_gradient(shape: tuple[int, ...]) -> None:
    (q, k, v), dy = inputs(2, 2, 36, 40, 16)
    assert_as_good_as_torch(
        lambda mask: fused(mask)(q, k, v),
        lambda mask: torchs(mask)(*(t.to(mask.dtype) for t in (q, k, v))),
        (draw(*shape, seed=4),),
        dy,
    )


def test_views_of_a_projection_are_not_copied() -> None:
    made = draw(2, 36, 3 * 2 * 16).requires_grad_()

    def apart(x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, -1)]

    dy = draw(2, 1, 36, 16).expand(2, 2, 36, 16)
    assert_as_good_as_torch(lambda x: fused()(*apart(x)), lambda x: torchs()(*apart(x)), (made,), dy)
    y = fused()(*apart(made))
    assert y.transpose(1, 2).is_contiguous()
    (dx,) = torch.autograd.grad(y.sum(), made)  # the gradient of a sum has strides of zero
    assert dx.isfinite().all()


def test_other_strides() -> None:
    (q, k, v), dy = inputs(2, 2, 36, 40, 16)
    for triple in (
        (q[:, :, ::2], k[:, :, ::3], v[:, :, ::3]),
        (q[:, :, :, ::2], k[:, :, :, ::2], v[:, :, :, ::2]),
        tuple(t[..., 1:] for t in inputs(2, 2, 36, 40, 17)[0]),  # rows of whole heads, but not aligned
    ):
        gradient = dy[..., : triple[0].shape[2], : triple[0].shape[3]]
        assert_as_good_as_torch(fused(), torchs(), triple, gradient)
    one = k[:1, :1].expand(2, 2, 40, 16)
    assert_as_good_as_torch(fused(), torchs(), (q, one, one), dy.transpose(2, 3).contiguous().transpose(2, 3))


def test_nothing_to_attend() -> None:
    for samples, queries, keys in ((0, 5, 6), (2, 0, 6), (2, 5, 0)):
        (q, k, v), dy = inputs(samples, 2, queries, keys, 16)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        y = fused()(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy)
        assert y.shape == q.shape and [g.shape for g in gradients] == [t.shape for t in leaves]
        assert not any(t.any() for t in (y, *gradients))


def test_scores_of_any_size() -> None:
    q, k, v = inputs(1, 1, 20, 40, 16)[0]
    for size in (1e-30, 1e4, 1e12):
        y = fused(causal=True)(q * size, k, v)
        exact = torchs(causal=True)(q.double() * size, k.double(), v.double())
        assert (y.double() - exact).norm() <= 1e-3 * exact.norm()  # q k^T is rounded before the exponential


def dropped(position: Tensor, p: float, causal: bool, mask: Tensor | None = None) -> Callable[..., Tensor]:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        elements = q.shape[1] * q.shape[2] * k.shape[2]
        y: Tensor = attention(q, k, v, mask, position, NODE, elements, p, causal, None)
        return y

    return ours


def written_out(
    position: Tensor, p: float, causal: bool, mask: Tensor | None = None
) -> Callable[..., Tensor]:
    def stages(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bits = keyed_bits(position, NODE, [*q.shape[:3], k.shape[2]], 0, 1)
        return keyed_attention(q, k, v, bits, mask, p, causal, None, True)

    return stages


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("p, causal", [(0.1, True), (0.5, False)])
def test_dropout_equals_the_stage_with_its_weights_written_out(
    dtype: torch.dtype, p: float, causal: bool
) -> None:
    position = torch.tensor([3, 8], device=DEVICE)
    triple, dy = inputs(2, 4, 40, 70, 32, dtype, shared=2)
    mask = None if causal else draw(2, 1, 1, 70) > -1
    ours, torchs = dropped(position, p, causal, mask), written_out(position, p, causal, mask)
    assert_as_good_as_torch(ours, torchs, triple, dy)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=DTYPE_NAMES[::2])
def test_the_dropped_weights_are_those_of_the_stage(dtype: torch.dtype) -> None:
    (q, k, _), _ = inputs(2, 2, 70, 32, 32, dtype)
    identity = torch.eye(32, dtype=dtype, device=DEVICE).expand(2, 2, 32, 32)
    for step, first, p in ((0, 0, 0.1), (10**12, 10**15, 0.7)):
        position = torch.tensor([step, first], device=DEVICE)
        kept = keyed_bits(position, NODE, [2, 2, 70, 32], 0, 1) >= threshold(p)
        assert torch.equal(dropped(position, p, False)(q, k, identity) != 0, kept)
    assert not dropped(position, 1.0, False)(q, k, identity).any()


def test_a_sample_does_not_depend_on_the_others() -> None:
    (q, k, v), dy = inputs(3, 2, 40, 70, 32)

    def results(first: int, last: int) -> list[Tensor]:
        leaves = [t[first:last].clone().requires_grad_() for t in (q, k, v)]
        y = dropped(torch.tensor([4, 10 + first], device=DEVICE), 0.5, True)(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy[first:last])]

    whole, again = results(0, 3), results(0, 3)
    parts = [torch.cat(pair) for pair in zip(results(0, 1), results(1, 3), strict=True)]
    for one, same, joined in zip(whole, again, parts, strict=True):
        assert torch.equal(one, same) and torch.equal(one, joined)
