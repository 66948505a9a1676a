"""What the operators on embedding bags share: how the bags of several tables are given, and their bounds.

The row numbers come in one of two forms, the same for all tables:

    without offsets: [*leading, size], bags of one size; the shape is the same for all tables
    with offsets: [count], bag b being offsets[b] up to offsets[b + 1], as `torch.nn.functional.embedding_bag`
    has it: the last bag ends with the row numbers unless `include_last_offset` says that offsets has its end

Several tables go to one kernel as tuples of arguments, from which a program selects its own: a list of
pointers on the device would be one more copy to wait for.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import check_dtype, require

GROUP = 32  # most tables of one launch: its arguments have 4 KB in all
POOLINGS = ("sum", "mean")


@triton.jit
def pick(values, place, COUNT: tl.constexpr):
    """values[place] of a tuple of kernel arguments."""
    result = values[0]
    for other in tl.static_range(1, COUNT):
        result = tl.where(place == other, values[other], result)
    return result


@triton.jit
def bag_bounds(
    bag, bags, offsets, counts, entries, size, table, TABLES: tl.constexpr, HAS_OFFSETS: tl.constexpr
):
    """(first place, length) of a block of bags; one that is not there is empty."""
    here = (bag >= 0) & (bag < bags)
    if HAS_OFFSETS:
        offset_ptr = pick(offsets, table, TABLES)
        count = pick(counts, table, TABLES) // 2 - 1
        start = tl.load(offset_ptr + bag, mask=here, other=0).to(tl.int64)
        stop = tl.load(offset_ptr + bag + 1, mask=here & (bag + 1 < entries), other=0).to(tl.int64)
        stop = tl.minimum(tl.where(bag + 1 < entries, stop, count), count)
        start = tl.maximum(start, 0)
        length = tl.maximum(tl.where(here, stop - start, 0), 0)
    else:
        start = bag * size
        length = tl.where(here, size, 0).to(tl.int64)
    return start, length


def count_bags(indices: Sequence[Tensor], offsets: Sequence[Tensor], include_last_offset: bool) -> int:
    """How many bags each table has."""
    if offsets:
        return offsets[0].shape[0] - int(include_last_offset)
    count = 1
    for size in indices[0].shape[:-1]:
        count *= size
    return count


def varying(numbers: Sequence[int]) -> tuple[int, ...]:
    """n as 2 n + 3, for numbers in tuples that change from call to call; `// 2 - 1` in a kernel gives n.

    Triton compiles a kernel anew for 1 and for multiples of 16, in tuples whatever `do_not_specialize` says.
    """
    return tuple(2 * number + 3 for number in numbers)


def flat(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors as vectors whose elements lie next to each other."""
    return tuple(tensor.reshape(-1).contiguous() for tensor in tensors)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """In what sums are made: float32, or float64 where the reference computes in it."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_bags(
    name: str,
    tables: int,
    device: torch.device,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pooling: str,
    include_last_offset: bool,
) -> None:
    """One tensor of row numbers a table, as many of offsets or none; int32 or int64, all on `device`."""
    require(pooling in POOLINGS, name, "pooling", f"be one of {', '.join(POOLINGS)}", repr(pooling))
    require(len(indices) == tables, name, "indices", f"have one tensor a table, {tables}", len(indices))
    rule = f"have no tensor or one a table, {tables}"
    require(len(offsets) in (0, tables), name, "offsets", rule, len(offsets))
    for kind, tensors in (("indices", indices), ("offsets", offsets)):
        for place, tensor in enumerate(tensors):
            key = f"{kind}[{place}]"
            require(tensor.device == device, name, key, f"be on {device} like the tables", tensor.device)
            check_dtype(
                name, key, tensor, *((torch.int64, torch.int32) if place == 0 else (tensors[0].dtype,))
            )
    shape = tuple(indices[0].shape)
    for place, index in enumerate(indices):
        key, given = f"indices[{place}]", tuple(index.shape)
        if offsets:
            require(index.dim() == 1, name, key, "have one dimension where there are offsets", given)
        else:
            require(index.dim() >= 1, name, key, "have at least one dimension", given)
            require(given == shape, name, key, f"have the shape of indices[0], {shape}", given)
    for place, offset in enumerate(offsets):
        key, given = f"offsets[{place}]", tuple(offset.shape)
        require(offset.dim() == 1, name, key, "have one dimension", given)
        rule = f"have {offsets[0].shape[0]} entries like offsets[0]"
        require(offset.shape[0] == offsets[0].shape[0], name, key, rule, given)
        require(offset.shape[0] >= int(include_last_offset), name, key, "have the end of the last bag", given)
