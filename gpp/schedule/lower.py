"""A plan's order of tasks to instructions per rank: pieces, messages, buffers, and how a step ends.

The sender places both ends: a message is made where it is sent, and its receiver's instruction is derived
from it, so the two cannot disagree. A message is the intersection of one upstream piece with one downstream
piece; re-chunking between different micro-batches and splitting between different numbers of replicas are
this and nothing else.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

from gpp.plan import Edge, Plan, StageGraph
from gpp.schedule.order import forward_only as forward_only_order
from gpp.schedule.order import micro_batches, order, piece, round_trips
from gpp.schedule.task import (
    Channel,
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
    ScheduleError,
    Send,
    Task,
    Transfer,
    Update,
)

SCALAR_BYTES = 8  # loss weight and norm are float64

# where a message is sent or used: a rank's pass of one direction over one piece
_Place = tuple[int, Direction, Samples]


def lower(plan: Plan, *, forward_only: bool = False, samples: int | None = None) -> Schedule:
    """One training step, or with `forward_only` one evaluation of `samples` samples (at most a mini-batch).

    A rank's program: for each task the Receives that it needs first, the Compute, the Sends of what it made,
    by edge and then by samples; after its last pass what `closing` says. A replica that gets none of a ragged
    evaluation has an empty program. Raises ScheduleError for a number of samples that cannot be, and for a
    stage that may hold less than a micro-batch.
    """
    count = plan.mini_batch if samples is None else samples
    if not 1 <= count <= plan.mini_batch or (count != plan.mini_batch and not forward_only):
        raise ScheduleError(
            f"a training step has {plan.mini_batch} samples, an evaluation 1 to {plan.mini_batch}; "
            f"{count} were asked for"
        )
    graph = plan.stage_graph
    transfers = _transfers(graph, count, forward_only)
    sends: dict[_Place, list[Transfer]] = defaultdict(list)
    receives: dict[_Place, list[Transfer]] = defaultdict(list)
    for transfer, made, used in transfers:
        sends[transfer.source, transfer.direction, made].append(transfer)
        receives[transfer.target, transfer.direction, used].append(transfer)
    programs: list[tuple[Instruction, ...]] = [()] * len(plan.topology.devices)
    for index, stage in enumerate(graph.stages):
        tasks = (
            forward_only_order(index, stage, count)
            if forward_only
            else order(index, stage, plan.policy, count)
        )
        for replica, rank in enumerate(stage.devices):
            program: list[Instruction] = []
            for task in tasks:
                part = piece(stage, task.samples, replica)
                if part is not None:
                    way = Direction.ACTIVATION if task.kind is Pass.FORWARD else Direction.GRADIENT
                    program += [Receive(t) for t in receives[rank, way, part]]
                    program.append(Compute(Task(task.kind, index, part)))
                    program += [Send(t) for t in sends[rank, way, part]]
            if program:
                programs[rank] = (*program, *closing(plan, index, forward_only=forward_only))
    channels = _channels(plan, [transfer for transfer, _, _ in transfers])
    return Schedule(tuple(programs), channels, count, forward_only)


def returns_gradient(graph: StageGraph, edge: Edge) -> bool:
    """Whether gradient messages go against this edge in training."""
    return (
        edge.needs_grad and graph.stages[edge.source].has_backward and graph.stages[edge.target].has_backward
    )


def tag(edge: int, direction: Direction) -> int:
    """The one tag of an edge and direction."""
    return 2 * edge + (direction is Direction.GRADIENT)


def closing(plan: Plan, index: int, *, forward_only: bool = False) -> tuple[Instruction, ...]:
    """What a rank of stage `index` does after its last pass.

    Its terms leave first, so that the loss arrives early. Then the reductions, in one order for all ranks
    that meet in them, or they would wait for each other: gradients of replicas (each rank is in one such
    group at most), tied parameters by index, then what all ranks take part in. Groups of one have nothing to
    sum.
    """
    graph = plan.stage_graph
    stage = graph.stages[index]
    report: tuple[Instruction, ...] = (Report(index),) if stage.terms else ()
    if forward_only:
        return report
    tail: list[Instruction] = []
    tied = [
        (number, item)
        for number, item in enumerate(graph.shared)
        if item.bytes > 0 and all(graph.stages[s].trainable_bytes > 0 for s in item.stages)
    ]
    untied = stage.trainable_bytes - sum(item.bytes for _, item in tied if index in item.stages)
    if len(stage.devices) > 1 and untied > 0:
        tail.append(Reduce(Reduction.GRADIENTS, stage.devices, index, untied))
    for number, item in tied:
        # autograd sums the uses of one parameter from the last to the first
        group = tuple(d for s in sorted(set(item.stages), reverse=True) for d in graph.stages[s].devices)
        if index in item.stages and len(group) > 1:
            tail.append(Reduce(Reduction.GRADIENTS, group, -1, item.bytes, shared=number))
    everyone = tuple(sorted(d for s in graph.stages for d in s.devices))
    if plan.loss_weighted and len(everyone) > 1:
        tail.append(Reduce(Reduction.LOSS_WEIGHT, everyone, -1, SCALAR_BYTES))
    if plan.global_norm and len(everyone) > 1:
        tail.append(Reduce(Reduction.NORM, everyone, -1, SCALAR_BYTES))
    if stage.trainable_bytes > 0:
        tail.append(Update(index))
    return (*report, *tail)


def _transfers(graph: StageGraph, count: int, forward_only: bool) -> list[tuple[Transfer, Samples, Samples]]:
    """Every message by edge, direction and samples, with the piece that makes it and the one that uses it."""
    pieces = [
        [
            (part, rank)
            for whole in micro_batches(stage, count)
            for replica, rank in enumerate(stage.devices)
            if (part := piece(stage, whole, replica)) is not None
        ]
        for stage in graph.stages
    ]
    found = []
    for number, edge in enumerate(graph.edges):
        back = not forward_only and returns_gradient(graph, edge)
        for way in Direction if back else (Direction.ACTIVATION,):
            gradient = way is Direction.GRADIENT
            size = edge.gradient_bytes if gradient else edge.bytes
            ends = (edge.target, edge.source) if gradient else (edge.source, edge.target)
            for made, source, used, target, both in _meet(pieces[ends[0]], pieces[ends[1]]):
                message = Transfer(number, way, both, source, target, tag(number, way), size * len(both))
                found.append((message, made, used))
    return found


def _meet(
    left: list[tuple[Samples, int]], right: list[tuple[Samples, int]]
) -> list[tuple[Samples, int, Samples, int, Samples]]:
    """All intersections of two partitions of the same samples, in order."""
    met = []
    i = j = 0
    while i < len(left) and j < len(right):
        (made, source), (used, target) = left[i], right[j]
        both = made.intersection(used)
        if both is not None:
            met.append((made, source, used, target, both))
        i, j = i + (made.stop <= used.stop), j + (used.stop <= made.stop)
    return met


def _channels(plan: Plan, transfers: list[Transfer]) -> tuple[Channel, ...]:
    """A channel per (edge, direction, source, target), with as many slots as never hold anything up.

    A message and the gradient of the same samples both live between the upstream forward and the upstream
    backward of these samples. So a channel never holds more messages than its upstream rank has forwarded and
    not yet seen back, and the peak of that number over the upstream program is enough. Where no gradient
    returns, and in evaluation, the backwards are imagined: they would only add waiting, so what suffices with
    them suffices without.
    """
    graph = plan.stage_graph
    groups: dict[tuple[int, Direction, int, int], list[Transfer]] = defaultdict(list)
    for t in transfers:
        groups[t.edge, t.direction, t.source, t.target].append(t)
    walks: dict[int, list[tuple[Samples, int]]] = {}
    for index, stage in enumerate(graph.stages):
        tasks = round_trips(index, stage, plan.policy, plan.mini_batch)
        walks[index] = [(task.samples, 1 if task.kind is Pass.FORWARD else -1) for task in tasks]
    channels = []
    for (number, way, source, target), messages in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1] is Direction.GRADIENT, *item[0][2:])
    ):
        upstream = graph.edges[number].source
        b = graph.stages[upstream].micro_batch
        per_micro_batch = Counter(t.samples.start // b * b for t in messages)
        channels.append(
            Channel(
                source=source,
                target=target,
                tag=tag(number, way),
                edge=number,
                direction=way,
                slots=_peak(walks[upstream], per_micro_batch),
                bytes=max(t.bytes for t in messages),
            )
        )
    return tuple(channels)


def _peak(walk: list[tuple[Samples, int]], messages: Mapping[int, int]) -> int:
    """The most messages forwarded and not yet seen back; `messages` counts them by micro-batch start."""
    held = peak = 0
    for samples, sign in walk:
        held += sign * messages.get(samples.start, 0)
        peak = max(peak, held)
    return peak
