"""Devices that only keep time: passes wait as long as the plan says, messages and the runtime are real.

So a plan for 32 devices runs on two cores, and what the simulator predicts is held against a clock. A stage's
program has no weights and no data; its edges carry bytes of the plan's sizes, one value with a gradient and
one without. A device sleeps, so ranks may be many more than cores.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from gpp.plan import Edge, Plan, StageSeconds
from gpp.program.stage import (
    BackwardInputResult,
    ForwardResult,
    Port,
    Results,
    StageFunctions,
    StageProgram,
    TermSum,
    TrainFunctions,
    ValueSpec,
)
from gpp.schedule.lower import lower
from gpp.schedule.task import Pass, Reduce, Reduction, Samples, Schedule, Task
from gpp.simulate import pass_seconds, reduce_seconds
from gpp.topology import Link

from .communicator import Communicator
from .data import Batches
from .reduce import Slots
from .schedules import Schedules, call_sizes
from .staging import HostSlot, OnHost, Write
from .trainer import StepRecord, Trainer

_SET_TIMER_SLACK = 29  # of prctl; nanoseconds
Rest = Callable[[float], None]


def slower(plan: Plan, factor: float) -> Plan:
    """The plan whose passes and updates take so many times as long. Messages and all-reduces do not."""

    def timed(seconds: StageSeconds) -> StageSeconds:
        return StageSeconds(**{f.name: factor * getattr(seconds, f.name) for f in fields(seconds)})

    stages = tuple(replace(s, seconds=timed(s.seconds)) for s in plan.stage_graph.stages)
    return replace(plan, stage_graph=replace(plan.stage_graph, stages=stages))


def with_messages(plan: Plan, size: int) -> Plan:
    """The plan whose messages have about `size` bytes each (at least one a sample), there and back."""
    stages = plan.stage_graph.stages

    def sized(edge: Edge) -> Edge:
        ends = (stages[edge.source], stages[edge.target])
        samples = max(1, min(end.micro_batch // len(end.devices) for end in ends))
        each = max(1, size // samples)
        return replace(
            edge, bytes=each if edge.bytes else 0, gradient_bytes=each if edge.gradient_bytes else 0
        )

    edges = tuple(map(sized, plan.stage_graph.edges))
    return replace(plan, stage_graph=replace(plan.stage_graph, edges=edges))


def with_links(plan: Plan, inside: Link, between: Link | None = None) -> Plan:
    """The plan on a cluster with these links: measured ones, say."""
    topology = replace(plan.topology, inside=inside, between=between or inside)
    return replace(plan, topology=topology)


def exact_sleep() -> None:
    """Let this thread wake within microseconds: Linux otherwise adds 50 us to every sleep, which is the
    emulation's fault and no device's. Of no effect elsewhere."""
    try:
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1)
    except (AttributeError, OSError):
        pass


def wait(seconds: float) -> None:
    """Until so many seconds have passed; the processor is free meanwhile."""
    if seconds > 0:
        time.sleep(seconds)


@dataclass
class EmulatedState:
    """No weights: reductions meet their ranks and then take the time that the simulator gives them."""

    reductions: Mapping[tuple[int, int], float]  # seconds by stage and tied group
    seconds: float  # of the update
    arguments: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)
    buffer_arguments: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)
    sums: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)
    slots: Slots = field(default_factory=Slots)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    norm: float | None = None
    learning_rate: float | None = None
    checks_finite: bool = False

    def reach(self, stage: int, found: Sequence[bool]) -> None:
        """There is nothing to remember."""

    def reduce(self, comm: Communicator, group: tuple[int, ...], stage: int, shared: int) -> None:
        """Meet the group, then wait."""
        self.slots.gather(comm, group, [0.0])
        wait(self.reductions[stage, shared])

    def begin(self) -> None:
        """There is nothing to remember."""

    def undo(self) -> tuple[str, ...]:
        """There is nothing to undo."""
        return ()

    def gather_norms(self, comm: Communicator, group: tuple[int, ...], *, finite_loss: bool = True) -> bool:
        """Meet the group."""
        self.slots.gather(comm, group, [0.0])
        return True

    def scale(self, weight: float) -> None:
        """There is nothing to divide."""

    def update(self) -> float | None:
        """Wait as long as the updates of all stages of the rank."""
        wait(self.seconds)
        return None

    def spread(self, comm: Communicator) -> None:
        """The update's time has it."""

    def advance(self) -> None:
        """There are no learning rates."""

    def averaged(self) -> AbstractContextManager[None]:
        """There are no averages."""
        return nullcontext()


def emulated_state(plan: Plan, schedule: Schedule, rank: int) -> EmulatedState | None:
    """The state of a rank; None if it has no stage."""
    residents = plan.residents.get(rank, ())
    if not residents:
        return None
    meetings = [i for i in schedule.programs[rank] if isinstance(i, Reduce)]
    stages = plan.stage_graph.stages
    return EmulatedState(
        {(i.stage, i.shared): reduce_seconds(plan, i) for i in meetings if i.what is Reduction.GRADIENTS},
        sum(stages[s].seconds.update for s in residents),
        {s: () for s in residents},
        {s: () for s in residents},
        {s: () for s in residents},
    )


