"""Orders as numbers, for those who look at thousands of plans: made once for all stages that only differ in
name and size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpp.plan import Plan, Policy, Stage, StageSeconds
from gpp.schedule.order import round_trips
from gpp.schedule.slots import Walk, walk
from gpp.schedule.static import static_order, warm_up
from gpp.schedule.task import Pass, Task

Devices = tuple[int, ...]
KINDS = tuple(Pass)
_NUMBER = {kind.value: number for number, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Trip:
    """The order of a set of devices, imagined backwards and all.

    A code is place x len(KINDS) + the number of the kind in KINDS, with the place of its stage among those on
    the devices. `walks` are of each of these stages.
    """

    codes: tuple[int, ...]
    walks: tuple[Walk, ...]

    def real(self, has_backward: Sequence[bool]) -> Sequence[int]:
        """The codes without the backwards of stages (by place) that have none."""
        if all(has_backward):
            return self.codes
        forward = KINDS.index(Pass.FORWARD)
        return [c for c in self.codes if c % len(KINDS) == forward or has_backward[c // len(KINDS)]]


def trips(plan: Plan, shared: Mapping[Devices, Sequence[int]]) -> Mapping[Devices, Trip]:
    """`gpp.schedule.order.round_trips` of the plan; `shared` are its devices to the stages on them.

    Raises ScheduleError as that does. Static orders are remembered by what they depend on.
    """
    graph, policy = plan.stage_graph, plan.policy
    if policy.name == "greedy" or any(len(held) > 1 for held in shared.values()):
        return {devices: _trip(tasks, shared[devices]) for devices, tasks in round_trips(plan).items()}
    found = {}
    for devices, (index,) in shared.items():
        stage = graph.stages[index]
        warm_up(stage)  # refuses what could never run
        count, held = plan.mini_batch // stage.micro_batch, stage.in_flight // stage.micro_batch
        found[devices] = _static_trip(policy.name, count, held, stage.k, stage.weight_lag)
    return found


@lru_cache(maxsize=1024)
def _static_trip(policy: str, count: int, held: int, k: int, lag: int) -> Trip:
    """Of a stage with micro-batches of one sample: only how many counts."""
    nothing = StageSeconds(0.0, 0.0, 0.0)
    stage = Stage("any", ("any",), (0,), 1, held, nothing, k=k, weight_lag=lag)
    return _trip(static_order(0, stage, Policy(policy), count), (0,))


def _trip(tasks: Sequence[Task], held: Sequence[int]) -> Trip:
    place = {s: i * len(KINDS) for i, s in enumerate(held)}
    codes = tuple(place[task.stage] + _NUMBER[task.kind.value] for task in tasks)
    return Trip(codes, tuple(walk(t for t in tasks if t.stage == s) for s in held))
