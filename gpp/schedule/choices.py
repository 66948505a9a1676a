"""The schedules worth simulating for a partition: no one rule is the best everywhere."""

from collections.abc import Sequence

from gpp.plan import Plan, Policy
from gpp.schedule.order import round_trips
from gpp.schedule.task import INPUT_HALF, WEIGHT_HALF, Pass, ScheduleError
from gpp.schedule.template import (
    Counts,
    Pipeline,
    by_time,
    fits,
    most_extra,
    pipeline,
    template,
    warm_ups,
    with_schedule,
)

PATIENCES = (0.0, 0.5)


def candidates(
    plan: Plan,
    caps: Sequence[int],
    *,
    lags: Sequence[int] | None = None,
    eager: bool = True,
    split: bool = True,
    greedy: bool = True,
) -> list[Plan]:
    """The plan with each schedule that fits, the plainest first.

    `caps` are the most micro-batches that each stage may hold, `lags` the most of which it may hold nothing
    but the weight half to come (where recomputing makes that the dearer part). 1F1B with its own number in
    flight and with the fewest that keep its period, `eager` warm-ups, the zero-bubble template with 1F1B's
    warm-ups and with scaled ones (`split`), and `greedy` orders with two patiences. Warm-ups are scaled to
    the caps. Memory beyond twice the pipeline's depth buys nothing and is not used. Where 1F1B itself fits it
    is among them, so the best is never slower.

    Which is best is for the caller to time, and whether it fits the device, for messages count too. Empty if
    nothing fits. O(stages + edges) times the log of the depth, and a clock for each greedy order.
    """
    p = pipeline(plan)
    least = warm_ups(p)
    depth = max(held // b for held, b in zip(least, p.micro_batches, strict=True))
    room = [min(cap, 2 * depth, m) for cap, m in zip(caps, p.rounds, strict=True)]
    extra = most_extra(p, room)
    none = (0,) * len(least)
    lean = by_time(p)
    found: list[tuple[Policy, Counts]] = []
    if extra is not None:
        found.append((Policy(), Counts(warm_ups(p, min(extra, 0)), none)))
    if fits(p, lean, room):
        found.append((Policy(), Counts(lean, none)))
    if eager and extra is not None and extra > 0:
        held = warm_ups(p, min(extra, depth - 1))
        found.append((Policy(extra_warm_up=1), Counts(held, none)))
    if split:
        warm = [] if extra is None else [warm_ups(p, min(extra, 0)), warm_ups(p, extra)]
        tight = by_time(p, split=True, spare=1)
        if (extra is None or extra < 0) and fits(p, tight, room):
            warm.append(tight)
        found += [(Policy("zero-bubble"), template(p, room, held, lags)) for held in warm]
    plans = [with_schedule(plan, policy, counts) for policy, counts in dict.fromkeys(found)]
    if greedy:
        found_greedy = (_greedy(plan, p, room, lags, patience) for patience in PATIENCES)
        plans += [chosen for chosen in found_greedy if chosen is not None]
    return plans


def _greedy(
    plan: Plan, p: Pipeline, room: Sequence[int], lags: Sequence[int] | None, patience: float
) -> Plan | None:
    """Greedy orders within the caps, and then within no more than they used; None if they stand still."""
    trailing = [max(cap - 1, 0) if w > 0 else 0 for cap, w in zip(room, p.weight, strict=True)]
    if lags is not None:
        trailing = [min(lag, most) for lag, most in zip(trailing, lags, strict=True)]
    held = tuple(cap * b for cap, b in zip(room, p.micro_batches, strict=True))
    if 0 in held:
        return None
    chosen = with_schedule(plan, Policy("greedy", patience=patience), Counts(held, tuple(trailing)))
    try:
        used = _used(chosen)
    except ScheduleError:
        return None
    return with_schedule(plan, chosen.policy, used)


def _used(plan: Plan) -> Counts:
    """The most that each stage holds in the plan's orders, and holds for the weight half alone."""
    stages = plan.stage_graph.stages
    held, halves = [0] * len(stages), [0] * len(stages)
    most, trailing = [0] * len(stages), [0] * len(stages)
    for task in (task for tasks in round_trips(plan).values() for task in tasks):
        s = task.stage
        held[s] += task.kind is Pass.FORWARD
        most[s] = max(most[s], held[s])
        if task.kind in INPUT_HALF:
            trailing[s] = max(trailing[s], halves[s])
            halves[s] += 1
        if task.kind in WEIGHT_HALF:
            held[s] -= 1
            halves[s] -= 1
    return Counts(
        tuple(count * stage.micro_batch for count, stage in zip(most, stages, strict=True)),
        tuple(
            min(max(lag, 1), stage.weight_lag, count - 1)  # 0 would join the halves
            for lag, count, stage in zip(trailing, most, stages, strict=True)
        ),
    )
