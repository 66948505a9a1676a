"""A plan that is still being shaped: the few numbers of each stage that its step time and memory follow from.

What `estimate.assemble` would make of the same stages, without names, tensors and records, so that the
search can look at thousands. Stages are made of units (`gpp.planner.units`), so no draft breaks the user's
constraints. The sum of tied parameters' gradients over stages is left to the exact simulation. Seconds,
bytes, samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gpp.cost import all_reduce_seconds
from gpp.plan import Plan, shared_out
from gpp.topology import Link

from .estimate import Group, Problem
from .intervals import operator_seconds, takes_part_in_backward
from .pace import Beat, Hop
from .placement import place
from .units import stage_degrees

Places = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A stage to be: its units and how many devices it gets."""

    units: frozenset[int]
    devices: int
    recompute: bool = False
    shard_optimizer: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of a replica whatever is in flight, and of its stash per sample; a stage that recomputes has that
    only for one micro-batch and those between their input half and their weight half."""

    static: float
    stash: float
    recompute: bool


@dataclass(frozen=True)
class Draft:
    """Stages in a topological order: `parts` on `places`, on the clock as `beats` and `hops`; `rooms` on
    their devices; `messages` are bytes a sample of each hop, there and back."""

    parts: tuple[Part, ...]
    places: Places
    micro_batch: int
    beats: tuple[Beat, ...]
    hops: tuple[Hop, ...]
    rooms: tuple[Room, ...]
    messages: tuple[tuple[int, int], ...]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Stages on the longest path from each to a sink."""
        found = [1] * len(self.parts)
        for hop in reversed(self.hops):  # sorted by source
            found[hop.source] = max(found[hop.source], found[hop.target] + 1)
        return tuple(found)

    def memory(self, warms: Sequence[int], lags: Sequence[int]) -> list[float]:
        """Bytes on each device of every stage; `gpp.plan.stage_memory` with these micro-batches in flight."""
        found = []
        for room, part, warm, lag in zip(self.rooms, self.parts, warms, lags, strict=True):
            held = min(1 + lag, warm + lag) if room.recompute else warm + lag
            found.append(room.static + room.stash * held * self.micro_batch / part.devices)
        for hop, (there, back) in zip(self.hops, self.messages, strict=True):
            ahead, lag = warms[hop.source], lags[hop.target]
            size = (there * (ahead + (lag + 1 if lag else 0)) + back * ahead) * self.micro_batch
            for s in (hop.source, hop.target):
                found[s] += size / self.parts[s].devices
        return found


