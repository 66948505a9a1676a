"""Sums of several tensors, in a forward graph where branches join and in a backward one where they fork.

add(add(add(a, b), c), d) of equal shapes, each read by the next alone    -> gpp_kernels.sum_of

Casts to float32 of what is added are taken along. The order of the additions is kept, so a sum in float32
keeps its bits. A single addition stays with torch: there is nothing to fuse, and so it is not reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..gradient_sum import NARROW, check_sum, sum_of
from ..library import KERNEL_DTYPES
from .match import Match, Pattern, arguments, in_order, known, same

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True, slots=True)
class Chain:
    """Additions one after the other: what they add, first to last, and their nodes in the graph's order."""

    parts: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


def chain_ending_at(node: fx.Node) -> Chain | None:
    """The longest chain of additions whose last is the node; None if it is alone, or not the last."""
    if not _is_link(node):
        return None
    readers = list(node.users)
    if len(readers) == 1 and _is_link(readers[0]) and _before(readers[0]) is node:
        return None
    adds, parts, last = [node], [], node
    while (before := _before(last)) is not None:
        first, second = _addends(last)
        parts.append(second if before is first else first)
        adds.append(before)
        last = before
    first, second = _addends(last)
    sources = [_uncast(part, set(adds)) for part in (first, second, *reversed(parts))]
    casts = [cast for _, cast in sources if cast is not None]
    if len(adds) + len(casts) == 1:
        return None
    return Chain(tuple(source for source, _ in sources), in_order((*adds, *casts)))


def _addends(add: fx.Node) -> tuple[fx.Node, fx.Node]:
    given = arguments(add)
    return given["self"], given["other"]


def _is_link(node: fx.Node) -> bool:
    """Whether two tensors are added whose sum has their shape, and whose elements lie in its order."""
    if node.target is not aten.add.Tensor or arguments(node)["alpha"] != 1:
        return False
    total = known(node)
    if total is None or total.dim() == 0 or total.dtype not in KERNEL_DTYPES or not _packed(total):
        return False
    for addend in _addends(node):
        value = known(addend) if isinstance(addend, fx.Node) else None
        if value is None or not same(value.shape, total.shape) or not _packed(value):
            return False
        if value.dtype != total.dtype and (total.dtype in NARROW or value.dtype not in NARROW):
            return False
    return True


def _before(add: fx.Node) -> fx.Node | None:
    """The addend that is the rest of the chain, if one is."""
    first, second = _addends(add)
    if first is second:
        return None
    for addend in (first, second):
        if list(addend.users) == [add] and _is_link(addend) and _dtype(addend) == _dtype(add):
            return addend
    return None


def _uncast(part: fx.Node, adds: set[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """What is added before its cast to float32, and the cast; itself if it is none, or read by others."""
    is_cast = part.target in _CASTS and _dtype(part) == torch.float32
    source = part.args[0] if is_cast and set(part.users) <= adds else None
    value = known(source) if isinstance(source, fx.Node) else None
    if isinstance(source, fx.Node) and value is not None and value.dtype in NARROW and _packed(value):
        return source, part
    return part, None


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = known(node)
    return None if value is None else value.dtype


def _packed(value: Tensor) -> bool:
    """Whether its elements lie next to each other in their order, whatever the number of samples."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not same(size, 1) and not same(stride, expected):
            return False
        expected = expected * size
    return True


def _sum(node: fx.Node) -> Match | None:
    chain = chain_ending_at(node)
    if chain is None:
        return None
    taken = (list(chain.parts), _dtype(node))
    return Match(chain.nodes, sum_of, taken, check_sum, (node,))


SUMS: Mapping[Any, Pattern] = {aten.add.Tensor: _sum}
