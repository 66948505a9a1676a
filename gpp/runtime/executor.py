"""Runs a rank's program: one loop over its instructions.

Messages live in rings; an input that came in one message is a view of it and stays there until its backward
is done. Only this loop talks to the communicator.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from gpp.plan import Plan
from gpp.program.stage import ForwardResult, StageFunctions, StageProgram, TermSum, ValueSpec
from gpp.schedule.lower import returns_gradient
from gpp.schedule.task import (
    Compute,
    Direction,
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
from gpp.trace import Activity, Span

from .channels import Channels, Held, joined, port_of
from .communicator import Communicator
from .reduce import slot_sum
from .results import local_weight
from .schedules import pieces_of
from .state import StageState

Batch = Mapping[str, Tensor]  # this rank's rows of its batch keys, piece after piece


@dataclass(frozen=True)
class StepOutcome:
    """What a rank knows after a step: its terms (name to (start, stop, value)), and the global norm."""

    terms: Mapping[str, list[tuple[int, int, float]]]
    norm: float | None


class Executor:
    """One rank's share of one schedule, to be run many times.

    `functions` is None for an idle rank. `weight` is the loss whose divisor the stages must agree on.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: Plan,
        schedule: Schedule,
        program: StageProgram | None,
        state: StageState | None,
        loss: TermSum,
        device: torch.device,
    ) -> None:
        self.comm = comm
        self.plan = plan
        self.schedule = schedule
        self.program = schedule.programs[comm.rank] if comm.rank < len(schedule.programs) else ()
        self.state = state
        self.loss = loss
        self.device = device
        self.stage = -1 if program is None else program.stage
        self.functions = _functions(program, schedule)
        self.pieces = pieces_of(schedule, comm.rank)
        self._rows = _row_offsets(self.pieces)
        self.channels = Channels(comm, schedule, self.functions)
        self.spans: list[Span] = []

    def run(self, step: int, batch: Batch, *, record: bool = False) -> StepOutcome:
        """Run the program once. `step` keys random numbers; `batch` holds this rank's rows."""
        run = _Step(self, step, batch, self.spans if record else None)
        with torch.no_grad():
            for instruction in self.program:
                run.execute(instruction)
            run.finish()
        return StepOutcome(run.terms, run.norm)


