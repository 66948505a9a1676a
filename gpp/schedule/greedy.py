"""Orders chosen on a clock: what a device does next depends on what has come, not on a fixed pattern.

An event-driven run of whole micro-batches, replicas as one, with the plan's own times; what each device did
is its order. A finished run cannot deadlock when it is repeated with non-blocking sends, whatever the real
times are: its tasks have one common order in which each comes after what it needs. Everything is plain
arithmetic on the plan's numbers, ties go by number, so every rank finds the same orders.

The rule of a stage is 1F1B's lock-step where that is possible: every input half is paid back by a forward,
for a stage that swallows a burst of gradients starves the stages after it. Greedy without lock-step is often
slower than static 1F1B. A backward in one go is an input half with an empty weight half.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpp.plan import Plan, Stage
from gpp.schedule.hops import hop_seconds
from gpp.schedule.pieces import micro_batches
from gpp.schedule.static import static_order, warm_up
from gpp.schedule.task import Pass, ScheduleError, Task

Devices = tuple[int, ...]
SPLIT_POLICIES = ("zero-bubble", "greedy")


def greedy_orders(plan: Plan, sharing: Mapping[Devices, Sequence[int]]) -> dict[Devices, tuple[Task, ...]]:
    """The order of every set of devices (to the stages on it), as if every stage had a backward.

    Under "greedy" every device chooses on the clock; else only those with several stages do, and the others
    follow their static order on it. `plan.policy.patience` is for how many of its own durations a weight half
    waits for a message that is known to come. Raises ScheduleError if the clock stands still.

    O(tasks x (edges of a stage + stages of a device)), and a heap of events: ~10 us a task.
    """
    clock = _Clock(plan, sharing)
    clock.run()
    return {devices: tuple(tasks) for devices, tasks in zip(sharing, clock.done, strict=True)}


@dataclass(slots=True)
class _Line:
    """A stage on the clock, in micro-batches: how many forwards, input halves and weight halves it began."""

    stage: Stage
    home: int  # its set of devices
    count: int
    cap: int
    lag: int  # 0: backwards in one go
    forward: float
    input: float
    weight: float
    after: float = 0.0  # the longest way from a forward to the end of the step
    before: float = 0.0  # the same from an input half
    forwards: int = 0
    inputs: int = 0
    weights: int = 0
    owes: bool = False  # the last pass but weight halves was an input half


@dataclass(slots=True)
class _Way:
    """An edge on the clock: seconds there and back, and when each micro-batch of its source (target) came."""

    source: int
    target: int
    there: float
    back: float
    came: list[float] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a stage would do next. Lazy: only if no stage of the device has anything else."""

    index: int
    kind: Pass
    lazy: bool = False


