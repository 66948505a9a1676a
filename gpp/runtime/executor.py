"""Runs a rank's program: one loop over its instructions.

Messages live in rings; an input that came in one message is a view of it and stays there until its backward
is done. Only this loop talks to the communicator. What an instruction reaches for was found beforehand (see
`binding`): the loop only follows numbers.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from gpp.plan import Plan
from gpp.program.stage import ForwardResult, StageProgram, TermSum, TrainFunctions
from gpp.schedule.task import Pass, Reduce, Reduction, Schedule, Update
from gpp.trace import Span

from .binding import Arrival, Bound, Call, Departure, bind
from .channels import Channels, Held, apart
from .communicator import Communicator
from .instruction_text import instruction_text
from .rank_state import RankState
from .reduce import Slots
from .results import Prediction, local_weight
from .schedules import pieces_of
from .spans import span
from .staging import Staging, host_staging

Batch = Mapping[str, Tensor]  # this rank's rows of its batch keys, ascending


@dataclass(frozen=True)
class StepOutcome:
    """What a rank knows after a step: its terms (name to (start, stop, value)), and the global norm.
    `nonfinite`: the step was undone, on all ranks; of the gradients here these are not finite."""

    terms: Mapping[str, list[tuple[int, int, float]]]
    norm: float | None
    predictions: Sequence[Prediction] = ()
    nonfinite: tuple[str, ...] | None = None


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
        self.schedule = schedule
        self.state = state
        self.loss = loss
        self.device = device
        functions = {p.stage: p.evaluate if schedule.forward_only else p.train for p in programs}
        self.stages = tuple(functions)
        pieces = {stage: pieces_of(schedule, comm.rank, stage) for stage in functions}
        reading = [stage for stage, face in functions.items() if face.batch_keys]
        self.rows = sorted(
            {i for s in reading for piece in pieces[s] for i in range(piece.start, piece.stop)}
        )
        self.keys = tuple(dict.fromkeys(key for s in reading if pieces[s] for key in functions[s].batch_keys))
        row_of = {sample: row for row, sample in enumerate(self.rows)}
        self.program = bind(plan, schedule, comm.rank, functions, row_of)
        self._runs = 0
        self._text = partial(instruction_text, plan)
        self.channels = Channels(comm, schedule, list(functions.values()), staging or host_staging(device))
        self.slots = Slots()
        self.spans: list[Span] = []
        self._table = np.array([[0, start] for start in self.program.starts], np.int64).reshape(-1, 2)
        self._positions = torch.from_numpy(self._table).unbind()

    @property
    def own_state(self) -> RankState:
        """The state of a rank that has stages."""
        assert self.state is not None
        return self.state

    def _positions_at(self, step: int) -> Sequence[Tensor]:
        """For each piece an int64 (step, first sample); on the host the same memory in every step."""
        if self.device.type == "cpu":
            self._table[:, 0] = step
            return self._positions
        table = torch.from_numpy(self._table).to(self.device)
        table[:, 0] = step
        return table.unbind()

    def run(self, step: int, batch: Batch, *, record: bool = False, predict: bool = False) -> StepOutcome:
        """Run the program once. `step` keys random numbers; `batch` holds this rank's rows. With `predict`
        the predictions of its stages are kept."""
        run = _Step(self, batch, self._positions_at(step), predict=predict)
        nonfinite = None
        doing = self.comm.doing
        doing.step, doing.describe = step, self._text
        first, self._runs = self._runs == 0, self._runs + 1
        with torch.no_grad(), doing.slow_start() if first else nullcontext():
            run.begin()
            if record:
                self._record(run, step)
            else:
                for instruction in self.program.instructions:
                    doing.now(instruction)
                    run.execute(instruction)
            run.release()
            if not run.is_finite():
                nonfinite = self.own_state.undo()
        return StepOutcome(run.numbers(), run.norm, run.predictions, nonfinite)

    def replay(self, step: int, batch: Batch, functions: Callable[[Call], TrainFunctions]) -> None:
        """The passes and messages of a step that was undone once more, by these functions, without sums over
        ranks and update; in the end that is undone too."""
        run = _Step(self, batch, self._positions_at(step), predict=False)
        with torch.no_grad():
            for instruction in self.program.instructions:
                self.comm.doing.now(instruction)
                match instruction:
                    case Call():
                        run.execute(replace(instruction, functions=functions(instruction)))
                    case Arrival() | Departure():
                        run.execute(instruction)
                    case _:
                        pass
            run.release()
            if self.state is not None:
                self.state.undo()

    def _record(self, run: "_Step", step: int) -> None:
        stage = next(iter(self.stages), -1)
        for instruction in self.program.instructions:
            start = time.perf_counter()
            self.comm.doing.now(instruction)
            run.execute(instruction)
            stop = time.perf_counter()
            if len(self.stages) > 1:  # what is not a pass belongs to the one that ran last
                stage = run.stage
            self.spans.append(span(instruction, start, stop, self.comm.rank, stage, step))


@dataclass(slots=True)
class _Piece:
    """What a stage keeps of some samples between its passes."""

    stash: list[Tensor] = field(default_factory=list)  # for the next pass
    kept: list[Held] = field(default_factory=list)  # messages that it reads
    inputs: Sequence[Tensor] | None = None  # of a forward to run again


class _Step:
    """The state of one run of the program."""

    def __init__(self, owner: Executor, batch: Batch, positions: Sequence[Tensor], *, predict: bool) -> None:
        self.owner = owner
        self.predict = predict
        self.predictions: list[Prediction] = []
        self.batch = batch
        self.positions = positions
        self.terms: list[tuple[str, int, int, Tensor | float]] = []
        self.norm: float | None = None
        self.held: list[Held | None] = [None] * owner.program.messages
        self.pieces: list[_Piece | None] = [None] * len(owner.program.starts)
        self.used: list[Held] = []  # slots to give back after the sends of this pass
        self.outputs: Sequence[Tensor] = ()  # of the last pass
        self.gradients: Sequence[Tensor] = ()
        self.stage = -1  # of the last pass
        self.weight: float | None = None
        self.scaled = False
        self.finite: bool | None = None  # on all ranks, once that is known

    def execute(self, instruction: Bound) -> None:
        if isinstance(instruction, Departure):
            self.send(instruction)
            return
        if self.used:
            # the sends behind a pass may still read views of its buffers, the checker reckons so too
            self.release()
        match instruction:
            case Arrival():
                self.held[instruction.message] = self.owner.channels.receive(instruction.transfer)
            case Call():
                self.compute(instruction)
            case Reduce():
                self.reduce(instruction)
            case Update():
                self.update()
            case _:
                assert_never(instruction)

    def send(self, departure: Departure) -> None:
        values = self.gradients if departure.gradient else self.outputs
        carried = values if departure.values is None else [values[number] for number in departure.values]
        if departure.rows is not None:
            carried = [value[departure.rows] for value in carried]
        self.owner.channels.send(departure.transfer, carried)

    def compute(self, call: Call) -> None:
        self.stage = call.task.stage
        match call.task.kind:
            case Pass.FORWARD:
                self.forward(call)
            case Pass.BACKWARD:
                gradients = self.backward_input(call)
                self.backward_weight(call)
                self.used += gradients
            case Pass.BACKWARD_INPUT:
                gradients = self.backward_input(call)
                piece = self.piece(call)
                piece.stash = apart(piece.stash, gradients)
                self.used = gradients
            case Pass.BACKWARD_WEIGHT:
                self.backward_weight(call)
            case Pass.RECOMPUTE:
                self.recompute(call, self.piece(call))
            case _:
                assert_never(call.task.kind)

    def piece(self, call: Call) -> _Piece:
        piece = self.pieces[call.piece]
        assert piece is not None  # the checker has seen the forward
        return piece

    def forward(self, call: Call) -> None:
        values, kept = self.gather(call)
        inputs = [values[number] for (number,) in call.gather.values]
        inputs += [self.batch[key][call.rows] for key in call.keys]
        result = self.run_forward(call, inputs, self.owner.own_state.buffer_arguments[call.task.stage])
        self.outputs = result.outputs
        samples = call.task.samples
        for name, term in zip(call.terms, result.terms, strict=True):
            # the number, or on a device, which the host need not wait for, a copy: it may lie in a buffer
            number = float(term) if term.device.type == "cpu" else term.clone()
            self.terms.append((name, samples.start, samples.stop, number))
        if self.predict:
            for name, value in zip(call.predictions, result.predictions, strict=True):
                copy = value.to("cpu", copy=True).contiguous()
                self.predictions.append(Prediction(name, samples.start, samples.stop, copy))
        if not call.stashes:
            self.used = kept
        elif call.again:
            self.pieces[call.piece] = _Piece(kept=kept, inputs=inputs)
        else:
            self.pieces[call.piece] = _Piece(list(result.stash), kept)

    def run_forward(self, call: Call, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> ForwardResult:
        arguments = self.owner.own_state.arguments[call.task.stage]
        return call.functions.forward(arguments, buffers, inputs, self.positions[call.piece])

    def recompute(self, call: Call, piece: _Piece) -> None:
        """The forward again, for its stash: random operators are keyed and give the same bits; buffers have
        had their update and are left alone."""
        copies = [buffer.clone() for buffer in self.owner.own_state.buffer_arguments[call.task.stage]]
        assert piece.inputs is not None  # nobody runs it a third time
        piece.stash = list(self.run_forward(call, piece.inputs, copies).stash)
        piece.inputs = None

    def backward_input(self, call: Call) -> list[Held]:
        """The input half; what the weight half needs is put aside. Returns the gradients' buffers."""
        values, used = self.gather(call)
        piece = self.piece(call)
        if piece.inputs is not None:
            self.recompute(call, piece)
        tangents = [
            _sum([values[n] for n in numbers]) if numbers else self.zeros(call, at)
            for at, numbers in enumerate(call.gather.values)
        ]
        arguments = self.owner.own_state.arguments[call.task.stage]
        back = call.functions.backward_input(arguments, piece.stash, tangents)
        self.gradients = back.gradients
        piece.stash = list(back.stash)
        return used

    def zeros(self, call: Call, tangent: int) -> Tensor:
        """The gradient of an output that only stages without a backward read."""
        value = call.tangents[tangent]
        return torch.zeros(
            (len(call.task.samples), *value.shape), dtype=value.dtype, device=self.owner.device
        )

    def backward_weight(self, call: Call) -> None:
        stage, state, piece = call.task.stage, self.owner.own_state, self.piece(call)
        found = call.functions.backward_weight(state.arguments[stage], piece.stash, state.sums[stage])
        state.reach(stage, found)
        self.used = piece.kept
        self.pieces[call.piece] = None

    def gather(self, call: Call) -> tuple[list[Tensor], list[Held]]:
        """The values that messages bring a pass, and the messages."""
        values: list[Tensor] = []
        taken: list[Held] = []
        for port in call.gather.ports:
            parts: list[Held] = []
            for number in port:
                held = self.held[number]
                assert held is not None  # the checker has seen it arrive
                parts.append(held)
                self.held[number] = None
            values += self.owner.channels.joined(parts)
            taken += parts
        return values, taken

    def release(self) -> None:
        """Give the buffers of the last pass back."""
        for item in self.used:
            item.release()
        self.used = []

    def numbers(self) -> dict[str, list[tuple[int, int, float]]]:
        """The terms so far. Only now the host waits for a device that computes them."""
        found: dict[str, list[tuple[int, int, float]]] = {}
        self.terms = [(name, start, stop, float(term)) for name, start, stop, term in self.terms]
        for name, start, stop, term in self.terms:
            found.setdefault(name, []).append((start, stop, float(term)))
        return found

    def reduce(self, instruction: Reduce) -> None:
        owner, state = self.owner, self.owner.own_state
        match instruction.what:
            case Reduction.GRADIENTS:
                state.reduce(owner.comm, instruction.group, instruction.stage, instruction.shared)
            case Reduction.LOSS_WEIGHT:
                weight = local_weight(owner.loss, self.numbers())
                parts = owner.slots.gather(owner.comm, instruction.group, [weight])
                self.weight = sum(part[0] for part in parts)
            case Reduction.NORM:
                self.agree(instruction.group)
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
            local = self.weight if self.weight is not None else local_weight(self.owner.loss, self.numbers())
            self.owner.state.scale(local)

    def begin(self) -> None:
        """Before the first instruction."""
        if self.owner.state is not None and not self.owner.schedule.forward_only:
            self.owner.state.begin()

    def agree(self, group: tuple[int, ...]) -> None:
        """What all ranks must know before they update."""
        self.scale()
        state, names = self.owner.own_state, {name for name, _ in self.owner.loss.terms}
        finite = not state.checks_finite or all(
            math.isfinite(value)
            for name, values in self.numbers().items()
            for _, _, value in values
            if name in names
        )
        self.finite = state.gather_norms(self.owner.comm, group, finite_loss=finite)

    def is_finite(self) -> bool:
        """Whether losses and gradients are, on all ranks; True where nobody checks."""
        state = self.owner.state
        if self.finite is None and state is not None and state.checks_finite:
            if not self.owner.schedule.forward_only:
                self.agree((self.owner.comm.rank,))  # no other has a stage
        return self.finite is not False

    def update(self) -> None:
        """The optimizer's step, one for all stages of the rank."""
        self.scale()
        state = self.owner.own_state
        if self.is_finite():
            self.norm = state.update()
            state.spread(self.owner.comm)
        else:
            self.norm = state.norm


def _sum(gradients: Sequence[Tensor]) -> Tensor:
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total + gradient
    return total
