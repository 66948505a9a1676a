"""Look-ups of tables.

embedding_bag of sums or means                   -> gpp_kernels.embedding_bag
embeddings of several tables by alike indices    -> the same, every index a bag of its own

Those of one kind in a graph, whose indices have the same shape and whose tables the same width, become one
launch behind the last of their arguments. A single embedding stays with torch: there is nothing to fuse.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from ..bags import POOLINGS
from ..embedding_bag import check_forward, embedding_bag
from .match import Call, LeftAlone, Match, Pattern, arguments, in_order, made, no_weights, same, with_sources
from .storage import storage, written

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _LookUp:
    """One table's: `result` is the node of its values, `passed` what makes it and is read by nobody else."""

    passed: tuple[fx.Node, ...]
    result: fx.Node
    table: fx.Node
    indices: fx.Node
    offsets: fx.Node | None
    options: tuple[str, bool]

    def is_like(self, other: "_LookUp") -> bool:
        """Whether one launch can make both."""
        if (self.offsets is None) is not (other.offsets is None) or self.options != other.options:
            return False
        ours, theirs = (
            [made(node) for node in (item.table, item.indices, item.offsets or item.indices)]
            for item in (self, other)
        )
        if [value.dtype for value in ours] != [value.dtype for value in theirs]:
            return False
        alike = ours[0].shape[1:] == theirs[0].shape[1:]
        return alike and same(tuple(ours[2].shape), tuple(theirs[2].shape))


def _bag(node: fx.Node) -> _LookUp:
    given = arguments(node)
    no_weights(given, "per_sample_weights", "padding_idx")
    _has_a_plain_gradient(given)
    if given["mode"] >= len(POOLINGS):
        raise LeftAlone(f"its bags are neither of {', '.join(POOLINGS)}")
    parts = [user for user in node.users if user.users]
    if [part.args[1] for part in parts] != [0]:
        raise LeftAlone("more is read of it than the bags")
    indices, offsets = given["indices"], given["offsets"]
    passed = (node, *(user for user in node.users if not user.users))
    last = bool(given["include_last_offset"])
    square = None if last else _of_one_size(indices, offsets)
    if square is not None:
        passed, indices, offsets = with_sources(passed, (indices, offsets)), square, None
    if made(indices).dim() != 1 and square is None:
        raise LeftAlone(f"its indices have {made(indices).dim()} dimensions and offsets")
    return _LookUp(passed, parts[0], given["weight"], indices, offsets, (POOLINGS[given["mode"]], last))


def _of_one_size(indices: fx.Node, offsets: fx.Node) -> fx.Node | None:
    """The indices as [bags, size], where they were flattened from that and the offsets count in steps."""
    if offsets.target is not aten.arange.start_step or indices.target not in _FLATTENED:
        return None
    start, _, step = (offsets.args[i] if i < len(offsets.args) else None for i in range(3))
    square = indices.args[0]
    assert isinstance(square, fx.Node)
    bags, *size = made(square).shape
    counts = len(size) == 1 and same(size[0], step) and same(made(offsets).shape[0], bags)
    return square if start == 0 and counts and made(indices).dim() == 1 else None


_FLATTENED = (aten.reshape.default, aten.view.default, aten.flatten.using_ints)


def _embedding(node: fx.Node) -> _LookUp:
    given = arguments(node)
    _has_a_plain_gradient(given)
    padding = given["padding_idx"]
    if padding != -1:
        raise LeftAlone("it has a padding_idx, the operator none")
    return _LookUp((), node, given["weight"], given["indices"], None, ("sum", False))


def _has_a_plain_gradient(given: Mapping[str, Any]) -> None:
    if given["sparse"]:
        raise LeftAlone("its gradient is sparse, graphs of stages have dense ones")
    if given["scale_grad_by_freq"]:
        raise LeftAlone("its gradient is divided by how often a row occurs")


def _together(look_up: Callable[[fx.Node], _LookUp], node: fx.Node) -> Match:
    """The look-up at `node` and those behind it that can be made in the same place."""
    place = {n: number for number, n in enumerate(node.graph.nodes)}
    found = [look_up(node)]
    overwritten = set().union(*map(written, place))
    if storage(found[0].result) in overwritten:
        raise LeftAlone("what it makes is overwritten later")

    def span(items: list[_LookUp]) -> bool:
        """Whether all arguments are there before the first result is read."""
        given = [n for item in items for n in (item.table, item.indices, item.offsets) if n is not None]
        readers = [place[user] for item in items for user in item.result.users]
        return max(place[n] for n in given) < min(readers, default=len(place))

    for other in node.graph.nodes:
        if place[other] <= place[node] or other.target is not node.target:
            continue
        try:
            candidate = look_up(other)
        except LeftAlone:
            continue
        tables = {item.table for item in found}
        if candidate.table in tables or storage(candidate.result) in overwritten:
            continue
        if candidate.is_like(found[0]) and span([*found, candidate]):
            found.append(candidate)
    if node.target is aten.embedding.default and len(found) < 2:
        raise LeftAlone("no other table is read by alike indices: a single look-up stays with torch")
    return _match(found)


def _match(found: list[_LookUp]) -> Match:
    """The call for look-ups that are alike."""
    results = in_order(item.result for item in found)
    items = sorted(found, key=lambda item: results.index(item.result))
    pooling, last = items[0].options
    single = items[0].result.target is aten.embedding.default
    arguments = (
        [item.table for item in items],
        [Call(aten.unsqueeze.default, (item.indices, -1)) if single else item.indices for item in items],
        [item.offsets for item in items if item.offsets is not None],
        pooling,
        last,
        False,
    )
    nodes = in_order(node for item in items for node in (*item.passed, item.result))
    return Match(nodes, embedding_bag, arguments, check_forward, results, stacked=True)


EMBEDDINGS: Mapping[Any, Pattern] = {
    aten.embedding_bag.default: partial(_together, _bag),
    aten.embedding_bag.padding_idx: partial(_together, _bag),
    aten.embedding.default: partial(_together, _embedding),
}