class _Clock:
    """The heap of events and how far every stage has come."""

    def __init__(self, plan: Plan, sharing: Mapping[Devices, Sequence[int]]) -> None:
        self.plan = plan
        self.residents = list(sharing.values())
        graph = plan.stage_graph
        home = {s: number for number, held in enumerate(self.residents) for s in held}
        split = plan.policy.name in SPLIT_POLICIES
        self.lines = [_line(plan, stage, home[s], split) for s, stage in enumerate(graph.stages)]
        ways = [_Way(e.source, e.target, *hop_seconds(plan, e)) for e in graph.edges]
        self.incoming = [[way for way in ways if way.target == s] for s in range(len(self.lines))]
        self.outgoing = [[way for way in ways if way.source == s] for s in range(len(self.lines))]
        self._measure()
        self.parts = [micro_batches(stage, plan.mini_batch) for stage in graph.stages]
        self.fixed = [
            static_order(held[0], graph.stages[held[0]], plan.policy, plan.mini_batch)
            if len(held) == 1 and plan.policy.name != "greedy"
            else None
            for held in self.residents
        ]
        self.done: list[list[Task]] = [[] for _ in self.residents]
        self.until = [0.0] * len(self.residents)  # when the device is free
        self.now = 0.0
        self.events: list[tuple[float, int, int]] = []  # time, serial, whose turn
        self.serial = 0

    def run(self) -> None:
        """Until nothing is left to happen."""
        for home in range(len(self.residents)):
            self._wake(home, 0.0)
        while self.events:
            self.now, _, home = heapq.heappop(self.events)
            if self.until[home] <= self.now:
                choice = self._choose(home)
                if choice is not None:
                    self._start(home, choice)
        stuck = [line for line in self.lines if line.weights < line.count]
        if stuck:
            held = ", ".join(f"{line.stage.name} ({line.stage.in_flight})" for line in stuck)
            raise ScheduleError(
                f"with so many samples in flight the stages {held} wait for each other for ever; let the "
                "stages before others hold at least as many samples as those"
            )

    def _wake(self, home: int, time: float) -> None:
        heapq.heappush(self.events, (time, self.serial, home))
        self.serial += 1

    def _choose(self, home: int) -> _Choice | None:
        fixed = self.fixed[home]
        if fixed is not None:
            return self._next_fixed(home, fixed)
        wishes = [wish for s in self.residents[home] if (wish := self._wish(s)) is not None]
        urgent = [wish for wish in wishes if not wish.lazy]
        if urgent:
            return min(urgent, key=self._urgency)
        if not wishes:
            return None
        lazy = min(wishes, key=self._urgency)
        patience = self.plan.policy.patience * self.lines[lazy.index].weight
        if patience > 0 and self._next_arrival(home) <= self.now + patience:
            return None  # the arrival wakes the device
        return lazy

    def _next_fixed(self, home: int, tasks: Sequence[Task]) -> _Choice | None:
        if len(self.done[home]) == len(tasks):
            return None
        task = tasks[len(self.done[home])]
        ready = -math.inf
        if task.kind is Pass.FORWARD:
            ready = self._forward_ready(task.stage)
        elif task.kind is not Pass.BACKWARD_WEIGHT:
            ready = self._input_ready(task.stage)
        return _Choice(task.stage, task.kind) if ready <= self.now else None

    def _wish(self, s: int) -> _Choice | None:
        """The rule of one stage."""
        line = self.lines[s]
        came = self._forward_ready(s) <= self.now
        room = line.forwards - line.weights < line.cap
        pending = line.weights < line.inputs
        back = self._input_ready(s) <= self.now
        if back and line.lag and line.inputs - line.weights > line.lag:
            return _Choice(s, Pass.BACKWARD_WEIGHT)  # it holds as many halves as it may
        backward = _Choice(s, Pass.BACKWARD_INPUT if line.lag else Pass.BACKWARD)
        if line.owes and came and room:
            return _Choice(s, Pass.FORWARD)
        if line.owes and came and pending:
            return _Choice(s, Pass.BACKWARD_WEIGHT)  # makes room for that forward
        if back:
            return backward
        if came and room:
            return _Choice(s, Pass.FORWARD)
        return _Choice(s, Pass.BACKWARD_WEIGHT, lazy=True) if pending else None

    def _urgency(self, wish: _Choice) -> tuple[bool, int, float, int]:
        """Among stages of one device: backwards first, then the oldest samples, then what has the longest way
        to the end of the step."""
        line = self.lines[wish.index]
        forward = wish.kind is Pass.FORWARD
        number = line.forwards if forward else line.inputs
        if wish.kind is Pass.BACKWARD_WEIGHT:
            number = line.weights
        way = line.after if forward else line.before
        return forward, self.parts[wish.index][number].start, -way, wish.index

    def _next_arrival(self, home: int) -> float:
        """When the first pass other than a weight half can run, as far as is known."""
        soonest = math.inf
        for s in self.residents[home]:
            line = self.lines[s]
            soonest = min(soonest, self._input_ready(s))
            if line.forwards - line.weights < line.cap:
                soonest = min(soonest, self._forward_ready(s))
        return soonest

    def _forward_ready(self, s: int) -> float:
        """When all that the next forward reads is there; infinity if that is not known yet."""
        line = self.lines[s]
        if line.forwards == line.count:
            return math.inf
        last = self.parts[s][line.forwards].stop - 1
        return self._arrival(last, [(way.source, way.came) for way in self.incoming[s]])

    def _input_ready(self, s: int) -> float:
        """The same of the next input half."""
        line = self.lines[s]
        if line.inputs == line.forwards:
            return math.inf
        if self.plan.policy.name == "gpipe" and line.forwards < line.count:
            return math.inf
        last = self.parts[s][line.inputs].stop - 1
        return self._arrival(last, [(way.target, way.returned) for way in self.outgoing[s]])

    def _arrival(self, last: int, read: Sequence[tuple[int, Sequence[float]]]) -> float:
        """When sample `last` is there from each of these stages, by when their micro-batches came."""
        ready = 0.0
        for stage, came in read:
            need = last // self.lines[stage].stage.micro_batch
            if need >= len(came):
                return math.inf
            ready = max(ready, came[need])
        return ready

    def _start(self, home: int, choice: _Choice) -> None:
        """The device begins a pass; when its results arrive is known from here on."""
        s, line = choice.index, self.lines[choice.index]
        match choice.kind:
            case Pass.FORWARD:
                number, seconds = line.forwards, line.forward
                line.forwards, line.owes = number + 1, False
                ways = [(way.came, way.there, way.target) for way in self.outgoing[s]]
                self._post(self.now + seconds, ways)
            case Pass.BACKWARD_WEIGHT:
                number, seconds = line.weights, line.weight
                line.weights = number + 1
            case _:
                fused = choice.kind is Pass.BACKWARD
                number, seconds = line.inputs, line.input + (line.weight if fused else 0.0)
                line.inputs, line.weights = number + 1, line.weights + fused
                line.owes = True
                ways = [(way.returned, way.back, way.source) for way in self.incoming[s]]
                self._post(self.now + seconds, ways)
        self.done[home].append(Task(choice.kind, s, self.parts[s][number]))
        self.until[home] = self.now + seconds
        self._wake(home, self.until[home])

    def _post(self, time: float, messages: Sequence[tuple[list[float], float, int]]) -> None:
        """Messages of a channel follow one another."""
        for arrivals, travel, receiver in messages:
            arrivals.append(max(time, arrivals[-1] if arrivals else 0.0) + travel)
            self._wake(self.lines[receiver].home, arrivals[-1])

    def _measure(self) -> None:
        """The longest ways from each pass to the end of the step."""
        for s, line in enumerate(self.lines):
            above = [way.back + self.lines[way.source].before for way in self.incoming[s]]
            line.before = line.input + max(above, default=line.weight)
        for s in reversed(range(len(self.lines))):
            line = self.lines[s]
            below = [way.there + self.lines[way.target].after for way in self.outgoing[s]]
            line.after = line.forward + max(below, default=line.before)


def _line(plan: Plan, stage: Stage, home: int, split: bool) -> _Line:
    warm_up(stage)  # refuses what could never run
    seconds, real = stage.seconds, stage.has_backward
    again = seconds.recompute if stage.recompute else 0.0
    return _Line(
        stage,
        home,
        count=plan.mini_batch // stage.micro_batch,
        cap=stage.in_flight // stage.micro_batch,
        lag=stage.weight_lag if split else 0,
        forward=seconds.forward,
        input=seconds.backward_input + again if real else 0.0,
        weight=seconds.backward_weight if real else 0.0,
    )
