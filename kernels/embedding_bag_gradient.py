"""The gradients of the tables of embedding bags.

    dweights[t][r] = sum over the places of row r in the bags of table t of dy[t, the bag] (/ its length)

Three forms: dense gradients; dense float32 ones that are added to, where only rows that occur are touched;
and sparse, (row, value) of each place, table by table and then by row, where the first of equal rows has the
sum and the others have zeros. Sums are float32 and have one order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .bag_sums import sort_places, sum_places
from .bags import POOLINGS, check_bags, count_bags, wide_dtype
from .library import check_dtype, check_tensors, register, require


def launch_dense(
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    pooling: str,
    include_last_offset: bool,
) -> list[Tensor]:
    """The gradient of every table, of dy's dtype."""
    gradients = [gradient.zero_() for gradient in empty_dense(dy, indices, offsets, rows, pooling, False)]
    places = sort_places(indices, offsets, rows, pooling, include_last_offset)
    sum_places(places, dy, gradients, places.key, rows, pooling, "dense")
    return gradients


def launch_sparse(
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    pooling: str,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor]:
    """(row, value) of all places, table by table; a place without bag or row has row 0 and zeros."""
    row, value = empty_sparse(dy, indices, offsets, rows, pooling, include_last_offset)
    places = sort_places(indices, offsets, rows, pooling, include_last_offset)
    sum_places(places, dy, [value.zero_()] * len(rows), row.zero_(), rows, pooling, "sparse")
    return row, value


def launch_accumulate(
    gradients: Sequence[Tensor],
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pooling: str,
    include_last_offset: bool,
) -> None:
    """Add to the gradients in place."""
    rows = [gradient.shape[0] for gradient in gradients]
    places = sort_places(indices, offsets, rows, pooling, include_last_offset)
    sum_places(places, dy, gradients, places.key, rows, pooling, "add")


def empty_dense(
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    pooling: str,
    include_last_offset: bool,
) -> list[Tensor]:
    """The gradients, not computed."""
    return [dy.new_empty((height, dy.shape[-1])) for height in rows]


def empty_sparse(
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    pooling: str,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor]:
    """The sparse gradient, not computed."""
    total = sum(index.numel() for index in indices)
    return dy.new_empty(total, dtype=torch.int64), dy.new_empty((total, dy.shape[-1]))


def reference_dense(
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    pooling: str,
    include_last_offset: bool,
) -> list[Tensor]:
    """The dense gradients in ATen."""
    gradients = []
    for table, height in enumerate(rows):
        row, bag, length, wide = _places(dy, indices, offsets, table, height, include_last_offset)
        if row.numel() == 0 or wide.numel() == 0:
            gradients.append(dy.new_zeros((height, dy.shape[-1])))
            continue
        gradient = torch.ops.aten._embedding_bag_dense_backward.default(
            wide, row, bag, length, bag, height, False, POOLINGS.index(pooling), None
        )
        gradients.append(gradient.to(dy.dtype))
    return gradients


def reference_sparse(
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    pooling: str,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor]:
    """The sparse gradients in ATen, out of the dense ones of the rows that occur."""
    all_rows, all_values = [], []
    for table, (index, height) in enumerate(zip(indices, rows, strict=True)):
        row, bag, length, wide = _places(dy, indices, offsets, table, height, include_last_offset)
        share = wide[bag] / length[bag][:, None] if pooling == "mean" else wide[bag]
        row, order = torch.sort(row, stable=True)
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        sums = torch.zeros_like(share).index_add_(0, first.cumsum(0) - 1, share[order])
        values = wide.new_zeros((index.numel(), wide.shape[-1]))
        values[: row.numel()][first] = sums[: int(first.sum())]
        all_rows.append(torch.cat([row, row.new_zeros(index.numel() - row.numel())]))
        all_values.append(values.to(dy.dtype))
    return torch.cat(all_rows), torch.cat(all_values)


