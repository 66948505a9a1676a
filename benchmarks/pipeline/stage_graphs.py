"""Stage graphs on which schedules are compared: chains, fan-ins, branches, diamonds; and their plans."""

import random
from collections.abc import Sequence

from gpp.plan import Edge, Fingerprints, Plan, Policy, Stage, StageGraph, StageSeconds
from gpp.schedule.inflight import in_flight
from gpp.topology import Device, DeviceTopology, Link

Edges = list[tuple[int, int]]

BYTES = 8  # of a message's sample, where nothing else is said
DEVICE = Device("any", memory=float("inf"), flops=1.0, bandwidth=1.0)


def chain(count: int) -> Edges:
    """Stages one after the other."""
    return [(u, u + 1) for u in range(count - 1)]


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


def paced(
    edges: Edges,
    rounds: int,
    latency: float = 0.0,
    spread: float = 0.0,
    *,
    unit: float = 1.0,
    scales: Sequence[float] | None = None,
) -> Plan:
    """1F1B with single-sample micro-batches; every pass takes `unit` seconds, evenly +-spread by stage or
    times `scales`. A device for each stage."""
    pairs = sorted(edges)
    count = 1 + max((v for _, v in pairs), default=0)
    if scales is None:
        draw = random.Random(f"{edges}")
        scales = [draw.uniform(1 - spread, 1 + spread) for _ in range(count)]
    after = [[v for u, v in pairs if u == s] for s in range(count)]
    held = in_flight(after, [1] * count, Policy(), rounds)
    link = Link(latency, float("inf"))
    stages = tuple(
        Stage(
            name=f"stage{s}",
            operators=(f"operator{s}",),
            devices=(s,),
            micro_batch=1,
            in_flight=held[s],
            seconds=StageSeconds(unit * scale, unit * scale, unit * scale),
            parameter_bytes=100,
            trainable_bytes=100,
            terms=() if after[s] else (f"loss{s}",),
            has_backward=True,
        )
        for s, scale in enumerate(scales)
    )
    joins = tuple(Edge(u, v, (f"value{u}to{v}",), BYTES, BYTES) for u, v in pairs)
    return Plan(
        stage_graph=StageGraph(stages, joins, ()),
        topology=DeviceTopology("any", (DEVICE,) * count, count, link, link),
        mini_batch=rounds,
        policy=Policy(),
        fingerprints=Fingerprints("graph", "costs", "topology"),
        planner="by hand",
    )
