"""A schedule on a clock: who would do what when, from the plan alone.

Event-driven: a heap of (time, serial number, event); the clock moves only when one is popped, and serial
numbers make ties come out the same every time. Passes occupy a rank; messages are asynchronous: each takes
its link's latency + bytes / bandwidth (within a rank: no time), those of one channel one after the other,
different channels at the same time. When an instruction may run is `gpp.schedule.ready`'s rule, the same that
the checker proves.
"""

import heapq
import math
from dataclasses import dataclass

from gpp.cost import all_reduce_seconds
from gpp.plan import Plan, Stage, device_memory
from gpp.schedule.lower import lower
from gpp.schedule.ready import Progress
from gpp.schedule.task import (
    Compute,
    Direction,
    Instruction,
    Pass,
    Receive,
    Reduce,
    Reduction,
    Report,
    Samples,
    Schedule,
    Send,
    Task,
    Transfer,
    Update,
)
from gpp.trace import Activity, Span, Trace, bubble


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan promises: seconds of a step; idle share and peak bytes of every rank; the whole trace.

    A rank that no stage uses is idle all the time (bubble 1) and needs no memory.
    """

    step_seconds: float
    bubble: tuple[float, ...]
    memory: tuple[float, ...]
    trace: Trace


def predicted(plan: Plan, *, steps: int = 3) -> Prediction:
    """Simulate training steps of the plan and read off what a user asks first."""
    trace = simulate(plan, steps=steps)
    return Prediction(trace.step_seconds, bubble(trace), device_memory(plan), trace)


def simulate(plan: Plan, schedule: Schedule | None = None, *, steps: int = 3) -> Trace:
    """Run the schedule (the plan's training step, if not given) `steps` times in a row.

    There is no barrier between steps: a rank starts the next one after its own Update. The predicted
    `step_seconds` is the time between the ends of the last two steps of the rank where it is longest, one
    that only computes forwards included; of one step alone, the time to the last end. Forward only, it is the
    total time / steps. Raises ScheduleError if the schedule deadlocks.
    """
    if steps < 1:
        raise ValueError(f"simulate.steps must be at least 1, it is {steps}")
    simulation = _Simulation(plan, schedule or lower(plan), steps)
    simulation.run()
    return simulation.trace()


class _Simulation:
    """The clock, the heap, and what every rank has been doing."""

    def __init__(self, plan: Plan, schedule: Schedule, steps: int) -> None:
        self.plan, self.schedule, self.steps = plan, schedule, steps
        self.progress = Progress(schedule, steps)
        ranks = len(schedule.programs)
        self.now = 0.0
        self.events: list[tuple[float, int, bool, int]] = []  # time, serial, is a message, queue or rank
        self.serial = 0
        self.busy = [False] * ranks
        self.since = [0.0] * ranks  # when the rank came to its present instruction
        self.ends: list[list[float]] = [[] for _ in range(ranks)]  # of the steps of each rank
        self.spans: list[Span] = []
        self.travels: list[list[float]] = [[] for _ in schedule.channels]  # of each message, in order
        for program in schedule.programs:
            for t in (i.transfer for i in program if isinstance(i, Send)):
                link = plan.topology.link(t.source, t.target)
                seconds = 0.0 if t.is_local else link.seconds(t.bytes)
                self.travels[self.progress.queue(t)].append(seconds)

    def run(self) -> None:
        """Until nothing is left to happen."""
        ranks = range(len(self.schedule.programs))
        for rank in ranks:
            self._advance(rank)
        while self.events:
            self.now, _, is_message, which = heapq.heappop(self.events)
            if is_message:
                self._arrive(which)
            else:
                self.busy[which] = False
                self._finish(which)
                self._advance(which)
        if self.progress.unfinished():
            raise self.progress.stuck()

    def trace(self) -> Trace:
        """What was recorded."""
        plan = self.plan
        if self.schedule.forward_only:
            seconds = self.now / self.steps
        else:
            seconds = max(e[-1] - (e[-2] if self.steps > 1 else 0.0) for e in self.ends if e)
        return Trace(
            name="predicted",
            ranks=len(self.schedule.programs),
            spans=tuple(sorted(self.spans, key=lambda s: (s.start, s.stop, s.rank))),
            step_seconds=seconds,
            mini_batch=self.schedule.samples,
            stage_names=tuple(stage.name for stage in plan.stage_graph.stages),
        )

    def _advance(self, rank: int) -> None:
        """Run what the rank can: all that takes no time, and start the first thing that does."""
        while not self.busy[rank] and self.progress.ready(rank):
            instruction = self.progress.current(rank)
            assert instruction is not None
            seconds = self._seconds(instruction)
            if isinstance(instruction, Send | Receive | Report):
                self._record(rank, instruction, self.now)
                self._finish(rank)
            else:
                members = instruction.group if isinstance(instruction, Reduce) else (rank,)
                for member in members:
                    self._record(member, instruction, self.now + seconds)
                    self.busy[member] = True
                    self._push(self.now + seconds, False, member)

    def _finish(self, rank: int) -> None:
        for queue in self.progress.finish(rank):
            self._start(queue)
        self.since[rank] = self.now
        if self.progress.done[rank] % len(self.schedule.programs[rank]) == 0:
            self.ends[rank].append(self.now)

    def _start(self, index: int) -> None:
        """Send the channel's next message on its way, if the one before is there."""
        queue = self.progress.queues[index]
        if queue.can_start() and queue.started == queue.delivered:
            travels = self.travels[index]
            seconds = travels[queue.started % len(travels)]
            queue.started += 1
            self._push(self.now + seconds, True, index)

    def _arrive(self, index: int) -> None:
        queue = self.progress.queues[index]
        queue.delivered += 1
        self._start(index)
        self._advance(queue.channel.target)
        self._advance(queue.channel.source)

    def _push(self, time: float, is_message: bool, which: int) -> None:
        heapq.heappush(self.events, (time, self.serial, is_message, which))
        self.serial += 1

    def _record(self, rank: int, instruction: Instruction, stop: float) -> None:
        """Spans of an instruction that starts now, and of what it has waited for."""
        came = self.since[rank]
        stages = self.plan.residents[rank]
        match instruction:
            case Compute(task):
                span = _Label(rank, task.stage, task.kind.value, task.samples)
                self._span(span, Activity.COMPUTE, self.now, stop)
            case Receive(transfer):
                self._span(self._message(rank, "recv", transfer), Activity.WAIT, came, stop)
            case Send(transfer):
                span = self._message(rank, "send", transfer)
                if came < self.now:
                    self._span(span, Activity.WAIT, came, self.now)
                self._span(span, Activity.SEND, self.now, stop)
            case Reduce(what, _, stage):
                span = _Label(rank, stage if stage >= 0 else stages[0], f"reduce {what.value}")
                if came < self.now:
                    self._span(span, Activity.WAIT, came, self.now)
                self._span(span, Activity.REDUCE, self.now, stop)
            case Update(stage):
                self._span(_Label(rank, stage, "update"), Activity.UPDATE, self.now, stop)
            case Report():
                pass

    def _message(self, rank: int, label: str, transfer: Transfer) -> "_Label":
        edge = self.plan.stage_graph.edges[transfer.edge]
        is_upstream = (label == "send") is (transfer.direction is Direction.ACTIVATION)
        stage = edge.source if is_upstream else edge.target
        return _Label(rank, stage, label, transfer.samples, transfer.edge)

    def _span(self, about: "_Label", activity: Activity, start: float, stop: float) -> None:
        rank, samples = about.rank, about.samples
        step = self.progress.done[rank] // len(self.schedule.programs[rank])
        extent = (samples.start, samples.stop) if samples is not None else None
        self.spans.append(
            Span(rank, activity, about.label, start, stop, about.stage, extent, about.edge, step)
        )

    def _seconds(self, instruction: Instruction) -> float:
        stages = self.plan.stage_graph.stages
        match instruction:
            case Compute(task):
                return pass_seconds(stages[task.stage], task)
            case Reduce():
                return reduce_seconds(self.plan, instruction)
            case Update(stage):
                return stages[stage].seconds.update
            case Send() | Receive() | Report():
                return 0.0


@dataclass(frozen=True, slots=True)
class _Label:
    """What a span says besides when."""

    rank: int
    stage: int
    label: str
    samples: Samples | None = None
    edge: int = -1


def pass_seconds(stage: Stage, task: Task) -> float:
    """Seconds of a task; the stage's are for one replica's whole share, of other sizes in proportion.

    A stage that recomputes runs its forward again at the start of the input half (of a backward in one go).
    """
    share = len(task.samples) * len(stage.devices) / stage.micro_batch
    seconds = stage.seconds
    again = seconds.recompute if stage.recompute else 0.0
    match task.kind:
        case Pass.FORWARD:
            return share * seconds.forward
        case Pass.BACKWARD:
            return share * (seconds.backward + again)
        case Pass.BACKWARD_INPUT:
            return share * (seconds.backward_input + again)
        case Pass.BACKWARD_WEIGHT:
            return share * seconds.backward_weight
        case Pass.RECOMPUTE:
            return share * seconds.recompute


def reduce_seconds(plan: Plan, reduction: Reduce) -> float:
    """Seconds of a reduction from when its last rank has come: a ring over the group's slowest link; a scalar
    goes up and down a tree, where only the latency counts."""
    topology, group = plan.topology, reduction.group
    hosts = {topology.host(device) for device in group}
    links = [topology.inside] if len(hosts) < len(group) else []
    links += [topology.between] if len(hosts) > 1 else []
    if reduction.what is Reduction.GRADIENTS:
        return max(all_reduce_seconds(reduction.bytes, len(group), link) for link in links)
    return 2 * math.ceil(math.log2(len(group))) * max(link.latency for link in links)
