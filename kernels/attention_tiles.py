"""What the kernels of attention have in common: their arguments, their tiles, and the scores of a tile.

Scores are kept in base 2, t = scale * log2(e) * q k^T + mask * log2(e), so that a weight is exp2 of their
difference to the row's statistics. A program's tile is [queries, keys] or, transposed, [keys, queries]: the
functions take indices that broadcast to it.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_layout import aligned, kernel_mask
from .keyed import check_keyed, threshold_and_scale
from .launch import power_of_two
from .library import check_dtype, check_tensors, require
from .product import precision
from .tuning import tuned

LARGEST_HEAD = 128
LOG2_E = 1.4426950408889634
NO_MASK, BOOLEAN, ADDED = 0, 1, 2
LOWEST = 0.97  # of the lowest number: below it no finite mask goes, so its scores stay finite in base 2

_LOG2_E, _BOOLEAN, _ADDED = tl.constexpr(LOG2_E), tl.constexpr(BOOLEAN), tl.constexpr(ADDED)
_LEAST = tl.constexpr(LOWEST * torch.finfo(torch.float32).min)

# Sizes that change from batch to batch, or with the node: no kernel is compiled anew for them.
NOT_SPECIALIZED = ["heads", "queries", "keys", "node_key", "elements", "threshold"]


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries (or keys, where those are what a program owns) of a program, and what it takes at a time."""

    own: int
    step: int
    warps: int
    stages: int


def configuration(kernel: str, head: int, dtype: torch.dtype, mask_rows: bool, grouped: bool = False) -> Tile:
    """For `forward`, `query` and `key_value`; `step`, which orders sums, follows from dtype and head size.

    What else a program owns must leave its registers room: above all beside a mask that differs from query to
    query, the more so where queries of several heads are grouped, and where a head does not fill its block.
    """
    large, crowded = head > 64, kernel == "key_value" and mask_rows
    if dtype.itemsize > 2:
        if crowded and (large or grouped):
            return Tile(16, 32, 8, 1 if grouped else 2)
        return Tile(32, 32, 8, 1 if kernel == "forward" else 2)
    partial = not _fills(head)
    if kernel == "forward":
        small = large and (mask_rows or partial)
        return Tile(64, 64, 8, 2) if small else Tile(128, 64, 8, 3 if head > 32 else 4)
    if kernel == "query":
        small = large and (mask_rows or partial)
        return Tile(64, 32, 8 if partial else 4, 2) if small else Tile(128, 32, 8, 3)
    if large or mask_rows:
        return Tile(32 if large and crowded and grouped else 64, 32, 8, 2 if large else 1)
    return Tile(128, 32, 8, 3)


def _fills(head: int) -> bool:
    return power_of_two(head) == head


def tile_of(kernel: str, query: Tensor, mask_rows: bool, grouped: bool) -> Tile:
    """The tile of a kernel for these queries. A table knows heads that fill their block, and those that are
    not grouped: where there is less room, its tiles might spill."""
    head = query.shape[3]
    static = configuration(kernel, head, query.dtype, mask_rows, grouped)
    if not _fills(head) or grouped:
        return static
    return tuned(f"attention_{kernel}", static, query, head=head, mask_rows=mask_rows)


