"""A proven lower bound on a plan's step time, far cheaper than the time itself: lets a search skip plans.

Between two of its updates a rank runs all of its own passes, and for each stage after it that returns
gradients: a forward on every stage of a way to it, all the work of that stage, an input half on every stage
of the same way back, and the messages in between; then its reductions and its update. Where all ranks meet at
the end of a step, the way to a stage and the way back may be different ones.
"""

import math
from collections import Counter
from dataclasses import dataclass

from gpp.cost import all_reduce_seconds
from gpp.plan import Plan, Stage
from gpp.schedule.lower import returns_gradient
from gpp.topology import Link


@dataclass(frozen=True, slots=True)
class _Work:
    """Seconds of a stage: a forward; an input half; passes that surely come before its last gradient leaves;
    those that surely come after that; all of them."""

    forward: float
    back: float
    until: float
    after: float
    whole: float


@dataclass(frozen=True, slots=True)
class _Hop:
    """The way to a stage from one before it: seconds there and back; whether gradients go back."""

    source: int
    there: float
    back: float
    returns: bool


def least_seconds(plan: Plan) -> float:
    """At most `gpp.timing.step_seconds(plan)`. O(stages + edges + devices); some 5 us for each of them."""
    stages = plan.stage_graph.stages
    homes = [min(stage.devices) for stage in stages]  # stages that share a device share all of them
    held = Counter(homes)
    works = [_work(plan, stage, held[home] == 1) for home, stage in zip(homes, stages, strict=True)]
    busy, closing, update = (dict.fromkeys(homes, 0.0) for _ in range(3))
    trains = set()
    for home, stage, work, reduction in zip(homes, stages, works, _reductions(plan), strict=True):
        busy[home] += work.whole
        closing[home] += reduction
        if stage.trainable_bytes > 0:
            trains.add(home)
            update[home] += stage.seconds.update
    meeting = _meeting_seconds(plan)
    least = max(busy[home] + closing[home] + update[home] for home in trains or busy) + (meeting or 0.0)
    hops = _hops(plan)
    there: list[float] = []  # the longest ways to each stage and back, with what comes before and after
    back: list[float] = []
    for index, (home, work) in enumerate(zip(homes, works, strict=True)):
        returning = [hop for hop in hops[index] if hop.returns]
        end = work.after + closing[home]
        if meeting is None:  # the same way both times: all is in `there`
            ways = [
                there[hop.source] + works[hop.source].forward + works[hop.source].back + hop.there + hop.back
                for hop in returning
            ]
            there.append(max([end + update[home] if home in trains else -math.inf, *ways]))
            back.append(0.0)
        else:
            ways = [there[hop.source] + works[hop.source].forward + hop.there for hop in hops[index]]
            ways_back = [back[hop.source] + works[hop.source].back + hop.back for hop in returning]
            there.append(max([update[home], *ways]))
            back.append(max([end + meeting, *ways_back]))
        least = max(least, there[index] + work.until + back[index])
    return least


def _work(plan: Plan, stage: Stage, alone: bool) -> _Work:
    """Where weight halves trail, at most `weight_lag` of them are left before the last input half; after it
    comes at least one, and so many where the order is static."""
    count = plan.mini_batch // stage.micro_batch
    seconds = stage.seconds
    forward, weight = seconds.forward, seconds.backward_weight
    if not stage.has_backward:
        return _Work(forward, 0.0, count * forward, 0.0, count * forward)
    back = seconds.backward_input + (seconds.recompute if stage.recompute else 0.0)
    whole = count * (forward + back + weight)
    lag = min(stage.weight_lag, count) if plan.policy.name in ("zero-bubble", "greedy") else 0
    if not lag:
        return _Work(forward, back + weight, whole, 0.0, whole)
    before = max(count - 1 - lag, 0)
    after = count - before if alone and plan.policy.name == "zero-bubble" else 1
    return _Work(forward, back, count * (forward + back) + before * weight, after * weight, whole)


def _hops(plan: Plan) -> list[list[_Hop]]:
    """Into each stage."""
    graph, topology = plan.stage_graph, plan.topology
    hosts = [(topology.host(min(s.devices)), topology.host(max(s.devices))) for s in graph.stages]
    hops: list[list[_Hop]] = [[] for _ in graph.stages]
    for edge in graph.edges:
        up, down = graph.stages[edge.source], graph.stages[edge.target]
        a, b = hosts[edge.source], hosts[edge.target]
        returns = returns_gradient(graph, edge)
        if min(up.devices) == min(down.devices):
            hops[edge.target].append(_Hop(edge.source, 0.0, 0.0, returns))
            continue
        one, apart = a == b and a[0] == a[1], a[1] < b[0] or b[1] < a[0]
        links = [topology.inside] * (not apart) + [topology.between] * (not one)
        small, large = sorted((up.micro_batch // len(up.devices), down.micro_batch // len(down.devices)))
        # every piece is in a message that is as large as the smaller piece, or half of it where they straddle
        samples = small if large % small == 0 else -(-small // 2)
        there, back = (min(k.seconds(samples * n) for k in links) for n in (edge.bytes, edge.gradient_bytes))
        hops[edge.target].append(_Hop(edge.source, there, back, returns))
    return hops


def _reductions(plan: Plan) -> list[float]:
    """Of gradients, by stage, over a link that they surely use."""
    graph = plan.stage_graph
    found = []
    tied = [
        item
        for item in graph.shared
        if item.bytes > 0 and all(graph.stages[s].trainable_bytes > 0 for s in item.stages)
    ]
    for index, stage in enumerate(graph.stages):
        untied = stage.trainable_bytes - sum(item.bytes for item in tied if index in item.stages)
        found.append(_ring_seconds(plan, set(stage.devices), untied) if untied > 0 else 0.0)
    for item in tied:
        devices = {d for s in item.stages for d in graph.stages[s].devices}
        seconds = _ring_seconds(plan, devices, item.bytes)
        # a rank with several of these stages takes part once
        for s in {min(graph.stages[s].devices): s for s in item.stages}.values():
            found[s] += seconds
    return found


def _ring_seconds(plan: Plan, devices: set[int], size: int) -> float:
    return all_reduce_seconds(size, len(devices), _slowest(plan, devices))


def _slowest(plan: Plan, devices: set[int]) -> Link:
    """A link that a group surely has to use."""
    topology = plan.topology
    return topology.inside if topology.host(min(devices)) == topology.host(max(devices)) else topology.between


def _meeting_seconds(plan: Plan) -> float | None:
    """Of the reductions of scalars, in which all ranks take part; None if there are none."""
    scalars = plan.loss_weighted + plan.global_norm
    devices = {d for stage in plan.stage_graph.stages for d in stage.devices} if scalars else set()
    if len(devices) < 2:
        return None
    return scalars * 2 * math.ceil(math.log2(len(devices))) * _slowest(plan, devices).latency
