"""How many samples each stage holds and how far its weight halves trail: closed forms that need no search.

Counts are in micro-batches of the stage they belong to ("caps": the most that fit its memory), results in
samples as `Stage` has them. Warm-ups fall along every edge by at least what the stage below needs
(`gpp.schedule.inflight`); they are scaled to the memory at hand and never clipped, for a pipeline with
clipped warm-ups is emptied again and again.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpp.plan import Plan, Policy
from gpp.schedule.hops import hop_seconds
from gpp.schedule.inflight import in_flight, lead

Path = tuple[int, float]  # the stage at the other end of an edge, and seconds on the way


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What the choice depends on: edges with seconds of a micro-batch on the way, and seconds of the passes.

    `below[s]` and `above[s]` are the stages after and before s, with the way to them. A stage without a
    backward takes no time for it.
    """

    below: tuple[tuple[Path, ...], ...]
    above: tuple[tuple[Path, ...], ...]
    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    micro_batches: tuple[int, ...]
    ks: tuple[int, ...]
    devices: tuple[int, ...]  # one of each stage's: stages on the same ones share them
    frozen: frozenset[int]  # stages without a backward
    silent: frozenset[tuple[int, int]]  # edges along which no gradient returns
    mini_batch: int

    @property
    def uniform(self) -> bool:
        """Whether all stages have one micro-batch size and k = 1."""
        return len(set(self.micro_batches)) == 1 and set(self.ks) == {1}

    @property
    def rounds(self) -> tuple[int, ...]:
        """Micro-batches of each stage in a step."""
        return tuple(self.mini_batch // b for b in self.micro_batches)


@dataclass(frozen=True, slots=True)
class Counts:
    """Samples that each stage has in flight, and its lag in micro-batches."""

    in_flight: tuple[int, ...]
    weight_lag: tuple[int, ...]


def pipeline(plan: Plan) -> Pipeline:
    """The plan's own; a stage that recomputes does so in its input half."""
    graph = plan.stage_graph
    below: list[list[Path]] = [[] for _ in graph.stages]
    above: list[list[Path]] = [[] for _ in graph.stages]
    for edge in graph.edges:
        there, back = hop_seconds(plan, edge)
        below[edge.source].append((edge.target, there))
        above[edge.target].append((edge.source, back))
    real = [stage.has_backward for stage in graph.stages]
    return Pipeline(
        below=tuple(map(tuple, below)),
        above=tuple(map(tuple, above)),
        forward=tuple(s.seconds.forward for s in graph.stages),
        input=tuple(
            (s.seconds.backward_input + (s.seconds.recompute if s.recompute else 0.0)) * r
            for s, r in zip(graph.stages, real, strict=True)
        ),
        weight=tuple(s.seconds.backward_weight * r for s, r in zip(graph.stages, real, strict=True)),
        micro_batches=tuple(s.micro_batch for s in graph.stages),
        ks=tuple(s.k for s in graph.stages),
        devices=tuple(min(s.devices) for s in graph.stages),
        frozen=frozenset(s for s, trains in enumerate(real) if not trains),
        silent=frozenset(
            (e.source, e.target)
            for e in graph.edges
            if not (e.needs_grad and real[e.source] and real[e.target])
        ),
        mini_batch=plan.mini_batch,
    )


def warm_ups(p: Pipeline, extra: int = 0) -> tuple[int, ...]:
    """Samples in flight of 1F1B (i micro-batches), scaled: i + floor(extra (i - 1) / (D - 1)).

    `extra` are micro-batches more (or, below 0, less) at the stage that has the most, D. No fewer than one,
    no more than the mini-batch. Where micro-batches differ there is no scaling below 1F1B: static orders
    deadlock there.
    """
    after = [[t for t, _ in below] for below in p.below]
    least = in_flight(after, p.micro_batches, Policy(), p.mini_batch, ks=p.ks)
    if extra == 0 or (extra < 0 and not p.uniform):
        return least
    deepest = max(range(len(least)), key=lambda s: least[s])
    low, high = min(least), least[deepest]
    held = list(least)
    for u in reversed(range(len(least))):
        b = p.micro_batches[u]
        more = extra * p.micro_batches[deepest] * (least[u] - low) // max(high - low, 1) // b * b
        wanted = [least[u] + more, b]
        if extra > 0:
            wanted += [held[d] + lead(b, p.ks[u], p.micro_batches[d], p.ks[d]) for d in after[u]]
        held[u] = min(-(-max(wanted) // b) * b, p.mini_batch)
    return tuple(held)


def most_extra(p: Pipeline, caps: Sequence[int]) -> int | None:
    """The largest `extra` of `warm_ups` that fits the caps; None if not even the smallest does."""
    most = max(p.rounds)
    range_of = range(-most if p.uniform else 0, most + 1)
    first = bisect_left(range_of, True, key=lambda extra: not fits(p, warm_ups(p, extra), caps))
    return range_of[first - 1] if first else None


def fits(p: Pipeline, held: Sequence[int], caps: Sequence[int]) -> bool:
    """Whether so many samples are within the caps (in micro-batches)."""
    return all(h <= cap * b for h, cap, b in zip(held, caps, p.micro_batches, strict=True))


def by_time(p: Pipeline, *, split: bool = False, spare: int = 0) -> tuple[int, ...]:
    """Samples in flight that keep the pipeline's period P, often fewer than 1F1B's on light branches:
    min(i, ceil((loop + B) / P) + spare) micro-batches, where loop is the time from a forward until its
    gradient comes back in an empty pipeline. `split`: gradients leave after the input half.

    Only the bottleneck's period counts, so light stages need not be as many micro-batches ahead as they are
    stages away from a sink; but one more than the stage below, unless that has the time to wait until its
    gradient has become the next forward. Where micro-batches differ 1F1B's own numbers are returned: below
    them static orders can deadlock.
    """
    least = warm_ups(p)
    if not p.uniform:
        return least
    work = _work(p)
    period = max(work.values())
    if period == 0:
        return least
    b = p.micro_batches[0]
    loops = _loops(p, split=split)
    held = [b] * len(least)
    for u in reversed(range(len(least))):
        turn = loops[u] + p.input[u] + p.weight[u]
        count = max(math.ceil(turn / period - 1e-9) + spare, 1)
        own = p.forward[u] + p.input[u] + p.weight[u]
        below = []
        for d, there in p.below[u]:
            turn = there + own + next(seconds for s, seconds in p.above[d] if s == u)
            spare_time = period - work[p.devices[d]]
            below.append(held[d] + (b if turn > spare_time * (1 + 1e-9) else 0))
        held[u] = min(max([count * b, *below]), least[u])
    return tuple(held)


def template(
    p: Pipeline, caps: Sequence[int], warm: Sequence[int], lags: Sequence[int] | None = None
) -> Counts:
    """Zero-bubble with these warm-ups (samples): what is left of each cap lets weight halves trail.

    Sources too: sinks return the first gradients faster than the period, and a source that does all of its
    backward at once then keeps them waiting for forwards. `lags` bounds the lags further, where a pending
    weight half costs more than a micro-batch in flight.
    """
    held, trailing = [], []
    for s, (b, w) in enumerate(zip(p.micro_batches, warm, strict=True)):
        lag = min(caps[s], p.rounds[s]) - w // b if p.weight[s] > 0 else 0
        trailing.append(max(lag if lags is None else min(lag, lags[s]), 0))
        held.append(w + trailing[-1] * b)
    return Counts(tuple(held), tuple(trailing))


def with_schedule(plan: Plan, policy: Policy, counts: Counts) -> Plan:
    """The plan with this schedule; estimate and bounds are the caller's to renew."""
    stages = tuple(
        replace(stage, in_flight=held, weight_lag=lag)
        for stage, held, lag in zip(plan.stage_graph.stages, counts.in_flight, counts.weight_lag, strict=True)
    )
    return replace(plan, stage_graph=replace(plan.stage_graph, stages=stages), policy=policy)


def _work(p: Pipeline) -> dict[int, float]:
    """Seconds of work per micro-batch on each set of devices."""
    work: dict[int, float] = {}
    for s, device in enumerate(p.devices):
        work[device] = work.get(device, 0.0) + p.forward[s] + p.input[s] + p.weight[s]
    return work


def _loops(p: Pipeline, *, split: bool) -> list[float]:
    """Seconds from the start of each stage's forward until its gradient is back, if nobody has to wait."""
    loops = [0.0] * len(p.below)
    for u in reversed(range(len(loops))):
        ways = []
        for d, there in p.below[u]:
            back = next(seconds for s, seconds in p.above[d] if s == u)
            ways.append(there + loops[d] + p.input[d] + (0.0 if split else p.weight[d]) + back)
        loops[u] = p.forward[u] + max(ways, default=0.0)
    return loops