class _Step:
    """The state of one run of the program."""

    def __init__(self, owner: Executor, step: int, batch: Batch, spans: list[Span] | None) -> None:
        self.owner = owner
        self.step = step
        self.batch = batch
        self.spans = spans
        self.terms: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
        self.norm: float | None = None
        self.held: dict[tuple[int, Direction], list[Held]] = defaultdict(list)
        self.stash: dict[Samples, tuple[list[Tensor], list[Held]]] = {}
        self.used: list[Held] = []  # slots to give back after the sends of this pass
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.piece = Samples(0, 1)
        self.weight: float | None = None
        self.scaled = False

    def execute(self, instruction: Compute | Send | Receive | Reduce | Update | Report) -> None:
        if self.used and not isinstance(instruction, Send):
            # the sends behind a pass may still read views of its buffers, the checker reckons so too
            self.release(self.used)
            self.used = []
        match instruction:
            case Receive(transfer):
                with self.span(Activity.WAIT, "recv", transfer):
                    self.receive(transfer)
            case Compute(task):
                with self.span(Activity.COMPUTE, task.kind.value, task):
                    self.compute(task)
            case Send(transfer):
                with self.span(Activity.SEND, "send", transfer):
                    self.send(transfer)
            case Reduce():
                with self.span(Activity.REDUCE, f"reduce {instruction.what.value}"):
                    self.reduce(instruction)
            case Update():
                with self.span(Activity.UPDATE, "update"):
                    self.update()
            case Report():
                pass  # the trainer collects self.terms
            case _:
                assert_never(instruction)

    def span(self, activity: Activity, label: str, what: Task | Transfer | None = None) -> "_Timer":
        return _Timer(self, activity, label, what)

    def receive(self, transfer: Transfer) -> None:
        held = self.owner.channels.receive(transfer)
        self.held[transfer.edge, transfer.direction].append(held)

    def send(self, transfer: Transfer) -> None:
        functions = self.owner.functions
        assert functions is not None
        gradient = transfer.direction is Direction.GRADIENT
        port = port_of(functions.receives if gradient else functions.sends, transfer.edge)
        values = self.gradients if gradient else self.outputs
        start = transfer.samples.start - self.piece.start
        rows = slice(start, start + len(transfer.samples))
        carried = [values[v.name][rows] for v in port.values if v.needs_grad or not gradient]
        self.owner.channels.send(transfer, carried)

    def compute(self, task: Task) -> None:
        self.piece = task.samples
        match task.kind:
            case Pass.FORWARD:
                self.forward(task)
            case Pass.BACKWARD:
                self.backward(task)
            case Pass.BACKWARD_INPUT | Pass.BACKWARD_WEIGHT | Pass.RECOMPUTE:
                raise ValueError(
                    f"a pass of kind {task.kind} needs a schedule that this version does not make"
                )
            case _:
                assert_never(task.kind)

    def forward(self, task: Task) -> None:
        owner = self.owner
        functions, state = owner.functions, owner.state
        assert functions is not None and state is not None
        received: dict[str, Tensor] = {}
        kept: list[Held] = []
        for port in functions.receives:
            parts = self.take(port.edge, Direction.ACTIVATION, task.samples)
            received |= dict(zip((v.name for v in port.values), joined(parts, owner.device), strict=True))
            kept += parts
        inputs = [received[v.name] for v in functions.inputs]
        inputs += [self.rows(key, task.samples) for key in functions.batch_keys]
        position = torch.tensor([self.step, task.samples.start], device=owner.device)
        result: ForwardResult = functions.sizes[len(task.samples)].forward(
            state.arguments, state.buffer_arguments, inputs, position
        )
        self.outputs = dict(zip((v.name for v in functions.outputs), result.outputs, strict=True))
        for name, term in zip(functions.terms, result.terms, strict=True):
            self.terms[name].append((task.samples.start, task.samples.stop, float(term)))
        if owner.plan.stage_graph.stages[task.stage].has_backward and not owner.schedule.forward_only:
            self.stash[task.samples] = (list(result.stash), kept)
        else:
            self.used = kept

    def backward(self, task: Task) -> None:
        owner = self.owner
        functions, state = owner.functions, owner.state
        assert functions is not None and state is not None
        arrived: dict[str, list[Tensor]] = defaultdict(list)
        used: list[Held] = []
        # eager autograd sums the uses of a value from the last to the first
        for port in reversed(functions.sends):
            values = [v for v in port.values if v.needs_grad]
            if not returns_gradient(owner.plan.stage_graph, owner.plan.stage_graph.edges[port.edge]):
                continue
            parts = self.take(port.edge, Direction.GRADIENT, task.samples)
            for value, gradient in zip(values, joined(parts, owner.device), strict=True):
                arrived[value.name].append(gradient)
            used += parts
        size = len(task.samples)
        tangents = [_sum(arrived[v.name], v, size, owner.device) for v in functions.outputs if v.needs_grad]
        stash, kept = self.stash.pop(task.samples)
        run = functions.sizes[size]
        back = run.backward_input(state.arguments, stash, tangents)
        names = (v.name for v in functions.inputs if v.needs_grad)
        self.gradients = dict(zip(names, back.gradients, strict=True))
        state.accumulate(run.backward_weight(state.arguments, list(back.stash)))
        self.used = [*kept, *used]

    def take(self, edge: int, way: Direction, samples: Samples) -> list[Held]:
        """The messages that make up `samples`, in order."""
        held = self.held[edge, way]
        parts = [h for h in held if h.samples.intersection(samples) is not None]
        self.held[edge, way] = [h for h in held if h not in parts]
        return sorted(parts, key=lambda h: h.samples)

    def rows(self, key: str, samples: Samples) -> Tensor:
        start = self.owner._rows[samples]
        return self.batch[key][start : start + len(samples)]

    def release(self, held: Sequence[Held]) -> None:
        for item in held:
            item.release()

    def reduce(self, instruction: Reduce) -> None:
        owner = self.owner
        state = owner.state
        assert state is not None
        match instruction.what:
            case Reduction.GRADIENTS:
                state.reduce(owner.comm, instruction.group, instruction.shared)
            case Reduction.LOSS_WEIGHT:
                parts = slot_sum(owner.comm, instruction.group, [local_weight(owner.loss, self.terms)])
                self.weight = sum(part[0] for part in parts)
            case Reduction.NORM:
                self.scale()
                state.gather_norms(owner.comm, instruction.group)
            case _:
                assert_never(instruction.what)

    def scale(self) -> None:
        """Divide by the loss weight, once, after all sums."""
        if self.scaled or self.owner.state is None:
            return
        self.scaled = True
        if self.owner.loss.weight is None:
            self.owner.state.scale(float(self.owner.schedule.samples))
        else:
            local = self.weight if self.weight is not None else local_weight(self.owner.loss, self.terms)
            self.owner.state.scale(local)

    def update(self) -> None:
        self.scale()
        assert self.owner.state is not None
        self.norm = self.owner.state.update()

    def finish(self) -> None:
        self.release(self.used)


class _Timer:
    """Records one span, if the step is recorded."""

    def __init__(self, step: _Step, activity: Activity, label: str, what: Task | Transfer | None) -> None:
        self.step, self.activity, self.label, self.what = step, activity, label, what

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.step.spans is None:
            return
        what = self.what
        self.step.spans.append(
            Span(
                rank=self.step.owner.comm.rank,
                activity=self.activity,
                label=self.label,
                start=self.start,
                stop=time.perf_counter(),
                stage=self.step.owner.stage,
                samples=(what.samples.start, what.samples.stop) if what is not None else None,
                edge=what.edge if isinstance(what, Transfer) else -1,
                step=self.step.step,
            )
        )


def _functions(program: StageProgram | None, schedule: Schedule) -> StageFunctions | None:
    if program is None:
        return None
    return program.evaluate if schedule.forward_only else program.train


def _row_offsets(pieces: Sequence[Samples]) -> dict[Samples, int]:
    offsets, start = {}, 0
    for piece in pieces:
        offsets[piece] = start
        start += len(piece)
    return offsets


def _sum(gradients: Sequence[Tensor], value: ValueSpec, size: int, device: torch.device) -> Tensor:
    if not gradients:  # only stages without a backward read it
        return torch.zeros((size, *value.shape), dtype=value.dtype, device=device)
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total + gradient
    return total
