"""How attention's kernels want their arguments in memory, and copies of those that lie otherwise.

Every row of a head begins at a multiple of 16 elements, and so does every row of a mask: then one address
serves many elements. With an address for each element the registers of a chip do not suffice. Heads of any
other size are copied into larger ones that end in zeros, which change no product.
"""

import math

import torch
from torch import Tensor

from .launch import address, blocks, power_of_two

ALIGNED = 16  # elements of a stride, or bytes of an address: the multiple that Triton looks for


def score_scale(scale: float | None, head: int) -> float:
    """What products of queries and keys are multiplied by: one by the root of the head size by default."""
    return 1.0 / math.sqrt(head) if scale is None else scale


def along(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; copied only if it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, of a whole head, with aligned rows; copied only if it has not."""
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def whole(head: int, dtype: torch.dtype) -> int:
    """The size of head that kernels take in place of this one: a power of two, in half precision above 64 a
    multiple of 16. Hiding a part of a block takes registers, which large tiles of half precision have."""
    if dtype.itemsize > 2 or head <= 64:
        return max(ALIGNED, power_of_two(head))
    return blocks(head, ALIGNED) * ALIGNED


def is_whole(query: Tensor) -> bool:
    """Whether kernels take heads of this size as they are."""
    return whole(query.shape[3], query.dtype) == query.shape[3]


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros behind each row, up to a whole head."""
    return tuple(_widened(tensor) for tensor in tensors)


def narrowed(wide: Tensor, like: Tensor) -> Tensor:
    """What is in front of the zeros, laid out as results for `like` are."""
    return shaped_like(like).copy_(wide[..., : like.shape[-1]])


def shaped_like(tensor: Tensor) -> Tensor:
    """A new tensor [samples, heads, rows, head]; the rows lie outside the heads in memory where they do so in
    `tensor`, as in views of a projection, so that views of the result need no copy either."""
    samples, heads, rows, head = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((samples, rows, heads, head)).transpose(1, 2)
    return tensor.new_empty((samples, heads, rows, head))


def kernel_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as [samples, heads, queries, keys] with aligned rows, booleans as bytes; copied only if its
    rows lie otherwise, and then once for all dimensions that it stretches over."""
    if mask is None:
        return None
    plain = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    wide = plain.expand(*query.shape[:3], key.shape[2])
    if wide.numel() == 0 or _is_aligned(wide):
        return wide
    once = wide
    for dimension in range(3):
        if wide.stride(dimension) == 0:
            once = once.narrow(dimension, 0, 1)
    keys = key.shape[2]
    made = wide.new_empty((*once.shape[:3], blocks(keys, ALIGNED) * ALIGNED))[..., :keys]
    return made.copy_(once).expand(wide.shape)


def _is_aligned(tensor: Tensor) -> bool:
    outer = tensor.stride()[:-1]
    return (
        tensor.stride(-1) == 1
        and all(stride % ALIGNED == 0 for stride in outer)
        and address(tensor) % ALIGNED == 0
    )


def _widened(tensor: Tensor) -> Tensor:
    head = tensor.shape[-1]
    wide = tensor.new_zeros((*tensor.shape[:-1], whole(head, tensor.dtype)))
    wide[..., :head].copy_(tensor)
    return wide
