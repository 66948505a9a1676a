"""Runs a rank's program: one loop over its instructions.

Messages live in rings; an input that came in one message is a view of it and stays there until its backward
is done. Only this loop talks to the communicator.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpp.plan import Plan
from gpp.program.stage import ForwardResult, StageProgram, TermSum, ValueSpec
from gpp.schedule.lower import returns_gradient
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
from gpp.trace import Activity, Span

from .channels import Channels, Held, joined, port_of
from .communicator import Communicator
from .rank_state import RankState
from .reduce import Slots
from .results import Prediction, local_weight
from .schedules import pieces_of
from .staging import Staging

Batch = Mapping[str, Tensor]  # this rank's rows of its batch keys, ascending
_Piece = tuple[int, Samples]  # of a stage


@dataclass(frozen=True)
class StepOutcome:
    """What a rank knows after a step: its terms (name to (start, stop, value)), and the global norm."""

    terms: Mapping[str, list[tuple[int, int, float]]]
    norm: float | None
    predictions: Sequence[Prediction] = ()


class Executor:
    """One rank's share of one schedule, to be run many times.

    `programs` are those of the rank's stages, none if it is idle. `rows` are the samples of a mini-batch that
    it reads, and `keys` what it reads of them. `loss` is the one whose divisor the stages must agree on.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: Plan,
        schedule: Schedule,
        programs: Sequence[StageProgram],
        state: RankState | None,
        loss: TermSum,
        device: torch.device,
        staging: Staging | None = None,
    ) -> None:
        self.comm = comm
        self.plan = plan
        self.schedule = schedule
        self.program = schedule.programs[comm.rank] if comm.rank < len(schedule.programs) else ()
        self.state = state
        self.loss = loss
        self.device = device
        self.functions = {p.stage: p.evaluate if schedule.forward_only else p.train for p in programs}
        pieces = {stage: pieces_of(schedule, comm.rank, stage) for stage in self.functions}
        reading = [stage for stage, functions in self.functions.items() if functions.batch_keys]
        self.rows = sorted(
            {i for s in reading for piece in pieces[s] for i in range(piece.start, piece.stop)}
        )
        self.keys = tuple(
            dict.fromkeys(key for s in reading if pieces[s] for key in self.functions[s].batch_keys)
        )
        self.row_of = {sample: row for row, sample in enumerate(self.rows)}
        updates = [i for i, instruction in enumerate(self.program) if isinstance(instruction, Update)]
        self.last_update = updates[-1] if updates else -1
        self.channels = Channels(comm, schedule, list(self.functions.values()), staging)
        self.slots = Slots()
        self.spans: list[Span] = []
        self._positions: dict[int, tuple[NDArray[np.int64], Tensor]] = {}

    @property
    def own_state(self) -> RankState:
        """The state of a rank that has stages."""
        assert self.state is not None
        return self.state

    def position(self, step: int, start: int) -> Tensor:
        """int64 (step, first sample): the same memory for the same samples of every step."""
        if self.device.type != "cpu":
            return torch.tensor([step, start], device=self.device)
        if start not in self._positions:
            numbers = np.array([step, start])
            self._positions[start] = (numbers, torch.from_numpy(numbers))
        numbers, position = self._positions[start]
        numbers[0] = step  # not through torch, which takes ten times as long where a task is short
        return position

    def run(self, step: int, batch: Batch, *, record: bool = False, predict: bool = False) -> StepOutcome:
        """Run the program once. `step` keys random numbers; `batch` holds this rank's rows. With `predict`
        the predictions of its stages are kept."""
        run = _Step(self, step, batch, self.spans if record else None, predict=predict)
        with torch.no_grad():
            for at, instruction in enumerate(self.program):
                run.execute(at, instruction)
            run.finish()
        return StepOutcome(run.terms, run.norm, run.predictions)


