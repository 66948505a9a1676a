"""Attention, against torch's own choice of its kernels and against cuDNN's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention

from .work import Cost, Inputs, Kernel, Maker, Size


def _inputs(numbers: Mapping[str, int], make: Maker) -> Inputs:
    shape = numbers["samples"], numbers["heads"], numbers["tokens"], numbers["head"]
    return *(make.normal(*shape, grad=True) for _ in range(3)), bool(numbers["causal"])


def _costs(numbers: Mapping[str, int], itemsize: int) -> tuple[Cost, Cost]:
    """Two products forward and five backward, half of them under a causal mask."""
    rows = numbers["samples"] * numbers["heads"] * numbers["tokens"]
    element = rows * numbers["head"] * itemsize
    product = 2.0 * rows * numbers["tokens"] * numbers["head"] / (1 + numbers["causal"])
    return Cost(4 * element, 2 * product), Cost(8 * element, 5 * product)


def _ours(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Any:
    return attention(query, key, value, None, None, 0, 0, 0.0, causal, None)


def _eager(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=causal)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    backend = SDPBackend.CUDNN_ATTENTION if query.is_cuda else SDPBackend.MATH
    with sdpa_kernel(backend):
        return _eager(query, key, value, causal)


def _size(model: str, samples: int, tokens: int, head: int, causal: int, rank: int) -> Size:
    numbers = {"samples": samples, "heads": 16, "tokens": tokens, "head": head, "causal": causal}
    return Size(model, numbers, rank=rank)


ATTENTION = (
    Kernel(
        name="attention",
        ours=_ours,
        eager=_eager,
        inputs=_inputs,
        costs=_costs,
        sizes=(
            _size("MMT", 16, 256, 64, 0, 0),
            _size("MMT", 4, 256, 64, 0, 1),
            _size("MMT", 64, 256, 64, 0, 1),
            _size("long", 4, 2048, 64, 1, 1),
            _size("long", 4, 2048, 128, 1, 2),
        ),
        tiny={"samples": 2, "heads": 2, "tokens": 8, "head": 32, "causal": 0},
        library=_cudnn,
        note="The library's column is cuDNN; eager is what torch chooses.",
    ),
)
