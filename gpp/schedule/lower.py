"""A plan's order of tasks to instructions per rank: pieces, messages, buffers, and how a step ends.

The sender places both ends: a message is made where it is sent, and its receiver's instruction is derived
from it, so the two cannot disagree. A message is the intersection of one upstream piece with one downstream
piece; re-chunking between different micro-batches and splitting between different numbers of replicas are
this and nothing else.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from gpp.plan import Edge, Plan, StageGraph
from gpp.schedule.order import (
    Place,
    forward_orders,
    forward_places,
    round_trips,
    sharing,
    without_imagined,
)
from gpp.schedule.pieces import micro_batches, piece
from gpp.schedule.slots import activation_slots, forward_slots, gradient_slots, walk
from gpp.schedule.task import (
    INPUT_HALF,
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

# where a message is sent or used: a stage's pass of one direction over one piece on a rank
_Place = tuple[int, int, Direction, Samples]


def lower(plan: Plan, *, forward_only: bool = False, samples: int | None = None) -> Schedule:
    """One training step, or with `forward_only` one evaluation of `samples` samples (at most a mini-batch).

    A rank's program: for each task the Receives that it needs first, the Compute, the Sends of what it made,
    by edge and then by samples; after its last pass what `closing` says. Gradients are received before and
    leave after the input half. Stages on one rank send to each other too, over channels that take no time. A
    replica that gets none of a ragged evaluation has an empty program. Raises ScheduleError for a number of
    samples that cannot be, and for orders that cannot be (`gpp.schedule.order.orders`).
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
        edge, way = graph.edges[transfer.edge], transfer.direction
        source, target = (edge.source, edge.target)[:: 1 if way is Direction.ACTIVATION else -1]
        sends[source, transfer.source, way, made].append(transfer)
        receives[target, transfer.target, way, used].append(transfer)
    programs: list[tuple[Instruction, ...]] = [()] * len(plan.topology.devices)
    trips = round_trips(plan)
    ordered = forward_orders(plan, count) if forward_only else without_imagined(plan, trips)
    for devices, tasks in ordered.items():
        for rank in devices:
            program: list[Instruction] = []
            for task in tasks:
                stage = graph.stages[task.stage]
                part = piece(stage, task.samples, stage.devices.index(rank))
                if part is None:
                    continue
                compute = Compute(Task(task.kind, task.stage, part))
                if task.kind is Pass.FORWARD or task.kind in INPUT_HALF:
                    way = Direction.ACTIVATION if task.kind is Pass.FORWARD else Direction.GRADIENT
                    place = (task.stage, rank, way, part)
                    program += [Receive(t) for t in receives[place]]
                    program.append(compute)
                    program += [Send(t) for t in sends[place]]
                else:
                    program.append(compute)
            held = sorted({i.task.stage for i in program if isinstance(i, Compute)})
            if program:
                programs[rank] = (*program, *closing(plan, held, forward_only=forward_only))
    channels = _channels(
        plan,
        trips,
        [transfer for transfer, _, _ in transfers],
        forward_places(plan, count) if forward_only else None,
    )
    return Schedule(tuple(programs), channels, count, forward_only)


def returns_gradient(graph: StageGraph, edge: Edge) -> bool:
    """Whether gradient messages go against this edge in training."""
    return (
        edge.needs_grad and graph.stages[edge.source].has_backward and graph.stages[edge.target].has_backward
    )


def tag(edge: int, direction: Direction) -> int:
    """The one tag of an edge and direction."""
    return 2 * edge + (direction is Direction.GRADIENT)


def closing(plan: Plan, held: Sequence[int], *, forward_only: bool = False) -> tuple[Instruction, ...]:
    """What a rank with the stages `held` (ascending) does after its last pass.

    Its terms leave first, so that the loss arrives early. Then the reductions, in one order for all ranks
    that meet in them, or they would wait for each other: gradients of replicas by stage (ranks that share one
    of them share all), tied parameters by index, then what all ranks take part in. Groups of one have nothing
    to sum: what several stages of one rank make of a tied parameter, the rank has summed itself.
    """
    graph = plan.stage_graph
    reports = tuple(Report(s) for s in held if graph.stages[s].terms)
    if forward_only:
        return reports
    tail: list[Instruction] = []
    tied = [
        (number, item)
        for number, item in enumerate(graph.shared)
        if item.bytes > 0 and all(graph.stages[s].trainable_bytes > 0 for s in item.stages)
    ]
    for s in held:
        stage = graph.stages[s]
        untied = stage.trainable_bytes - sum(item.bytes for _, item in tied if s in item.stages)
        if len(stage.devices) > 1 and untied > 0:
            tail.append(Reduce(Reduction.GRADIENTS, stage.devices, s, untied))
    for number, item in tied:
        # autograd sums the uses of one parameter from the last to the first
        ranks = [d for s in sorted(set(item.stages), reverse=True) for d in graph.stages[s].devices]
        group = tuple(dict.fromkeys(ranks))
        if len(group) > 1 and not set(held).isdisjoint(item.stages):
            tail.append(Reduce(Reduction.GRADIENTS, group, -1, item.bytes, shared=number))
    everyone = tuple(plan.residents)
    if plan.loss_weighted and len(everyone) > 1:
        tail.append(Reduce(Reduction.LOSS_WEIGHT, everyone, -1, SCALAR_BYTES))
    if plan.global_norm and len(everyone) > 1:
        tail.append(Reduce(Reduction.NORM, everyone, -1, SCALAR_BYTES))
    updates = tuple(Update(s) for s in held if graph.stages[s].trainable_bytes > 0)
    return (*reports, *tail, *updates)


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


def _channels(
    plan: Plan,
    trips: Mapping[tuple[int, ...], Sequence[Task]],
    transfers: list[Transfer],
    places: Sequence[Sequence[Place]] | None,
) -> tuple[Channel, ...]:
    """A channel per (edge, direction, source, target), with as many slots as never hold anything up, and in
    an evaluation (with `places`) enough to end it."""
    graph = plan.stage_graph
    groups: dict[tuple[int, Direction, int, int], list[Transfer]] = defaultdict(list)
    for t in transfers:
        groups[t.edge, t.direction, t.source, t.target].append(t)
    walks = {
        s: walk(task for task in trips[devices] if task.stage == s)
        for devices, held in sharing(plan).items()
        for s in held
    }
    channels = []
    for (number, way, source, target), messages in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1] is Direction.GRADIENT, *item[0][2:])
    ):
        up, down = graph.edges[number].source, graph.edges[number].target
        sizes = graph.stages[up].micro_batch, graph.stages[down].micro_batch
        numbers = [(t.samples.start // sizes[0], t.samples.start // sizes[1]) for t in messages]
        if way is Direction.GRADIENT:
            slots = gradient_slots(walks[up], numbers)
        else:
            slots = activation_slots(walks[up], walks[down], numbers)
        if places is not None:
            made, used = [places[up][above] for above, _ in numbers], [places[down][n] for _, n in numbers]
            slots = min(max(slots, forward_slots(made, used)), len(messages))
        channels.append(
            Channel(
                source=source,
                target=target,
                tag=tag(number, way),
                edge=number,
                direction=way,
                slots=slots,
                bytes=max(t.bytes for t in messages),
            )
        )
    return tuple(channels)
