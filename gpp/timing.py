"""The seconds of a training step, as `gpp.simulate` gives them, without its trace: the judge in a search.

Makes the recurrence of a plan (`gpp.recurrence`), with one rank of every class of ranks that behave alike
(`gpp.alike`). Where gradients return, no send ever waits and no buffer is ever lacking: that is how many
slots channels have (`gpp.schedule.slots`). The channels of other edges are guarded.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gpp.alike import Tie, alike
from gpp.plan import Plan, Stage
from gpp.recurrence import Actor, Channel, Entry, Guard, Meeting, Post, Rank, carry, compute, run
from gpp.schedule.lower import closing, returns_gradient
from gpp.schedule.order import sharing
from gpp.schedule.slots import activation_slots
from gpp.schedule.task import INPUT_HALF, Pass, Reduce, Samples, Task, Update
from gpp.schedule.trips import KINDS, trips
from gpp.simulate import pass_seconds, reduce_seconds

STEPS = 3  # as `simulate` by default; the last one counts
SAME = 1e-12  # of the time: what differs by less is the same
UP, DOWN = 0, 1  # the ends of an edge


def step_seconds(plan: Plan) -> float:
    """`gpp.simulate.simulate(plan).step_seconds`, to rounding.

    If the second step took every rank and every channel by the same time further than the first, so would the
    third: it is left out. (Adding a constant to all times at the start of a step adds it to all times at its
    end, and times that differ by at most e stay so.) O(classes x micro-batches x edges of a stage), about
    1 us each. Raises ScheduleError if the schedule cannot be or deadlocks.
    """
    system = _system(plan)
    before: list[float] = []
    for step in range(STEPS):
        run(system.actors)
        after = system.state()
        if step:
            gained = [b - a for a, b in zip(before, after, strict=True)]
            if max(gained) - min(gained) <= SAME * max(after):
                break
        before = after
    return max(rank.ends[-1] - rank.ends[-2] for rank in system.ranks)


@dataclass(frozen=True, slots=True)
class _Way:
    """One way of a tie: its channel, the guard if it has one, and the seconds of a message by its samples."""

    tie: Tie
    channel: Channel
    guard: Guard | None
    travel: dict[int, float]

    def post(self, samples: int) -> Post:
        """How a message of so many samples is sent."""
        if self.guard is None:
            return None, self.channel.there, self.channel.last, self.travel[samples]
        return self.guard.slots, self.guard.sent, self.channel.last, 0.0

    def messages(self, end: int, n: int) -> list[tuple[int, int]]:
        """Turn and samples of the messages that belong to micro-batch n of the stage at this end."""
        pattern = self.tie.pattern
        n %= (pattern.upstream, pattern.downstream)[end]
        turns = pattern.turns or (0,) * len(pattern.messages)
        return [(turn, m[2]) for turn, m in zip(turns, pattern.messages, strict=True) if m[end] == n]


@dataclass(frozen=True, slots=True)
class _Ways:
    """What leaves and reaches a stage on one class of ranks: activations, gradients."""

    made: list[_Way] = field(default_factory=list)
    read: list[_Way] = field(default_factory=list)
    gradients_made: list[_Way] = field(default_factory=list)
    gradients_read: list[_Way] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _System:
    """All that computes, in the order of the pipeline, and all that is kept from step to step."""

    ranks: list[Rank] = field(default_factory=list)
    actors: list[Actor] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)

    def state(self) -> list[float]:
        """The times that those of the next step depend on."""
        kept = [rank.ends[-1] for rank in self.ranks] + [channel.last[0] for channel in self.channels]
        for guard in self.guards:
            kept += [*guard.slots, *guard.free]
        return kept


def _system(plan: Plan) -> _System:
    graph = plan.stage_graph
    shared = sharing(plan)
    orders = trips(plan, shared)
    walks = {s: w for found, held in shared.items() for s, w in zip(held, orders[found].walks, strict=True)}
    guarded = {number for number, edge in enumerate(graph.edges) if not returns_gradient(graph, edge)}
    classes = alike(plan, {graph.edges[number].source for number in guarded})
    system = _System()
    ways: dict[tuple[int, int], _Ways] = defaultdict(_Ways)  # by class and stage
    carriers: dict[int, list[Actor]] = defaultdict(list)  # by the class that sends
    for tie in classes.ties:
        edge = graph.edges[tie.edge]
        source, target = ways[tie.source, edge.source], ways[tie.target, edge.target]
        way = _way(plan, tie, edge.bytes)
        system.channels.append(way.channel)
        if tie.edge in guarded:
            messages = _messages(plan, tie)
            slots = activation_slots(walks[edge.source], walks[edge.target], [m[:2] for m in messages])
            guard = Guard(way.channel, deque([0.0] * slots), deque([0.0] * slots))
            carriers[tie.source].append(carry(guard, [way.travel[m[2]] for m in messages]))
            system.guards.append(guard)
            way = replace(way, guard=guard)
        else:
            back = _way(plan, tie, edge.gradient_bytes)
            system.channels.append(back.channel)
            target.gradients_made.append(back)
            source.gradients_read.append(back)
        source.made.append(way)
        target.read.append(way)
    meetings: dict[tuple[object, ...], Meeting] = {}
    for devices, held in shared.items():
        stages = [graph.stages[s] for s in held]
        order = orders[devices].real([stage.has_backward for stage in stages])
        ending = closing(plan, held)
        met = [_meeting(plan, i, meetings) for i in ending if isinstance(i, Reduce)]
        updates = [graph.stages[i.stage].seconds.update for i in ending if isinstance(i, Update)]
        for c in classes.on[devices]:
            entries = [_entries(stage, ways[c, s]) for s, stage in zip(held, stages, strict=True)]
            for meeting in met:
                meeting.members += 1
            rank = Rank(_program(order, entries), met, sum(updates))
            system.ranks.append(rank)
            system.actors.extend([compute(rank), *carriers[c]])
    return system


def _way(plan: Plan, tie: Tie, size: int) -> _Way:
    a, b = tie.ends
    link = plan.topology.link(a, b)
    travel = {n: 0.0 if a == b else link.seconds(size * n) for _, _, n in tie.pattern.messages}
    return _Way(tie, Channel(deque(), [0.0]), None, travel)


def _messages(plan: Plan, tie: Tie) -> list[tuple[int, int, int]]:
    """All of a step: upstream and downstream micro-batch, samples."""
    pattern = tie.pattern
    upstream = plan.stage_graph.stages[plan.stage_graph.edges[tie.edge].source]
    return [
        (start * pattern.upstream + i, start * pattern.downstream + j, samples)
        for start in range(plan.mini_batch // (upstream.micro_batch * pattern.upstream))
        for i, j, samples in pattern.messages
    ]


def _meeting(plan: Plan, reduction: Reduce, known: dict[tuple[object, ...], Meeting]) -> Meeting:
    key = (reduction.what, reduction.stage, reduction.shared)
    if key not in known:
        known[key] = Meeting(reduce_seconds(plan, reduction))
    return known[key]


def _entries(stage: Stage, ways: _Ways) -> list[list[Entry]]:
    """For each of KINDS its passes, of as many micro-batches as until their messages repeat themselves."""
    part = Samples(0, stage.micro_batch // len(stage.devices))
    seconds = [pass_seconds(stage, Task(kind, 0, part)) for kind in KINDS]
    last = (Pass.BACKWARD, Pass.BACKWARD_WEIGHT) if stage.has_backward else (Pass.FORWARD,)
    up = [way.tie.pattern.upstream for way in ways.made]
    down = [way.tie.pattern.downstream for way in ways.read]
    found: list[list[Entry]] = [[] for _ in KINDS]
    for n in range(math.lcm(*up, *down)):
        activations = (
            [way.channel.there for way in ways.read for _ in way.messages(DOWN, n)],
            _posts(ways.made, UP, n),
        )
        gradients = (
            [way.channel.there for way in ways.gradients_read for _ in way.messages(UP, n)],
            _posts(ways.gradients_made, DOWN, n),
        )
        freed = [way.guard.free for way in ways.read if way.guard for _ in way.messages(DOWN, n)]
        for number, kind in enumerate(KINDS):
            reads, posts = (
                activations if kind is Pass.FORWARD else gradients if kind in INPUT_HALF else ([], [])
            )
            found[number].append((seconds[number], reads, posts, freed if kind in last else []))
    return found


def _posts(ways: Sequence[_Way], end: int, n: int) -> list[Post]:
    """What is sent after a pass, by edge and then by samples."""
    found = [
        (way.tie.edge, turn, way.post(samples)) for way in ways for turn, samples in way.messages(end, n)
    ]
    return [post for _, _, post in sorted(found, key=lambda item: item[:2])]


def _program(order: Sequence[int], stages: Sequence[list[list[Entry]]]) -> list[Entry]:
    """The passes in the order of these codes (`gpp.schedule.trips.Trip`)."""
    entries = [entries for kinds in stages for entries in kinds]
    if all(len(found) == 1 for found in entries):
        return [entries[code][0] for code in order]
    counts = [0] * len(entries)
    program = []
    for code in order:
        program.append(entries[code][counts[code] % len(entries[code])])
        counts[code] += 1
    return program
