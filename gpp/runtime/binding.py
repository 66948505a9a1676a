"""Where everything lies that a rank's program touches, worked out once: a step then looks nothing up.

Messages and micro-batches are numbered in the order of the program. What is bound to real tensors later is
said by numbers: the values of a message, of a stage's outputs, of the gradients of its inputs. Between two
short passes it is not the instructions that take time, but everything that they reach for: a processor that
has slept, or has computed, has none of it at hand.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpp.plan import Plan
from gpp.program.stage import Port, StageFunctions, TrainFunctions, ValueSpec
from gpp.schedule.lower import returns_gradient
from gpp.schedule.task import (
    Compute,
    Direction,
    Pass,
    Receive,
    Reduce,
    Report,
    Samples,
    Schedule,
    Send,
    Task,
    Transfer,
    Update,
)

from .buffers import channel_values


@dataclass(frozen=True, slots=True)
class Arrival:
    """Wait for a message, the one of this number."""

    transfer: Transfer
    message: int


@dataclass(frozen=True, slots=True)
class Departure:
    """Send values of the last pass: of its outputs, or of the gradients that it found, by number, or all in
    order; `rows` of them, or all."""

    transfer: Transfer
    gradient: bool
    values: tuple[int, ...] | None
    rows: slice | None


@dataclass(frozen=True, slots=True)
class Gather:
    """What a pass takes from messages. `ports`: the messages that make up each port's values, in order of
    samples. `values`: for each value that the pass wants, the numbers of those that add up to it among the
    values of all ports."""

    ports: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """Run a pass. `piece` is the number of its samples, `rows` are these among those that the rank reads.
    `tangents` are the outputs whose gradients a backward wants. `stashes`: a backward follows; `again`: it
    runs the forward once more."""

    task: Task
    functions: TrainFunctions
    piece: int
    gather: Gather
    rows: slice
    keys: tuple[str, ...]
    terms: tuple[str, ...]
    predictions: tuple[str, ...]
    tangents: tuple[ValueSpec, ...]
    stashes: bool
    again: bool


Bound = Arrival | Departure | Call | Reduce | Update

_NOTHING = Gather((), ())


@dataclass(frozen=True)
class BoundProgram:
    """A program, the number of messages that it deals with, and the first sample of each piece."""

    instructions: tuple[Bound, ...]
    messages: int
    starts: tuple[int, ...]


def bind(
    plan: Plan,
    schedule: Schedule,
    rank: int,
    functions: Mapping[int, StageFunctions],
    row_of: Mapping[int, int],
) -> BoundProgram:
    """The program of a rank; `functions` are those of its stages, `row_of` tells which row of its batch a
    sample is. One update stands for those of all stages, and reports are the caller's."""
    program = schedule.programs[rank] if rank < len(schedule.programs) else ()
    held: dict[tuple[int, Direction], list[tuple[Samples, int]]] = defaultdict(list)
    pieces: dict[tuple[int, Samples], int] = {}
    bound: list[Bound] = []
    messages = 0
    last = Task(Pass.FORWARD, -1, Samples(0, 1))
    updates = [at for at, instruction in enumerate(program) if isinstance(instruction, Update)]

    def take(edge: int, way: Direction, samples: Samples) -> tuple[int, ...]:
        parts = [part for part in held[edge, way] if part[0].intersection(samples) is not None]
        held[edge, way] = [part for part in held[edge, way] if part not in parts]
        return tuple(number for _, number in sorted(parts))

    def call(task: Task) -> Call:
        stage, face = plan.stage_graph.stages[task.stage], functions[task.stage]
        start = row_of[task.samples.start] if face.batch_keys else 0
        match task.kind:
            case Pass.FORWARD:
                ports = tuple(take(port.edge, Direction.ACTIVATION, task.samples) for port in face.receives)
                gather = Gather(ports, _inputs(face))
            case Pass.BACKWARD | Pass.BACKWARD_INPUT:
                sends = _returning(plan, face)
                ports = tuple(take(port.edge, Direction.GRADIENT, task.samples) for port in sends)
                gather = Gather(ports, _tangents(face, sends))
            case _:
                gather = _NOTHING
        return Call(
            task=task,
            functions=face.sizes[len(task.samples)],
            piece=pieces.setdefault((task.stage, task.samples), len(pieces)),
            gather=gather,
            rows=slice(start, start + len(task.samples)),
            keys=face.batch_keys,
            terms=face.terms,
            predictions=face.predictions,
            tangents=tuple(v for v in face.outputs if v.needs_grad),
            stashes=stage.has_backward and not schedule.forward_only,
            again=stage.recompute,
        )

    for at, instruction in enumerate(program):
        match instruction:
            case Receive(transfer):
                held[transfer.edge, transfer.direction].append((transfer.samples, messages))
                bound.append(Arrival(transfer, messages))
                messages += 1
            case Compute(task):
                bound.append(call(task))
                last = task
            case Send(transfer):
                bound.append(_departure(transfer, last, functions[last.stage]))
            case Update() if at != updates[-1]:
                pass
            case Report():
                pass
            case _:
                bound.append(instruction)
    return BoundProgram(tuple(bound), messages, tuple(samples.start for _, samples in pieces))


def port_of(ports: Sequence[Port], edge: int) -> Port:
    """The port of an edge."""
    return next(p for p in ports if p.edge == edge)


def _inputs(face: StageFunctions) -> tuple[tuple[int, ...], ...]:
    arriving = [value.name for port in face.receives for value in port.values]
    return tuple((arriving.index(value.name),) for value in face.inputs)


def _returning(plan: Plan, face: StageFunctions) -> list[Port]:
    """The ports that gradients come back to, the last first: eager autograd sums the uses of a value from
    the last to the first."""
    edges = plan.stage_graph.edges
    return [port for port in reversed(face.sends) if returns_gradient(plan.stage_graph, edges[port.edge])]


def _tangents(face: StageFunctions, sends: Sequence[Port]) -> tuple[tuple[int, ...], ...]:
    arriving = [v.name for port in sends for v in channel_values(port.values, Direction.GRADIENT)]
    return tuple(
        tuple(number for number, name in enumerate(arriving) if name == value.name)
        for value in face.outputs
        if value.needs_grad
    )


def _departure(transfer: Transfer, task: Task, face: StageFunctions) -> Departure:
    gradient = transfer.direction is Direction.GRADIENT
    port = port_of(face.receives if gradient else face.sends, transfer.edge)
    known = [v.name for v in (channel_values(face.inputs, transfer.direction) if gradient else face.outputs)]
    values = tuple(known.index(v.name) for v in channel_values(port.values, transfer.direction))
    start = transfer.samples.start - task.samples.start
    rows = slice(start, start + len(transfer.samples)) if transfer.samples != task.samples else None
    every = values == tuple(range(len(known)))
    return Departure(transfer, gradient, None if every else values, rows)