def reference_accumulate(
    gradients: Sequence[Tensor],
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pooling: str,
    include_last_offset: bool,
) -> None:
    """The dense gradients added in ATen."""
    rows = [gradient.shape[0] for gradient in gradients]
    wide = dy.to(wide_dtype(dy))
    parts = reference_dense(wide, indices, offsets, rows, pooling, include_last_offset)
    for gradient, part in zip(gradients, parts, strict=True):
        gradient += part


def _places(
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    table: int,
    height: int,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row, bag) of the places of one table that have a bag, (length, wide dy) of its bags."""
    wide = dy[table].reshape(-1, dy.shape[-1]).to(wide_dtype(dy)).contiguous()
    row = indices[table].reshape(-1).long()
    place = torch.arange(row.numel())
    if offsets:
        start = offsets[table].long()
        bag = torch.searchsorted(start, place, right=True) - 1
    else:
        bag = place // max(1, indices[table].shape[-1])
    here = (bag >= 0) & (bag < wide.shape[0])
    row, bag = row[here].contiguous(), bag[here].contiguous()
    if row.numel() > 0 and not 0 <= int(row.min()) <= int(row.max()) < height:
        raise IndexError(
            f"indices[{table}] must be rows of a table of {height}, they are from {row.min()} to {row.max()}"
        )
    return row, bag, torch.bincount(bag, minlength=wide.shape[0]), wide


def check_gradient(
    name: str,
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    tables: int,
    pooling: str,
    include_last_offset: bool,
) -> None:
    """dy [tables, *leading, width] and the bags of each table."""
    require(tables > 0, name, "rows", "have at least one table", "empty")
    check_tensors(name, dy=dy)
    check_bags(name, tables, dy.device, indices, offsets, pooling, include_last_offset)
    leading = tuple(indices[0].shape[:-1])
    if offsets:
        leading = (count_bags(indices, offsets, include_last_offset),)
    rule = f"have shape {(tables, *leading)} and the width of the tables"
    require(tuple(dy.shape[:-1]) == (tables, *leading), name, "dy", rule, tuple(dy.shape))


def check_dense(
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    pooling: str,
    include_last_offset: bool,
) -> None:
    """See `check_gradient`."""
    name = "embedding_bag_backward_weight"
    check_gradient(name, dy, indices, offsets, len(rows), pooling, include_last_offset)


def check_accumulate(
    gradients: Sequence[Tensor],
    dy: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pooling: str,
    include_last_offset: bool,
) -> None:
    """The gradients are contiguous float32 tables of dy's width."""
    name = "embedding_bag_accumulate_weight"
    check_gradient(name, dy, indices, offsets, len(gradients), pooling, include_last_offset)
    for place, gradient in enumerate(gradients):
        key = f"gradients[{place}]"
        fits = gradient.dim() == 2 and gradient.shape[1] == dy.shape[-1]
        require(fits, name, key, f"be [rows, {dy.shape[-1]}], the width of dy", tuple(gradient.shape))
        check_dtype(name, key, gradient, wide_dtype(dy))
        require(gradient.device == dy.device, name, key, f"be on {dy.device} like dy", gradient.device)
        require(gradient.is_contiguous(), name, key, "be contiguous", gradient.stride())


_BAGS = "Tensor dy, Tensor[] indices, Tensor[] offsets"

embedding_bag_backward_weight = register(
    f"embedding_bag_backward_weight({_BAGS}, SymInt[] rows, str pooling, bool include_last_offset)"
    " -> Tensor[]",
    check=check_dense,
    kernel=launch_dense,
    reference=reference_dense,
    fake=empty_dense,
)
embedding_bag_backward_sparse = register(
    f"embedding_bag_backward_sparse({_BAGS}, SymInt[] rows, str pooling, bool include_last_offset)"
    " -> (Tensor row, Tensor value)",
    check=check_dense,
    kernel=launch_sparse,
    reference=reference_sparse,
    fake=empty_sparse,
)
embedding_bag_accumulate_weight = register(
    f"embedding_bag_accumulate_weight(Tensor(a!)[] gradients, {_BAGS}, str pooling, bool include_last_offset)"
    " -> ()",
    check=check_accumulate,
    kernel=launch_accumulate,
    reference=reference_accumulate,
    fake=lambda *_: None,
)
