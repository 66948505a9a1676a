"""Ranks that behave alike: replicas whose times cannot differ are computed once.

A rank's times follow from its program, from the times of the ranks that it has channels with, and from what
goes over these channels: which micro-batches, how many samples, over which kind of link. Colour refinement
(Weisfeiler and Leman) makes a partition of the ranks in which any two of one class have the same program and
channels of the same kinds to the same classes: an equitable partition. The times of a schedule are the only
solution of equations in which each time is a maximum over a rank's own last time and what came over its
channels, plus constants. Give every rank the times of its class in the smaller system of one rank a class:
all equations hold, for a maximum does not count how often a term is in it. So these are the times.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpp.plan import Plan

Devices = tuple[int, ...]
_Neighbour = tuple[int, int, int]  # twice the edge (+ 1 seen from downstream), kind of channel, rank


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """What goes over the channel of two replicas in one period of their stages' micro-batches.

    The period is the least common multiple of both sizes: `upstream` and `downstream` micro-batches. A
    message is (upstream micro-batch, downstream micro-batch, samples). `turns` are the places of the messages
    among all that the upstream replica sends over this edge after the same pass, where that matters.
    """

    upstream: int
    downstream: int
    messages: tuple[tuple[int, int, int], ...]
    turns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tie:
    """All channels of an edge, both ways, that behave alike, between ranks of class `source` and of `target`.

    `ends` are the devices of one of them.
    """

    edge: int
    source: int
    target: int
    pattern: Pattern
    ends: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Classes:
    """The class of each rank, the classes on each set of devices, and the ties between them."""

    of: dict[int, int]
    on: dict[Devices, tuple[int, ...]]
    ties: tuple[Tie, ...]


def alike(plan: Plan, in_turn: Collection[int]) -> Classes:
    """The classes of the plan's ranks, each on one set of devices.

    `in_turn` are stages for which the order of the messages after a forward matters (a send may wait, and
    hold up those after it). O(channels) a round of refinement; mostly one or two rounds.
    """
    graph, host = plan.stage_graph, plan.topology.host
    shared = {tuple(sorted(stage.devices)): None for stage in graph.stages}
    channels = []
    neighbours: dict[int, list[_Neighbour]] = {rank: [] for devices in shared for rank in devices}
    kinds: dict[tuple[object, ...], int] = {}
    for number, edge in enumerate(graph.edges):
        up, down = graph.stages[edge.source], graph.stages[edge.target]
        sizes = (up.micro_batch, len(up.devices), down.micro_batch, len(down.devices))
        for i, j, pattern in patterns(*sizes, edge.source in in_turn):
            a, b = up.devices[i], down.devices[j]
            kind = kinds.setdefault((pattern, a == b, host(a) == host(b)), len(kinds))
            neighbours[a].append((2 * number, kind, b))
            neighbours[b].append((2 * number + 1, kind, a))
            channels.append((number, kind, pattern, a, b))
    colours = _refined(list(shared), neighbours)
    classes = {colour: c for c, colour in enumerate(dict.fromkeys(colours[r] for r in neighbours))}
    of = {rank: classes[colour] for rank, colour in colours.items()}
    ties = {
        (number, kind, of[a], of[b]): Tie(number, of[a], of[b], pattern, (a, b))
        for number, kind, pattern, a, b in channels
    }
    on = {devices: tuple(dict.fromkeys(of[rank] for rank in devices)) for devices in shared}
    return Classes(of, on, tuple(ties.values()))


@lru_cache(maxsize=4096)
def patterns(
    upstream: int, up_replicas: int, downstream: int, down_replicas: int, in_turn: bool
) -> tuple[tuple[int, int, Pattern], ...]:
    """Every pair of replicas of two stages with these micro-batches that exchange messages, and which.

    The same ranges as `gpp.schedule.lower` makes: a message is the intersection of two pieces.
    """
    period = math.lcm(upstream, downstream)
    made, used = upstream // up_replicas, downstream // down_replicas
    found: dict[tuple[int, int], list[tuple[tuple[int, int, int], int]]] = defaultdict(list)
    sent: dict[tuple[int, int], int] = defaultdict(int)
    start = 0
    while start < period:
        stop = min((start // made + 1) * made, (start // used + 1) * used)
        i, replica = start // upstream, start // made % up_replicas
        message = (i, start // downstream, stop - start)
        found[replica, start // used % down_replicas].append((message, sent[replica, i]))
        sent[replica, i] += 1
        start = stop
    known: dict[tuple[object, ...], Pattern] = {}
    pairs = []
    for (a, b), messages in found.items():
        what = tuple(message for message, _ in messages)
        turns = tuple(turn for _, turn in messages) if in_turn else ()
        pattern = Pattern(period // upstream, period // downstream, what, turns)
        pairs.append((a, b, known.setdefault((what, turns), pattern)))
    return tuple(pairs)


def _refined(shared: Sequence[Devices], neighbours: dict[int, list[_Neighbour]]) -> dict[int, int]:
    """A colour for every rank: ranks of one colour see the same kinds of channels to the same colours.

    To and fro over the pipeline, so that a difference crosses it in one round.
    """
    colours = {rank: number for number, devices in enumerate(shared) for rank in devices}
    fresh = len(shared)
    split = [devices for devices in shared if len(devices) > 1]
    counts = dict.fromkeys(split, 1)
    changed = bool(split)
    while changed:
        changed = False
        for devices in (*split, *reversed(split)):
            seen: dict[tuple[object, ...], int] = {}
            found = {}
            for rank in devices:
                sees = frozenset((end, kind, colours[other]) for end, kind, other in neighbours[rank])
                found[rank] = seen.setdefault((colours[rank], sees), fresh + len(seen))
            if len(seen) > counts[devices]:
                counts[devices], changed = len(seen), True
                fresh += len(seen)
                colours.update(found)
    return colours
