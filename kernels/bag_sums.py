"""Sums over equal row numbers of bags, without atomics and without waiting for the device.

Every place, that is every row number given, gets a key that grows with table and row; a stable sort brings
equal keys together in the order of their places. Each run of equal keys is summed by one lane of a program.
A run that crosses chunks of CHUNK keys is cut there and a second kernel adds up its parts in their order, so
that a row that many bags have costs no long loop. All sizes follow from shapes: nothing is read at a place
where no part starts.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bags import GROUP, bag_bounds, count_bags, flat, pick, varying
from .launch import blocks, launch, power_of_two
from .rows import Block
from .tuning import tuned

CHUNK = 128  # most keys that are summed in one part
STEP = 4  # of them at a time
STATIC = Block(elements=512, warps=2)  # of a program's tile: larger ones spill registers for many tables
KEYS = 256  # keys that one program makes


@triton.jit(do_not_specialize=["rows", "counts", "first_place", "first_key", "bags", "entries", "steps"])
def bag_key_kernel(
    key_ptr,
    bag_ptr,
    length_ptr,
    indices,
    offsets,
    counts,
    rows,
    first_place,
    first_key,
    bags,
    entries,
    steps,
    size,
    TABLES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    MEAN: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Key, bag and its length of a block of places; one without bag or row has the table's last key."""
    table = tl.program_id(1)
    count = pick(counts, table, TABLES) // 2 - 1
    height = pick(rows, table, TABLES)
    start = tl.cast(first_place, tl.int64)
    base = tl.cast(first_key, tl.int64)
    for other in tl.static_range(TABLES - 1):
        start += tl.where(other < table, counts[other] // 2 - 1, 0)
        base += tl.where(other < table, rows[other] + 1, 0)
    place = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    here = place < count
    if HAS_OFFSETS:
        # how many bags start at or before the place, by bisection
        offset_ptr = pick(offsets, table, TABLES)
        low = tl.zeros((KEYS,), tl.int64)
        high = low + entries
        for _ in range(0, steps):
            middle = (low + high) // 2
            apart = low < high
            offset = tl.load(offset_ptr + middle, mask=apart, other=0).to(tl.int64)
            after = apart & (offset <= place)
            high = tl.where(apart & (offset > place), middle, high)
            low = tl.where(after, middle + 1, low)
        bag = low - 1
    else:
        bag = place // size
    row = tl.load(pick(indices, table, TABLES) + place, mask=here, other=0).to(tl.int64)
    right = (row >= 0) & (row < height) & (bag >= 0) & (bag < bags)
    tl.store(
        key_ptr + start + place, (base + tl.where(right, row, height)).to(key_ptr.dtype.element_ty), here
    )
    tl.store(bag_ptr + start + place, bag.to(tl.int32), mask=here)
    if MEAN:
        _, length = bag_bounds(bag, bags, offsets, counts, entries, size, table, TABLES, HAS_OFFSETS)
        tl.store(length_ptr + start + place, length.to(tl.int32), mask=here)


@triton.jit
def find_row(key, rows, first_key, TABLES: tl.constexpr):
    """(table, row, whether that is one) of keys: not so of a table's last key and of other groups' keys."""
    low = tl.cast(first_key, tl.int64)
    table = (key * 0).to(tl.int32)
    row = key - low
    height = row * 0
    for other in tl.static_range(TABLES):
        behind = key >= low
        table = tl.where(behind, other, table)
        row = tl.where(behind, key - low, row)
        height = tl.where(behind, rows[other], height)
        low += rows[other] + 1
    return table, row, (row >= 0) & (row < height)


@triton.jit
def put(gradients, table, row, place, value, here, column, width, TABLES: tl.constexpr, FORM: tl.constexpr):
    """Store the finished sums of rows: dense, added, or sparse at their places among the sorted keys."""
    mask = here[:, None] & (column < width)[None, :]
    line = place if FORM == "sparse" else row
    target = (pick(gradients, table, TABLES) + line * width)[:, None] + column[None, :]
    if FORM == "add":
        value += tl.load(target, mask=mask, other=0.0)
    tl.store(target, value.to(gradients[0].dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "first_key", "first_table", "total"])
def bag_sum_kernel(
    partial_ptr,
    gradients,
    row_ptr,
    dy_ptr,
    key_ptr,
    order_ptr,
    bag_ptr,
    length_ptr,
    rows,
    first_key,
    first_table,
    total,
    width,
    dy_table_stride,
    dy_stride,
    TABLES: tl.constexpr,
    FORM: tl.constexpr,
    MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums the parts of runs of equal keys that start at a block of places, STEP keys of each at a time."""
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = place < total
    key = tl.load(key_ptr + place, mask=here, other=-1).to(tl.int64)
    before = tl.load(key_ptr + place - 1, mask=here & (place > 0), other=-1).to(tl.int64)
    table, row, right = find_row(key, rows, first_key, TABLES)
    if FORM == "sparse":
        tl.store(row_ptr + place, row, mask=here & right & (tl.program_id(1) == 0))
    starts = here & right & ((key != before) | (place % CHUNK == 0))
    end = tl.minimum((place // CHUNK + 1) * CHUNK, total)
    source_ptr = dy_ptr + (tl.cast(first_table, tl.int64) + table) * dy_table_stride
    step = tl.arange(0, STEP)
    sums = tl.zeros((PLACES, STEP, WIDTH), tl.float32)
    length = tl.zeros((PLACES,), tl.int32)
    alive = starts
    going = tl.max(alive.to(tl.int32), axis=0)
    while going > 0:
        at = (place + length)[:, None] + step[None, :]
        same = alive[:, None] & (at < end[:, None])
        same = same & (tl.load(key_ptr + at, mask=same, other=-1).to(tl.int64) == key[:, None])
        source = tl.load(order_ptr + at, mask=same, other=0)
        bag = tl.load(bag_ptr + source, mask=same, other=0).to(tl.int64)
        mask = same[:, :, None] & (column < width)[None, None, :]
        dy = (source_ptr[:, None] + bag * dy_stride)[:, :, None] + column[None, None, :]
        value = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
        if MEAN:
            value = value / tl.load(length_ptr + source, mask=same, other=1).to(tl.float32)[:, :, None]
        sums += value
        found = tl.sum(same.to(tl.int32), axis=1)
        length += found
        alive = alive & (found == STEP)
        going = tl.max(alive.to(tl.int32), axis=0)
    total_of_part = tl.sum(sums, axis=1)
    after = tl.load(key_ptr + end, mask=starts & (end < total), other=-1).to(tl.int64)
    cut = starts & (((place + length == end) & (after == key)) | (key == before))
    # the part that starts with its chunk and the one that leaves it may both be there
    chunks = tl.cdiv(total, CHUNK).to(tl.int64)
    slot = place // CHUNK + tl.where(place % CHUNK == 0, 0, chunks)
    inside = cut[:, None] & (column < width)[None, :]
    tl.store(partial_ptr + slot[:, None] * width + column[None, :], total_of_part, mask=inside)
    put(gradients, table, row, place, total_of_part, starts & ~cut, column, width, TABLES, FORM)


@triton.jit(do_not_specialize=["rows", "first_key", "total"])
def bag_join_kernel(
    partial_ptr,
    gradients,
    key_ptr,
    rows,
    first_key,
    total,
    width,
    TABLES: tl.constexpr,
    FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds up the parts of the runs that start in a block of chunks and go on behind their chunk."""
    chunk = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    chunks = tl.cdiv(total, CHUNK).to(tl.int64)
    start, end = chunk * CHUNK, (chunk + 1) * CHUNK
    here = end < total
    key = tl.load(key_ptr + end - 1, mask=here, other=-1).to(tl.int64)
    after = tl.load(key_ptr + end, mask=here, other=-1).to(tl.int64)
    first = tl.load(key_ptr + start, mask=here, other=-1).to(tl.int64)
    before = tl.load(key_ptr + start - 1, mask=here & (chunk > 0), other=-1).to(tl.int64)
    table, row, right = find_row(key, rows, first_key, TABLES)
    starts = here & right & (key == after) & ((first != key) | (before != key))
    slot = chunk + tl.where(first == key, 0, chunks)
    inside = starts[:, None] & (column < width)[None, :]
    head = tl.load(partial_ptr + slot[:, None] * width + column[None, :], mask=inside, other=0.0)
    step = tl.arange(0, STEP)
    sums = tl.zeros((PLACES, STEP, WIDTH), tl.float32)
    length = tl.zeros((PLACES,), tl.int32) + 1
    alive = starts
    going = tl.max(alive.to(tl.int32), axis=0)
    while going > 0:
        other = (chunk + length)[:, None] + step[None, :]
        same = alive[:, None] & (other < chunks)
        same = same & (tl.load(key_ptr + other * CHUNK, mask=same, other=-1).to(tl.int64) == key[:, None])
        mask = same[:, :, None] & (column < width)[None, None, :]
        part = (partial_ptr + other * width)[:, :, None] + column[None, None, :]
        sums += tl.load(part, mask=mask, other=0.0)
        found = tl.sum(same.to(tl.int32), axis=1)
        length += found
        alive = alive & (found == STEP)
        going = tl.max(alive.to(tl.int32), axis=0)
    place = start
    if FORM == "sparse":
        at = start[:, None] + tl.arange(0, CHUNK)[None, :]
        keys = tl.load(key_ptr + at, mask=starts[:, None], other=-1).to(tl.int64)
        place = end - tl.sum((keys == key[:, None]).to(tl.int32), axis=1)
    put(gradients, table, row, place, head + tl.sum(sums, axis=1), starts, column, width, TABLES, FORM)


@dataclass(frozen=True, slots=True)
class Places:
    """The places of all tables' bags: sorted keys, the places in that order, and of each place its bag.

    `length` is that of the bag, read for means alone.
    """

    key: Tensor
    order: Tensor
    bag: Tensor
    length: Tensor


def sort_places(
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    pooling: str,
    include_last_offset: bool,
) -> Places:
    """Keys are 32 bits wide where they fit, the sort is faster then."""
    counts = [index.numel() for index in indices]
    total = sum(counts)
    last = sum(rows) + len(rows)
    key = indices[0].new_empty(total, dtype=torch.int32 if last < 2**31 else torch.int64)
    bag = indices[0].new_empty(total, dtype=torch.int32)
    length = indices[0].new_empty(total, dtype=torch.int32) if pooling == "mean" else bag
    entries = offsets[0].shape[0] if offsets else 0
    first_place = first_key = 0
    for first in range(0, len(indices), GROUP):
        group = slice(first, first + GROUP)
        launch(
            bag_key_kernel,
            (blocks(max(counts[group]), KEYS), len(counts[group])),
            key,
            bag,
            length,
            flat(indices[group]),
            flat(offsets[group]),
            varying(counts[group]),
            tuple(rows[group]),
            first_place,
            first_key,
            count_bags(indices, offsets, include_last_offset),
            entries,
            entries.bit_length(),
            1 if offsets else indices[0].shape[-1],
            TABLES=len(counts[group]),
            HAS_OFFSETS=len(offsets) > 0,
            MEAN=pooling == "mean",
            KEYS=KEYS,
            num_warps=4,
        )
        first_place += sum(counts[group])
        first_key += sum(rows[group]) + len(rows[group])
    key, order = torch.sort(key, stable=True)
    return Places(key, order, bag, length)


def sum_places(
    places: Places,
    dy: Tensor,
    gradients: Sequence[Tensor],
    row: Tensor,
    rows: Sequence[int],
    pooling: str,
    form: str,
) -> None:
    """Sum the runs into `gradients`: one tensor a table, of the sparse form the same one for all tables."""
    width = dy.shape[-1]
    total = places.key.numel()
    count = 1
    for size in dy.shape[1:-1]:
        count *= size
    dy = dy.reshape(dy.shape[0], count, width)
    if width > 1 and dy.stride(2) != 1:
        dy = dy.contiguous()
    chunks = blocks(total, CHUNK)
    partial = dy.new_empty((2, chunks, width), dtype=torch.float32)
    block = min(128, power_of_two(width))
    columns = blocks(width, block)
    how = tuned("bag_sums", STATIC, dy, tables=min(len(rows), GROUP), width=width)
    lanes = max(1, how.elements // (STEP * block))
    chunk_lanes = min(8, lanes)
    first_key = 0
    for first in range(0, len(rows), GROUP):
        heights = tuple(rows[first : first + GROUP])
        targets = tuple(gradients[first : first + GROUP])
        launch(
            bag_sum_kernel,
            (blocks(total, lanes), columns),
            partial,
            targets,
            row,
            dy,
            places.key,
            places.order,
            places.bag,
            places.length,
            heights,
            first_key,
            first,
            total,
            width,
            dy.stride(0),
            dy.stride(1),
            TABLES=len(heights),
            FORM=form,
            MEAN=pooling == "mean",
            CHUNK=CHUNK,
            PLACES=lanes,
            STEP=STEP,
            WIDTH=block,
            num_warps=how.warps,
        )
        launch(
            bag_join_kernel,
            (blocks(chunks, chunk_lanes), columns),
            partial,
            targets,
            places.key,
            heights,
            first_key,
            total,
            width,
            TABLES=len(heights),
            FORM=form,
            CHUNK=CHUNK,
            PLACES=chunk_lanes,
            STEP=STEP,
            WIDTH=block,
            num_warps=how.warps,
        )
        first_key += sum(heights) + len(heights)