class _Step:
    """The state of one run of the program."""

    def __init__(
        self, owner: Executor, step: int, batch: Batch, spans: list[Span] | None, *, predict: bool
    ) -> None:
        self.owner = owner
        self.predict = predict
        self.predictions: list[Prediction] = []
        self.step = step
        self.batch = batch
        self.spans = spans
        self.terms: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
        self.norm: float | None = None
        self.held: dict[tuple[int, Direction], list[Held]] = defaultdict(list)
        self.stash: dict[_Piece, tuple[list[Tensor], list[Held]]] = {}
        self.inputs: dict[_Piece, tuple[list[Tensor], list[Held]]] = {}  # of forwards to run again
        self.late: dict[_Piece, tuple[list[Tensor], list[Held]]] = {}  # what weight halves still need
        self.used: list[Held] = []  # slots to give back after the sends of this pass
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.task = Task(Pass.FORWARD, -1, Samples(0, 1))  # the last one: whose results are sent
        self.weight: float | None = None
        self.scaled = False

    def execute(self, at: int, instruction: Instruction) -> None:
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
                if at == self.owner.last_update:  # one optimizer for all stages of the rank
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
        functions = self.owner.functions[self.task.stage]
        gradient = transfer.direction is Direction.GRADIENT
        port = port_of(functions.receives if gradient else functions.sends, transfer.edge)
        values = self.gradients if gradient else self.outputs
        carried = [values[v.name] for v in port.values if v.needs_grad or not gradient]
        if transfer.samples != self.task.samples:
            start = transfer.samples.start - self.task.samples.start
            carried = [value[start : start + len(transfer.samples)] for value in carried]
        self.owner.channels.send(transfer, carried)

    def compute(self, task: Task) -> None:
        self.task = task
        piece = (task.stage, task.samples)
        match task.kind:
            case Pass.FORWARD:
                self.forward(task)
            case Pass.BACKWARD:
                gradients = self.backward_input(task)
                self.backward_weight(task)
                self.used += gradients
            case Pass.BACKWARD_INPUT:
                gradients = self.backward_input(task)
                stash, kept = self.late[piece]
                self.late[piece] = (_apart(stash, gradients), kept)
                self.used = gradients
            case Pass.BACKWARD_WEIGHT:
                self.backward_weight(task)
            case Pass.RECOMPUTE:
                self.recompute(task)
            case _:
                assert_never(task.kind)

    def forward(self, task: Task) -> None:
        owner, functions = self.owner, self.owner.functions[task.stage]
        received: dict[str, Tensor] = {}
        kept: list[Held] = []
        for port in functions.receives:
            parts = self.take(port.edge, Direction.ACTIVATION, task.samples)
            received |= dict(zip((v.name for v in port.values), joined(parts, owner.device), strict=True))
            kept += parts
        inputs = [received[v.name] for v in functions.inputs]
        inputs += [self.rows(key, task.samples) for key in functions.batch_keys]
        result = self.run_forward(task, inputs, owner.own_state.buffer_arguments[task.stage])
        self.outputs = dict(zip((v.name for v in functions.outputs), result.outputs, strict=True))
        for name, term in zip(functions.terms, result.terms, strict=True):
            self.terms[name].append((task.samples.start, task.samples.stop, float(term)))
        if self.predict:
            for name, value in zip(functions.predictions, result.predictions, strict=True):
                copy = value.to("cpu", copy=True).contiguous()
                self.predictions.append(Prediction(name, task.samples.start, task.samples.stop, copy))
        stage = owner.plan.stage_graph.stages[task.stage]
        if not stage.has_backward or owner.schedule.forward_only:
            self.used = kept
        elif stage.recompute:
            self.inputs[task.stage, task.samples] = (inputs, kept)
        else:
            self.stash[task.stage, task.samples] = (list(result.stash), kept)

    def run_forward(self, task: Task, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> ForwardResult:
        owner = self.owner
        position = owner.position(self.step, task.samples.start)
        run = owner.functions[task.stage].sizes[len(task.samples)]
        return run.forward(owner.own_state.arguments[task.stage], buffers, inputs, position)

    def recompute(self, task: Task) -> None:
        """The forward again, for its stash: random operators are keyed and give the same bits; buffers have
        had their update and are left alone."""
        inputs, kept = self.inputs.pop((task.stage, task.samples))
        copies = [buffer.clone() for buffer in self.owner.own_state.buffer_arguments[task.stage]]
        self.stash[task.stage, task.samples] = (list(self.run_forward(task, inputs, copies).stash), kept)

    def backward_input(self, task: Task) -> list[Held]:
        """The input half; what the weight half needs is put aside. Returns the gradients' buffers."""
        owner, functions = self.owner, self.owner.functions[task.stage]
        edges = owner.plan.stage_graph.edges
        arrived: dict[str, list[Tensor]] = defaultdict(list)
        used: list[Held] = []
        # eager autograd sums the uses of a value from the last to the first
        for port in reversed(functions.sends):
            values = [v for v in port.values if v.needs_grad]
            if not returns_gradient(owner.plan.stage_graph, edges[port.edge]):
                continue
            parts = self.take(port.edge, Direction.GRADIENT, task.samples)
            for value, gradient in zip(values, joined(parts, owner.device), strict=True):
                arrived[value.name].append(gradient)
            used += parts
        piece, size = (task.stage, task.samples), len(task.samples)
        if piece in self.inputs:
            self.recompute(task)
        tangents = [_sum(arrived[v.name], v, size, owner.device) for v in functions.outputs if v.needs_grad]
        stash, kept = self.stash.pop(piece)
        back = functions.sizes[size].backward_input(owner.own_state.arguments[task.stage], stash, tangents)
        names = (v.name for v in functions.inputs if v.needs_grad)
        self.gradients = dict(zip(names, back.gradients, strict=True))
        self.late[piece] = (list(back.stash), kept)
        return used

    def backward_weight(self, task: Task) -> None:
        state = self.owner.own_state
        stash, kept = self.late.pop((task.stage, task.samples))
        run = self.owner.functions[task.stage].sizes[len(task.samples)]
        sums = state.sums[task.stage]
        state.reach(task.stage, run.backward_weight(state.arguments[task.stage], stash, sums))
        self.used = kept

    def take(self, edge: int, way: Direction, samples: Samples) -> list[Held]:
        """The messages that make up `samples`, in order."""
        held = self.held[edge, way]
        parts = [h for h in held if h.samples.intersection(samples) is not None]
        self.held[edge, way] = [h for h in held if h not in parts]
        return sorted(parts, key=lambda h: h.samples)

    def rows(self, key: str, samples: Samples) -> Tensor:
        start = self.owner.row_of[samples.start]
        return self.batch[key][start : start + len(samples)]

    def release(self, held: Sequence[Held]) -> None:
        for item in held:
            item.release()

    def reduce(self, instruction: Reduce) -> None:
        owner, state = self.owner, self.owner.own_state
        match instruction.what:
            case Reduction.GRADIENTS:
                state.reduce(owner.comm, instruction.group, instruction.stage, instruction.shared)
            case Reduction.LOSS_WEIGHT:
                weight = local_weight(owner.loss, self.terms)
                parts = owner.slots.gather(owner.comm, instruction.group, [weight])
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
        state = self.owner.own_state
        self.norm = state.update()
        state.spread(self.owner.comm)

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
                stage=_stage_of(self.step, what),
                samples=(what.samples.start, what.samples.stop) if what is not None else None,
                edge=what.edge if isinstance(what, Transfer) else -1,
                step=self.step.step,
            )
        )


def _stage_of(step: _Step, what: Task | Transfer | None) -> int:
    """The stage a span belongs to: of what is not a pass, the one that ran last; the only one, mostly."""
    if isinstance(what, Task):
        return what.stage
    return step.task.stage if len(step.owner.functions) > 1 else next(iter(step.owner.functions), -1)


def _apart(stash: Sequence[Tensor], gradients: Sequence[Held]) -> list[Tensor]:
    """The tensors, those that are views of the gradients' buffers copied: these are given back before the
    weight half runs."""
    lent = {view.untyped_storage().data_ptr() for held in gradients for view in held.views}
    return [t.clone() if t.untyped_storage().data_ptr() in lent else t for t in stash]


def _sum(gradients: Sequence[Tensor], value: ValueSpec, size: int, device: torch.device) -> Tensor:
    if not gradients:  # only stages without a backward read it
        return torch.zeros((size, *value.shape), dtype=value.dtype, device=device)
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total + gradient
    return total