def emulated_program(
    plan: Plan, schedule: Schedule, rank: int, stage: int, rest: Rest = wait
) -> StageProgram:
    """A stage whose passes only take time, as `rest` lets it pass."""
    graph = plan.stage_graph
    values = {number: tuple(_values(number, edge)) for number, edge in enumerate(graph.edges)}
    receives = tuple(Port(n, values[n]) for n, edge in enumerate(graph.edges) if edge.target == stage)
    sends = tuple(Port(n, values[n]) for n, edge in enumerate(graph.edges) if edge.source == stage)
    inputs = tuple(value for port in receives for value in port.values)
    outputs = tuple(value for port in sends for value in port.values)
    functions = StageFunctions(
        inputs=inputs,
        outputs=outputs,
        batch_keys=(),
        receives=receives,
        sends=sends,
        terms=(),
        sizes={
            size: _timed(plan, stage, size, inputs, outputs, rest)
            for size in call_sizes(schedule, rank, stage)
        },
    )
    return StageProgram(stage, (), (), (), functions, functions)


def _values(number: int, edge: Edge) -> Iterator[ValueSpec]:
    """What an edge carries, in bytes."""
    if edge.gradient_bytes:
        yield ValueSpec(f"edge{number}", (edge.gradient_bytes,), torch.uint8, True)
    if edge.bytes > edge.gradient_bytes:
        yield ValueSpec(f"edge{number}.plain", (edge.bytes - edge.gradient_bytes,), torch.uint8, False)


def _timed(
    plan: Plan,
    stage: int,
    size: int,
    inputs: Sequence[ValueSpec],
    outputs: Sequence[ValueSpec],
    rest: Rest,
) -> TrainFunctions:
    """The three passes of calls of `size` samples; what they return was made beforehand."""
    record = plan.stage_graph.stages[stage]
    samples = Samples(0, size)
    forward = pass_seconds(record, Task(Pass.FORWARD, stage, samples))
    # recomputing is a forward that the executor calls by itself
    plain = replace(record, recompute=False)
    back = pass_seconds(plain, Task(Pass.BACKWARD_INPUT, stage, samples))
    weight = pass_seconds(plain, Task(Pass.BACKWARD_WEIGHT, stage, samples))
    made = [torch.zeros((size, *v.shape), dtype=v.dtype) for v in outputs]
    gradients = [torch.zeros((size, *v.shape), dtype=v.dtype) for v in inputs if v.needs_grad]

    late = 0.0  # seconds that the timer was late in the last input half: not twice in a pass in one go

    def run_forward(*_: object) -> ForwardResult:
        rest(forward)
        return ForwardResult(made, (), ())

    def backward_input(*_: object) -> BackwardInputResult:
        nonlocal late
        due = time.perf_counter() + back
        rest(back)
        late = time.perf_counter() - due
        return BackwardInputResult(gradients, ())

    def backward_weight(*_: object) -> Sequence[bool]:
        rest(max(0.0, weight - late))
        return ()

    return TrainFunctions(run_forward, backward_input, backward_weight)


@dataclass(frozen=True)
class _NoData:
    """Samples without tensors."""

    length: int
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.length

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        return {}


class _WrittenSlot(HostSlot):
    """Its device has written what is to be sent."""

    def writer(self, views: Sequence[Tensor]) -> Write:
        """See `Slot`."""
        return lambda _: None


class _Written:
    """See `Staging`: devices whose memory MPI takes."""

    is_polled = False

    def slot(self, size: int, *, sending: bool) -> HostSlot:
        """See `Staging`."""
        return _WrittenSlot(torch.empty(size, dtype=torch.uint8))

    def landing(self, size: int, cuts: Sequence[int]) -> tuple[Tensor, Sequence[HostSlot]]:
        """See `Staging`."""
        return OnHost().landing(size, cuts)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Staging`. That is the device's work, and part of its pass; nobody looks at the values."""
        first = parts[0]
        return first[:1].expand(sum(map(len, parts)), *first.shape[1:])


def emulated(comm: Communicator, plan: Plan, *, transport: str = "host") -> Trainer:
    """A trainer whose devices only keep time; called by all ranks together.

    `plan` has passed `gpp.schedule.check`. Ranks beyond its devices idle. With `transport` "host" a device is
    the process itself, as on a CPU: it copies what it sends, and while it computes no message gets on. With
    "device" it is one beside the process that writes its messages itself, where MPI takes them.
    """
    beside = transport == "device"
    schedule = lower(plan)
    own = plan.residents.get(comm.rank, ())
    nothing = Results(TermSum("loss", (), 0.0, () if plan.loss_weighted else None), ())
    return Trainer(
        comm,
        plan,
        plan,
        Schedules(schedule, {}),
        [emulated_program(plan, schedule, comm.rank, stage, comm.rest if beside else wait) for stage in own],
        emulated_state(plan, schedule, comm.rank),
        nothing,
        nothing,
        torch.device("cpu"),
        _Written() if beside else OnHost(),
    )


def run_steps(
    trainer: Trainer,
    steps: int,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    *,
    trace: bool = False,
) -> None:
    """So many training steps of an emulated trainer; called by all ranks together."""
    size = trainer.plan.mini_batch
    trainer.fit(_NoData(size), Batches(size, size, 0), 0, steps, on_step, trace=trace)