@triton.jit
def head_base(pointer, strides, sample, head):
    """Where a head begins."""
    return pointer + sample.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def head_rows(base, row, stride, count, HEAD: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows of a head, zeros where they lie beyond `count`, as only those of a BOUNDED block may."""
    column = tl.arange(0, WIDTH)
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if BOUNDED:
        inside = (row < count)[:, None] & (column < HEAD)[None, :]
        value = tl.load(pointer, mask=inside, other=0.0)
    elif HEAD < WIDTH:
        value = tl.load(pointer, mask=(column < HEAD)[None, :], other=0.0)
    else:
        value = tl.load(pointer)
    return value


@triton.jit
def store_head_rows(base, row, stride, count, value, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Write the rows that there are, in the dtype of `base`."""
    column = tl.arange(0, WIDTH)
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row < count)[:, None] & (column < HEAD)[None, :]
    tl.store(pointer, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def head_of_block(blocks, heads):
    """(head among those of all samples, sample, head) of a program, whose number counts blocks first.

    The divisions are of 32 bits, those of 64 are calls; the results multiply strides and are of 64.
    """
    index = tl.program_id(0) // blocks
    return index.to(tl.int64), (index // heads).to(tl.int64), index % heads


@triton.jit
def key_range(first_row, keys, CAUSAL: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr):
    """(end of the blocks of keys that all count for a block of queries, end of those that may count)."""
    end = keys
    whole = keys // STEP * STEP
    if CAUSAL:
        end = tl.minimum(keys, first_row + OWN)
        whole = tl.minimum(whole, (first_row + 1) // STEP * STEP)
    return whole, end


@triton.jit
def allowed_scores(t, row, column, keys, CAUSAL: tl.constexpr):
    """-inf in the place of scores of keys that do not exist or come after the query."""
    inside = column < keys
    if CAUSAL:
        inside = inside & (column <= row)
    return tl.where(inside, t, float("-inf"))


@triton.jit
def masked_scores(t, row, column, mask, queries, keys, MASK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """The scores under the mask of one head, (pointer, strides); without MASK_ROWS it is the same for all
    queries.

    A finite number added stays finite in base 2, however low: a row in which all keys have the lowest number
    has equal weights, as with torch.
    """
    if MASK != 0:
        base, strides = mask
        pointer = base + column.to(tl.int64) * strides[3]
        inside = column < keys
        if MASK_ROWS:
            pointer = pointer + row.to(tl.int64) * strides[2]
            inside = inside & (row < queries)
        value = tl.load(pointer, mask=inside, other=0)
        if MASK == _BOOLEAN:
            t = tl.where(value != 0, t, float("-inf"))
        else:
            natural = value.to(tl.float32)
            added = natural * _LOG2_E
            lost = (added == float("-inf")) & (natural != float("-inf"))
            t += tl.where(lost, _LEAST, added)
    return t


@triton.jit
def weights_again(t, peak, log_sum, MASK: tl.constexpr):
    """Weights from scores and the statistics of their rows."""
    if MASK == _ADDED:
        return tl.exp2((t - peak) - log_sum)  # the peak may be so low that the sum of both is the peak
    return tl.exp2(t - (peak + log_sum))


def common(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    node_key: int,
    elements: int,
    p: float,
    causal: bool,
    scale: float,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first arguments of the three kernels for whole heads, and the constants and options of one of them.

    In float32 the assembler would rather spill a few bytes than give up a block on a processor: told that it
    may take all registers, it does not.
    """
    head = query.shape[-1]
    query, key, value = aligned(query), aligned(key), aligned(value)
    wide = kernel_mask(mask, query, key)
    dropping = position is not None and p > 0.0
    arguments = (
        *(query, query.stride(), key, key.stride(), value, value.stride()),
        *((query, (0, 0, 0, 0)) if wide is None else (wide, wide.stride())),
        query if position is None else position,
        *(query.shape[1], query.shape[1] // max(1, key.shape[1]), query.shape[2], key.shape[2]),
        *(node_key, elements),
        *(threshold_and_scale(p) if dropping else (0, 1.0)),
        scale * LOG2_E,
    )
    mask_rows = wide is not None and wide.stride(2) != 0
    tile = tile_of(kernel, query, mask_rows, grouped=query.shape[1] > key.shape[1])
    constants = {
        "CAUSAL": causal,
        "DROPOUT": dropping,
        "MASK": NO_MASK if mask is None else BOOLEAN if mask.dtype == torch.bool else ADDED,
        "MASK_ROWS": mask_rows,
        "PRECISION": precision(),
        "HEAD": head,
        "WIDTH": power_of_two(head),
        "OWN": tile.own,
        "STEP": tile.step,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return arguments, constants if query.dtype.itemsize == 2 else {**constants, "maxnreg": 255}


def check_attention(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    node_key: int,
    elements: int,
    p: float,
    causal: bool,
    scale: float | None,
) -> None:
    """query [samples, heads, queries, head], key and value [samples, its heads, keys, head], of one dtype."""
    check_tensors(name, query=query, key=key, value=value)
    for given, tensor in (("query", query), ("key", key), ("value", value)):
        rule = "have four dimensions: samples, heads, rows, head size"
        require(tensor.dim() == 4, name, given, rule, tuple(tensor.shape))
        check_dtype(name, given, tensor, query.dtype)
    samples, heads, queries, head = query.shape
    rule = f"have a head size from 1 to {LARGEST_HEAD}"
    require(1 <= head <= LARGEST_HEAD, name, "query", rule, head)
    fits = key.shape[0] == samples and key.shape[3] == head
    require(fits, name, "key", f"have query's {samples} samples and head size {head}", tuple(key.shape))
    same = value.shape == key.shape
    require(same, name, "value", f"have key's shape {tuple(key.shape)}", tuple(value.shape))
    shared = key.shape[1]
    divides = heads == shared or (shared > 0 and heads % shared == 0)
    require(divides, name, "key", f"have a number of heads that divides query's {heads}", shared)
    if mask is not None:
        require(not causal, name, "causal", "be False beside a mask, as torch has it", causal)
        allowed = (torch.bool, query.dtype, torch.float32)
        check_dtype(name, "mask", mask, *allowed)
        full = (samples, heads, queries, key.shape[2])
        sizes = zip(reversed(mask.shape), reversed(full), strict=False)
        stretches = mask.dim() <= 4 and all(size == 1 or size == whole for size, whole in sizes)
        require(stretches, name, "mask", f"broadcast to {full}", tuple(mask.shape))
        on = mask.device == query.device
        require(on, name, "mask", f"be on {query.device} like query", mask.device)
    if position is not None:
        check_keyed(name, position, elements, p, query)
    else:
        require(p == 0.0, name, "p", "be 0 without a position", p)