class Drafts:
    """Makes drafts for one micro-batch size; what several have in common is worked out once.

    A draft costs O(tensors + stages) Python steps: 50-300 us.
    """

    def __init__(self, problem: Problem, micro_batch: int) -> None:
        self.problem, self.micro_batch = problem, micro_batch
        self.rounds = problem.options.mini_batch // micro_batch
        graph, units = problem.graph, problem.units
        unit_of = units.unit_of
        readers: dict[str, set[int]] = {}
        for i, op in enumerate(graph.operators):
            for name in op.inputs:
                readers.setdefault(name, set()).add(unit_of[i])
        self.tensors = []  # producer, readers elsewhere, bytes there, bytes back
        for name, found in readers.items():
            tensor, source = graph.tensors[name], unit_of[graph.producer[name]]
            if found - {source}:
                back = tensor.bytes if tensor.needs_grad else 0
                self.tensors.append((source, tuple(sorted(found - {source})), tensor.bytes, back))
        self._seconds: dict[tuple[int, tuple[int, ...]], list[list[float]]] = {}
        self._stages: dict[object, tuple[Beat, Room]] = {}  # of places that are alike
        self._placed: dict[tuple[Part, tuple[int, ...]], tuple[Beat, Room]] = {}
        self._places: dict[tuple[int, ...], Places] = {}
        self._links: dict[tuple[tuple[int, ...], tuple[int, ...]], Link] = {}
        self._allowed: dict[frozenset[int], tuple[int, ...]] = {}

    @cached_property
    def meeting(self) -> float | None:
        """Seconds of what every stage has to agree on at the end of a step."""
        graph, options, topology = self.problem.graph, self.problem.options, self.problem.topology
        scalars = graph.loss_weighted + options.global_norm
        count = len(topology.devices)
        if not scalars or count < 2:
            return None
        link = topology.inside if count <= topology.per_host else topology.between
        return scalars * 2 * math.ceil(math.log2(count)) * link.latency

    def degrees(self, units: frozenset[int]) -> tuple[int, ...]:
        """Replicas that a stage of these units may have; none: it may not be one."""
        if units not in self._allowed:
            self._allowed[units] = stage_degrees(self.problem, units, self.micro_batch)
        return self._allowed[units]

    def draft(self, parts: Sequence[Part]) -> Draft | None:
        """Devices go by the order given. None: the parts wait for each other in a circle, are more than there
        are devices, or break a rule."""
        if sum(part.devices for part in parts) > len(self.problem.topology.devices):
            return None
        if any(part.devices not in self.degrees(part.units) for part in parts):
            return None
        owner = {u: number for number, part in enumerate(parts) for u in part.units}
        edges: dict[tuple[int, int], tuple[int, int]] = {}
        for source, readers, there, back in self.tensors:
            s = owner[source]
            for t in {owner[reader] for reader in readers}:
                if t != s:
                    a, b = edges.get((s, t), (0, 0))
                    edges[s, t] = (a + there, b + back)
        order = _topological(len(parts), edges)
        if order is None:
            return None
        rank = {number: at for at, number in enumerate(order)}
        places = self.places(tuple(part.devices for part in parts))
        stages = [self.stage(parts[i], places[i]) for i in order]
        hops, messages = [], []
        for (s, t), (there, back) in sorted(edges.items(), key=lambda e: (rank[e[0][0]], rank[e[0][1]])):
            link = self._link(places[s], places[t])
            samples = self.micro_batch / max(parts[s].devices, parts[t].devices)
            returns = back > 0 and stages[rank[s]][0].trains and stages[rank[t]][0].trains
            hops.append(
                Hop(
                    rank[s],
                    rank[t],
                    link.seconds(there * samples),
                    link.seconds(back * samples) if returns else None,
                )
            )
            messages.append((there, back))
        return Draft(
            parts=tuple(parts[i] for i in order),
            places=tuple(places[i] for i in order),
            micro_batch=self.micro_batch,
            beats=tuple(beat for beat, _ in stages),
            hops=tuple(hops),
            rooms=tuple(room for _, room in stages),
            messages=tuple(messages),
        )

    def groups(self, draft: Draft) -> list[Group]:
        """The draft's stages for `estimate.assemble`."""
        return [self.group(part, place) for part, place in zip(draft.parts, draft.places, strict=True)]

    def group(self, part: Part, place: tuple[int, ...]) -> Group:
        """One of them."""
        return Group(
            tuple(sorted(self.problem.units.operators(sorted(part.units)))),
            part.devices,
            recompute=part.recompute,
            shard_optimizer=part.shard_optimizer,
            at=place,
        )

    def parts(self, groups: Sequence[Group]) -> tuple[Part, ...]:
        """Groups, which keep units together, as parts."""
        unit_of = self.problem.units.unit_of
        return tuple(
            Part(
                frozenset(unit_of[i] for i in group.operators),
                group.devices,
                group.recompute,
                group.shard_optimizer,
            )
            for group in groups
        )

    def parts_of(self, plan: Plan) -> tuple[Part, ...]:
        """A plan's stages as parts, in the order of their devices."""
        index, unit_of = self.problem.graph.index, self.problem.units.unit_of
        stages = sorted(plan.stage_graph.stages, key=lambda stage: stage.devices)
        return tuple(
            Part(
                frozenset(unit_of[index[name]] for name in stage.operators),
                len(stage.devices),
                stage.recompute,
                stage.shard_optimizer,
            )
            for stage in stages
        )

    def places(self, counts: tuple[int, ...]) -> Places:
        """Devices of stages with so many replicas, in this order."""
        if counts not in self._places:
            self._places[counts] = tuple(place(counts, self.problem.topology))
        return self._places[counts]

    def _link(self, one: tuple[int, ...], other: tuple[int, ...]) -> Link:
        """The slower link that messages between two stages take."""
        if (one, other) not in self._links:
            topology = self.problem.topology
            count = math.lcm(len(one), len(other))
            pairs = {(one[i * len(one) // count], other[i * len(other) // count]) for i in range(count)}
            links = {topology.link(a, b) for a, b in pairs}
            self._links[one, other] = max(links, key=lambda link: (link.seconds(1e6), link.latency))
        return self._links[one, other]

    def stage(self, part: Part, place: tuple[int, ...]) -> tuple[Beat, Room]:
        """A stage on these devices: its times, and its bytes."""
        found = self._placed.get((part, place))
        if found is None:
            topology = self.problem.topology
            kinds = tuple(dict.fromkeys(topology.devices[d] for d in place))
            key = (part, kinds, len({topology.host(d) for d in place}))
            if key not in self._stages:
                self._stages[key] = self._priced(part, place)
            found = self._placed[part, place] = self._stages[key]
        return found

    def _priced(self, part: Part, place: tuple[int, ...]) -> tuple[Beat, Room]:
        problem, topology, degree = self.problem, self.problem.topology, part.devices
        ops = problem.units.operators(part.units)
        devices = tuple(sorted({topology.devices.index(topology.devices[d]) for d in place}))
        seconds = self._operators(degree, devices)
        halves = [max(sum(row[i] for i in ops) for row in rows) for rows in zip(*seconds, strict=True)]
        forward, backward_input, backward_weight = halves
        operators = [problem.graph.operators[i] for i in ops]
        parameters = {p.name: p for op in operators for p in op.parameters}
        sizes = {p.name: p.bytes for p in parameters.values() if p.trainable}
        trainable = owned = sum(sizes.values())
        update = 0.0
        if part.shard_optimizer and degree > 1 and trainable:
            shares = shared_out(sizes, degree)
            owned = max(sum(n for p, n in sizes.items() if shares[p] == i) for i in range(degree))
            hosts = {topology.host(d) for d in place}
            ring = topology.inside if len(hosts) == 1 else topology.between
            update = all_reduce_seconds(trainable, degree, ring) / 2
        if trainable:
            update += max(problem.costs.update(owned, topology.devices[d]) for d in devices)
        trains = any(takes_part_in_backward(problem.graph, op) for op in operators)
        beat = Beat(
            forward=forward,
            input=backward_input + (forward if part.recompute and trains else 0.0),
            weight=backward_weight,
            reduce=self._reduce(trainable, place),
            update=update,
            trains=trains,
        )
        static = sum(p.bytes for p in parameters.values()) + trainable
        static += sum(op.buffer_bytes for op in operators)
        optimizer = int(problem.options.optimizer_factor * owned)
        return beat, Room(static + optimizer, sum(op.stash for op in operators), part.recompute)

    def _operators(self, degree: int, devices: tuple[int, ...]) -> list[list[list[float]]]:
        """Seconds by device kind, pass and operator."""
        found = []
        for device in devices:
            key = (degree, (device,))
            if key not in self._seconds:
                problem = self.problem
                kinds = (problem.topology.devices[device],)
                samples = self.micro_batch / degree
                self._seconds[key] = operator_seconds(problem.graph, problem.costs, kinds, samples).tolist()
            found.append(self._seconds[key])
        return found

    def _reduce(self, size: float, place: tuple[int, ...]) -> float:
        """As `gpp.simulate.reduce_seconds`: a ring over the group's slowest link."""
        if len(place) < 2 or not size:
            return 0.0
        topology = self.problem.topology
        hosts = len({topology.host(d) for d in place})
        links = [topology.inside] if hosts < len(place) else []
        links += [topology.between] if hosts > 1 else []
        return max(all_reduce_seconds(size, len(place), link) for link in links)


def _topological(count: int, edges: dict[tuple[int, int], tuple[int, int]]) -> list[int] | None:
    """The first of what is ready next; None where there is a circle."""
    import heapq

    waits = [0] * count
    out: list[list[int]] = [[] for _ in range(count)]
    for s, t in edges:
        waits[t] += 1
        out[s].append(t)
    ready = [i for i in range(count) if not waits[i]]
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for t in out[i]:
            waits[t] -= 1
            if not waits[t]:
                heapq.heappush(ready, t)
    return order if len(order) == count else None
