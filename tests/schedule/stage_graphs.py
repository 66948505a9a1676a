"""The stage graphs on which schedules are compared: chains, fan-ins, unequal branches, diamonds."""

import random
from collections.abc import Sequence

from gpp.plan import Plan, StageSeconds
from gpp.topology import Link
from tests.strategies import chain, make_plan

Edges = list[tuple[int, int]]


def fan_in(lengths: Sequence[int], join: int) -> Edges:
    """Branches of these lengths, and a chain of `join` stages after all of them."""
    edges: Edges = []
    first, ends = 0, []
    for length in lengths:
        edges += [(s, s + 1) for s in range(first, first + length - 1)]
        first += length
        ends.append(first - 1)
    return [*edges, *((end, first) for end in ends), *((s, s + 1) for s in range(first, first + join - 1))]


def diamond(lengths: Sequence[int], join: int, *, skip: bool = False) -> Edges:
    """One stage, branches of these lengths (and an edge past them), and a chain of `join` stages."""
    branches = [(u + 1, v + 1) for u, v in fan_in(lengths, join)]
    heads = [1 + sum(lengths[:i]) for i in range(len(lengths))]
    over = [(0, 1 + sum(lengths))] if skip else []
    return [*((0, head) for head in heads), *over, *branches]


def in_a_row(first: Edges, second: Edges) -> Edges:
    """The second graph's source is the first one's last stage."""
    last = max(v for _, v in first)
    return [*first, *((u + last, v + last) for u, v in second)]


GRAPHS: dict[str, Edges] = {
    "chain 4": chain(4),
    "chain 8": chain(8),
    "chain 16": chain(16),
    "4 x 2 + 1": fan_in([2] * 4, 1),
    "4 x 4 + 1": fan_in([4] * 4, 1),
    "4 x 4 + 2": fan_in([4] * 4, 2),
    "4 x 8 + 2": fan_in([8] * 4, 2),
    "7 x 1 + 2": fan_in([1] * 7, 2),
    "7 x 2 + 2": fan_in([2] * 7, 2),
    "7 x 4 + 4": fan_in([4] * 7, 4),
    "1, 4 + 1": fan_in([1, 4], 1),
    "1, 2, 3, 4 + 2": fan_in([1, 2, 3, 4], 2),
    "2, 8 + 2": fan_in([2, 8], 2),
    "diamond 2 x 2": diamond([2, 2], 1),
    "diamond 4 x 2": diamond([2] * 4, 2),
    "diamond 1, 3": diamond([1, 3], 1),
    "diamond 3, 3 and skip": diamond([3, 3], 1, skip=True),
    "two diamonds 3 x 2": in_a_row(diamond([2] * 3, 1), diamond([2] * 3, 1)),
}


def paced(edges: Edges, rounds: int, latency: float = 0.0, spread: float = 0.0) -> Plan:
    """Single-sample micro-batches; every pass takes 1 second, evenly +-spread by stage."""
    count = 1 + max(v for _, v in edges)
    draw = random.Random(f"{edges}")
    scales = [draw.uniform(1 - spread, 1 + spread) for _ in range(count)]
    return make_plan(
        sorted(edges),
        [1] * count,
        rounds,
        seconds=[StageSeconds(scale, scale, scale) for scale in scales],
        link=Link(latency, float("inf")),
    )
