"""The pairwise interaction of DLRM, as its models are written by hand.

    products = bmm(x, x transposed)[:, i, j]     for the pairs i > j, row by row  -> gpp_kernels.interaction
    cat([x[:, 0], ..., products], 1)             its first rows in front of that  -> the same call makes both

What x is made of shows which values are its rows: a stack of vectors, or a view of vectors side by side. The
pairs must be constants of the graph.
"""

import operator
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

from ..interaction import check_forward, interaction
from .match import LeftAlone, Match, Pattern, arguments, attribute, made, same, with_sources, without_casts

aten = torch.ops.aten
_CONSTANT = (
    aten.tril_indices.default,
    aten.unbind.int,
    aten.select.int,
    aten.lift_fresh_copy.default,
    aten.detach.default,
    aten.detach_.default,
    operator.getitem,
)
_END = 2**62  # of a slice that goes up to the end, at the least


def _interaction(node: fx.Node) -> Match | None:
    x, turned = node.args
    assert isinstance(x, fx.Node) and isinstance(turned, fx.Node)
    if made(x).dim() != 3 or not _is_transposed(turned, without_casts(x)):
        return None
    index, taken = _pairs_taken(node)
    _, *pairs = arguments(index)["indices"]
    _check_pairs(pairs, int(made(x).shape[1]))
    sources = {turned, *_sources(turned), *(s for pair in pairs for s in (pair, *_sources(pair)))} - {x}
    joined, dense = _joined(index, x)
    nodes = (node, *taken, index, *([] if joined is index else [joined]))
    return Match(with_sources(nodes, sources), interaction, (x, dense), check_forward, (joined,))


def _is_transposed(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is x with dimensions 1 and 2 in turn, in whatever dtype."""
    node = without_casts(node)
    match node.target:
        case aten.transpose.int:
            turned = {dimension % 3 for dimension in node.args[1:] if isinstance(dimension, int)} == {1, 2}
        case aten.permute.default:
            order: Any = node.args[1]
            turned = [dimension % 3 for dimension in order] == [0, 2, 1]
        case aten.mT.default:
            turned = True
        case _:
            return False
    source = node.args[0]
    return turned and isinstance(source, fx.Node) and without_casts(source) is x


def _pairs_taken(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node that takes pairs out of products, and what is on the way to it: slices that take all."""
    passed: list[fx.Node] = []
    while True:
        readers = list(node.users)
        if len(readers) != 1:
            raise LeftAlone(f"{len(readers)} nodes read its products")
        (node,) = readers
        if node.target is aten.index.Tensor:
            first, *pairs = arguments(node)["indices"]
            if first is not None or len(pairs) != 2 or None in pairs:
                raise LeftAlone(f"{node.name} takes no pairs of all samples out of its products")
            return node, passed
        if node.target is not aten.slice.Tensor or not _takes_all(node):
            raise LeftAlone(f"{node.name} reads its products, not an index that takes pairs of them")
        passed.append(node)


def _takes_all(node: fx.Node) -> bool:
    given = arguments(node)
    end = given["end"]
    return (
        not given["start"] and (end is None or (isinstance(end, int) and end > _END)) and given["step"] == 1
    )


def _check_pairs(pairs: list[fx.Node], features: int) -> None:
    """The pairs are those below the diagonal, row by row; products are the same on both of its sides."""
    first, second = (_constant(pair) for pair in pairs)
    expected = torch.tril_indices(features, features, -1)
    given = torch.stack([torch.maximum(first, second), torch.minimum(first, second)])
    if first.shape != second.shape or not torch.equal(given, expected):
        raise LeftAlone("the pairs that are taken are not those below the diagonal, row by row")


def _constant(node: fx.Node) -> Any:
    """What a node makes of constants, on the CPU; LeftAlone if it reads anything else."""
    if node.op == "get_attr":
        value = attribute(node)
        if isinstance(value, Tensor) and value.device.type != "meta":
            return value.detach().cpu()
    elif node.target in _CONSTANT:
        options = {key: value for key, value in node.kwargs.items() if key not in ("device", "pin_memory")}
        call: Any = node.target
        return call(*fx.map_arg(node.args, _constant), **options)
    raise LeftAlone(f"which pairs are taken is not known: {node.name} is no constant")


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """What a node is made of by calls that may be in no other's interest: transposing, casting, constants."""
    for source in node.all_input_nodes:
        yield source
        if node.target in _CONSTANT or without_casts(node) is not node:
            yield from _sources(source)


def _joined(products: fx.Node, x: fx.Node) -> tuple[fx.Node, int]:
    """The node that puts rows of x in front of the products, and how many; else the products, and 0."""
    readers = list(products.users)
    if len(readers) == 1 and readers[0].target is aten.cat.default:
        parts: Any = readers[0].args[0]
        *front, last = parts
        rows = _rows(without_casts(x))[: len(front)]
        fits = last is products and arguments(readers[0])["dim"] in (1, -1) and len(rows) == len(front)
        if fits and all(_is_copied(*pair, made(x).dtype) for pair in zip(front, rows, strict=True)):
            return readers[0], len(front)
    return products, 0


def _is_copied(part: fx.Node, row: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a part is what becomes of a row in this dtype: the row is not rounded to others before."""
    if made(part).dtype != dtype or without_casts(part) is not without_casts(row):
        return False
    while without_casts(row) is not row:
        if made(row).dtype not in (dtype, torch.float32, torch.float64):
            return False
        (row,) = row.all_input_nodes
    return True


def _is_raised(part: fx.Node) -> bool:
    return part.target is aten.unsqueeze.default and part.args[1] in (1, -2)


def _rows(x: fx.Node) -> list[fx.Node]:
    """The vectors that are the first rows of x, as far as it shows."""
    parts: Any = x.args[0] if x.args else None
    if x.target is aten.stack.default:
        return list(parts) if arguments(x)["dim"] in (1, -2) else []
    if x.target is aten.cat.default and arguments(x)["dim"] in (1, -2):
        raised = takewhile(_is_raised, map(without_casts, parts))
        rows: list[Any] = [part.args[0] for part in raised]
        return rows
    if x.target in (aten.view.default, aten.reshape.default) and parts.target is aten.cat.default:
        width = made(x).shape[2]
        if arguments(parts)["dim"] in (1, -1) and made(parts).dim() == 2:
            return list(takewhile(lambda part: same(made(part).shape[1], width), parts.args[0]))
    return []


INTERACTIONS: Mapping[Any, Pattern] = {aten.bmm.default: _interaction, aten.matmul.default: _interaction}
