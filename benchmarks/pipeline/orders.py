"""How good the orders are, without hardware: over their lower bound, over 1F1B, and for less memory.

Schedules are those of `gpp.schedule.choices`; step times are the simulator's, of a step that ends for all
stages at once (each stage's own all-reduce and update are left out).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.section import Cell, Section, geometric_mean
from gpp.plan import Plan
from gpp.schedule.choices import candidates
from gpp.schedule.order_bound import order_bound
from gpp.schedule.task import Reduce, Reduction
from gpp.schedule.template import pipeline
from gpp.simulate import reduce_seconds
from gpp.timing import step_seconds

from .stage_graphs import GRAPHS, Edges, fan_in, paced

ROUNDS = (8, 16, 32, 64)
LATENCIES = (0.0, 0.1, 0.25)  # of a hop, in forwards
SPREADS = (0.0, 0.25)
RANDOM = 60  # random graphs, of each size of memory
SHARES: Mapping[float, float] = {1.0: 1.02, 1.5: 1.01}  # of 1F1B's peak, and what the mean may be
LESS = 0.75  # of 1F1B's peak memory
LEAST = 0.7

# branches with their stages' times, and the times of the stages that join them: light ones beside heavy ones
LIGHT: Mapping[str, tuple[tuple[tuple[int, float], ...], int]] = {
    "8 light, 2 heavy + 2": (((8, 0.25), (2, 1.0)), 2),
    "8 light, 8 heavy + 2": (((8, 0.25), (8, 1.0)), 2),
    "4 x 4 light + 4": (((4, 0.25),) * 4, 4),
    "8, 8, 8 half, 8 heavy + 2": (((8, 0.5), (8, 0.5), (8, 0.5), (8, 1.0)), 2),
    "6, 6, 6 light + 6": (((6, 0.3),) * 3, 6),
    "7 light + 4": (((7, 0.2),), 4),
}


def makespan(plan: Plan) -> float:
    """Seconds of a step after which all stages know the norm, which is then taken off."""
    ranks = tuple(plan.residents)
    norm = reduce_seconds(plan, Reduce(Reduction.NORM, ranks, -1, 8)) if len(ranks) > 1 else 0.0
    return step_seconds(replace(plan, global_norm=True)) - norm


def random_graph(draw: random.Random, most: int = 10) -> Edges:
    """A connected directed acyclic graph of 3 to `most` stages, series-parallel or not."""
    count = draw.randint(3, most)
    edges = {(draw.randrange(v), v) for v in range(1, count)}
    for _ in range(draw.randrange(count)):
        u, v = sorted(draw.sample(range(count), 2))
        edges.add((u, v))
    return sorted(edges)


@dataclass(frozen=True)
class Quality:
    """Of the best order with a memory: its time over the bound, and over 1F1B's."""

    bound: float
    plain: float


def quality(plan: Plan, share: float) -> Quality:
    """Every stage may hold `share` of what 1F1B's first stage holds."""
    caps = [int(share * plan.stage_graph.depth)] * len(plan.stage_graph.stages)
    best = min(makespan(found) for found in candidates(plan, caps))
    return Quality(best / order_bound(pipeline(plan), caps), best / makespan(plan))


def named_plans(rounds: Sequence[int] = ROUNDS) -> Iterator[Plan]:
    """Every stage graph with every number of micro-batches, latency and spread."""
    for edges, m, latency, spread in product(GRAPHS.values(), rounds, LATENCIES, SPREADS):
        yield paced(edges, m, latency, spread)


def random_plans(count: int = RANDOM, seed: int = 0) -> Iterator[Plan]:
    """Random graphs with random times, micro-batches and latencies."""
    draw = random.Random(seed)
    for _ in range(count):
        edges = random_graph(draw)
        scales = [draw.uniform(0.75, 1.25) for _ in range(1 + max(v for _, v in edges))]
        yield paced(edges, draw.choice(ROUNDS), draw.choice(LATENCIES), scales=scales)


def order_quality(
    named: Sequence[Plan] | None = None,
    drawn: Sequence[Plan] | None = None,
    shares: Mapping[float, float] = SHARES,
) -> Section:
    """Zero-bubble and greedy orders over the lower bound of any order with the same memory."""
    kinds = {
        "18 stage graphs": list(named_plans()) if named is None else named,
        "random graphs": list(random_plans()) if drawn is None else drawn,
    }
    rows: list[tuple[Cell, ...]] = []
    reached, words = True, []
    for (kind, plans), (share, most) in product(kinds.items(), shares.items()):
        found = [quality(plan, share) for plan in plans]
        bounds, plain = [q.bound for q in found], [q.plain for q in found]
        mean = geometric_mean(bounds)
        reached &= mean <= most and max(plain) <= 1 + 1e-9
        words.append(f"{mean:.4f}")
        rows.append((kind, share, len(found), mean, max(bounds), geometric_mean(plain), max(plain)))
    return Section(
        name="orders",
        what="best order over its lower bound, no hardware, with 1F1B's peak memory and with 1.5 times that",
        reach="geometric mean at most 1.02 / 1.01, and never above 1F1B",
        measured=f"{' / '.join(words)}; at most {max(float(row[6] or 0) for row in rows):.4f} of 1F1B",
        reached=reached,
        columns=(
            *("graphs", "peak over 1F1B's", "cases", "over the bound, mean", "worst"),
            *("over 1F1B, mean", "worst over 1F1B"),
        ),
        rows=tuple(rows),
        note=f"Forward and both halves of a backward take the same time on a stage, {SPREADS[1]:.0%} spread "
        f"over the stages on half of the cases; m = {', '.join(map(str, ROUNDS))}; a hop takes "
        f"{', '.join(map(str, LATENCIES))} forwards. Random graphs have up to 10 stages.",
    )


