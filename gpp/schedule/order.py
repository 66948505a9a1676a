"""In which order devices work on micro-batches: within the samples that each stage may hold, who goes first.

Whole micro-batches here; `gpp.schedule.lower` gives each replica its piece. Forwards, input halves and weight
halves of a stage's micro-batches each run first in, first out in every policy: other orders would sum
gradients to other bits.
"""

from collections.abc import Mapping

from gpp.plan import Plan
from gpp.schedule.greedy import greedy_orders
from gpp.schedule.pieces import micro_batches
from gpp.schedule.static import static_order
from gpp.schedule.task import Pass, Task

Devices = tuple[int, ...]
Place = tuple[int, int, int]  # samples needed, stage, number of the micro-batch


def orders(plan: Plan) -> Mapping[Devices, tuple[Task, ...]]:
    """The tasks of one training step, in order, of every set of devices that stages share.

    Keys are ascending device numbers, in the order of the first stage on them; every stage is on exactly one
    key, and all devices of a key follow the same list (each with its replica's piece). A task names its stage
    and the samples of a whole micro-batch. Stages without a backward have only forwards.

    A device with one stage follows the plan's policy: `gpp.schedule.static.static_order`, or for "greedy" the
    clock of `gpp.schedule.greedy`. A device with several stages always takes its order from that clock, on
    which all others follow theirs. The same plan gives the same orders everywhere: no search, no random
    numbers, only the plan's own numbers. Raises ScheduleError where a stage may hold less than a micro-batch
    or the clock stands still.
    """
    return without_imagined(plan, round_trips(plan))


def without_imagined(
    plan: Plan, trips: Mapping[Devices, tuple[Task, ...]]
) -> Mapping[Devices, tuple[Task, ...]]:
    """`round_trips` without the backwards of stages that have none."""
    stages = plan.stage_graph.stages
    return {
        devices: tuple(t for t in tasks if t.kind is Pass.FORWARD or stages[t.stage].has_backward)
        for devices, tasks in trips.items()
    }


def round_trips(plan: Plan) -> Mapping[Devices, tuple[Task, ...]]:
    """`orders` as if every stage had a backward: what bounds the messages on their way."""
    found = sharing(plan)
    if plan.policy.name == "greedy" or any(len(stages) > 1 for stages in found.values()):
        return greedy_orders(plan, found)
    graph = plan.stage_graph
    return {
        devices: static_order(index, graph.stages[index], plan.policy, plan.mini_batch)
        for devices, (index,) in found.items()
    }


def sharing(plan: Plan) -> Mapping[Devices, tuple[int, ...]]:
    """Every set of devices to the stages that share it."""
    found: dict[Devices, tuple[int, ...]] = {}
    for index, stage in enumerate(plan.stage_graph.stages):
        devices = tuple(sorted(stage.devices))
        found[devices] = (*found.get(devices, ()), index)
    return found


def forward_orders(plan: Plan, samples: int) -> Mapping[Devices, tuple[Task, ...]]:
    """The tasks of an evaluation of `samples` samples, keys as in `orders`; sorted by `forward_places`."""
    graph = plan.stage_graph
    places = forward_places(plan, samples)
    parts = [micro_batches(stage, samples) for stage in graph.stages]
    return {
        devices: tuple(
            Task(Pass.FORWARD, s, parts[s][number])
            for _, s, number in sorted(place for s in held for place in places[s])
        )
        for devices, held in sharing(plan).items()
    }


def forward_places(plan: Plan, samples: int) -> list[list[Place]]:
    """Where each stage's micro-batches stand in one order of all forwards of an evaluation.

    By the first so many samples that a forward needs of the whole graph, then by stage: each comes after what
    it needs, so devices that follow this order cannot wait in a circle.
    """
    graph = plan.stage_graph
    found: list[list[Place]] = []
    for index, stage in enumerate(graph.stages):
        found.append([])
        for number, part in enumerate(micro_batches(stage, samples)):
            last = part.stop - 1
            before = (found[p][last // graph.stages[p].micro_batch][0] for p in graph.predecessors[index])
            found[index].append((max([part.stop, *before]), index, number))
    return found