def less_memory(rounds: Sequence[int] = ROUNDS[1:], graphs: Mapping[str, Edges] = GRAPHS) -> Section:
    """The split spent on memory instead of time: 1F1B's time with three quarters of its peak."""
    rows: list[tuple[Cell, ...]] = []
    held = {edges_name: int(LESS * paced(edges, 1).stage_graph.depth) for edges_name, edges in graphs.items()}
    for m in rounds:
        ratios, bounds = [], []
        for (name, edges), latency, spread in product(graphs.items(), LATENCIES, SPREADS):
            plan = paced(edges, m, latency, spread)
            caps = [held[name]] * len(plan.stage_graph.stages)
            if held[name] < LEAST * plan.stage_graph.depth:
                continue  # of a pipeline 3 or 5 deep, three quarters are less: 2 or 3 micro-batches
            plain = makespan(plan)
            ratios.append(min(makespan(option) for option in candidates(plan, caps)) / plain)
            bounds.append(order_bound(pipeline(plan), caps) / plain)
        rows.append(
            (m, len(ratios), geometric_mean(ratios), geometric_mean(bounds), max(ratios), max(bounds))
        )
    means = [float(row[2] or 0) for row in rows]
    return Section(
        name="memory",
        what=f"the split spent on memory: step time over 1F1B's at {LESS} of its peak, "
        f"m = {', '.join(map(str, rounds))}",
        reach="at most 1",
        measured=" / ".join(f"{mean:.3f}" for mean in means),
        reached=max(means) <= 1,
        columns=(
            "m",
            "cases",
            "over 1F1B's time, mean",
            "no order is below, mean",
            "worst",
            "no order is below",
        ),
        rows=tuple(rows),
        note=f"Stage graphs of which {LEAST:.2f} to {LESS} of the depth is a whole number of micro-batches; "
        "equal "
        "stages and unequal ones, hops of 0, 0.1 and 0.25 forwards; simulated. A chain of D equal stages "
        "needs "
        "(2 D + 1) / 3 micro-batches in flight to keep its pace: 6 of 8, but 4.3 of 6.",
    )


def light_plan(name: str, rounds: int, latency: float) -> Plan:
    """Branches of light stages beside heavy ones."""
    branches, join = LIGHT[name]
    scales = [weight for length, weight in branches for _ in range(length)] + [1.0] * join
    return paced(fan_in([length for length, _ in branches], join), rounds, latency, scales=scales)


def leanest(plan: Plan) -> Plan:
    """1F1B with the least in flight that keeps its time."""
    held = [stage.in_flight for stage in plan.stage_graph.stages]
    options = candidates(plan, held, eager=False, split=False, greedy=False)
    return min(options, key=lambda found: sum(s.in_flight for s in found.stage_graph.stages))


def light_branches(rounds: int = 32, latencies: Sequence[float] = (0.0, 0.25)) -> Section:
    """Light branches run no further ahead than the slowest stage needs."""
    rows: list[tuple[Cell, ...]] = []
    for name, latency in product(LIGHT, latencies):
        plan = light_plan(name, rounds, latency)
        held = [stage.in_flight for stage in plan.stage_graph.stages]
        lean = leanest(plan)
        less = sum(stage.in_flight for stage in lean.stage_graph.stages) / sum(held)
        rows.append((name, latency, sum(held), less, makespan(lean) / makespan(plan)))
    still = [row for row in rows if row[1] == 0.0]
    shares = [float(row[3] or 0) for row in still]
    slower = max(float(row[4] or 0) for row in rows)
    return Section(
        name="light",
        what="light branches delayed: in flight over 1F1B's, summed over the stages, and the time",
        reach="at most 0.8 of the sum at no time",
        measured=f"{geometric_mean(shares):.3f} in the mean ({max(shares):.3f} at most), time {slower:.4f}",
        reached=geometric_mean(shares) <= 0.8 and slower <= 1 + 1e-9,
        columns=("branches (stages) + join", "latency", "1F1B's sum", "share of it", "time over 1F1B's"),
        rows=tuple(rows),
        note=f"m = {rounds}. Light stages take 0.2 to 0.5 of a heavy one's time. Latency in forwards.",
    )
