import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import CostTable, Roofline, Timing
from gpp.graph import ComputationGraph
from gpp.plan import Policy, check_plan
from gpp.planner.configured import Configuration, configurations, configured
from gpp.planner.estimate import Group, Problem, assemble
from gpp.planner.graphpipe import plan
from gpp.planner.intervals import Intervals
from gpp.planner.options import Options
from gpp.planner.space import Space
from gpp.schedule.check import check
from gpp.schedule.inflight import in_flight
from gpp.schedule.lower import lower
from tests.graphs import chain, graphs, make_cluster, make_graph, series_parallel_parents, towers
from tests.planner.brute import Interval, partitions


def figure_5(*, faster: bool) -> tuple[ComputationGraph, CostTable]:
    """Three operators which like micro-batches of 1, 2 and 4 samples."""
    each = ((1e-3, 3e-3, 8e-3), (2e-3, 2e-3, 6e-3), (4e-3, 4e-3, 4e-3))
    if not faster:
        each = ((4e-3, 4e-3, 4e-3),) * 3
    parts = [tuple(t / 3 for t in times) for times in each]
    timings = [Timing(f"o{i}", (1.0, 2.0, 4.0), part, part, part) for i, part in enumerate(parts)]
    return make_graph(chain(3), parameters=4, width=1), CostTable(tuple(timings), update_traffic=0.0)


def test_the_papers_example_of_three_sizes():
    """Figure 5: in flight 4, 8, 10 samples with sizes 4, 2, 1; with one size 4, 8, 12."""
    graph, costs = figure_5(faster=True)
    options = Options(mini_batch=64, stage_micro_batches=True, max_replicas=1)
    found = plan(graph, make_cluster(3), costs, options)
    stages = found.stage_graph.stages
    assert [(s.micro_batch, s.in_flight) for s in stages] == [(1, 10), (2, 8), (4, 4)]
    check_plan(found, graph)
    check(found, lower(found))
    uniform = plan(graph, make_cluster(3), costs, Options(mini_batch=64, max_replicas=1))
    assert found.estimate < uniform.estimate * 0.75
    graph, costs = figure_5(faster=False)
    same = plan(graph, make_cluster(3), costs, Options(mini_batch=64, micro_batch=4, max_replicas=1))
    assert [(s.micro_batch, s.in_flight) for s in same.stage_graph.stages] == [(4, 12), (4, 8), (4, 4)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2])), min_size=1, max_size=5))
def test_what_may_stand_before_what_is_the_schedules_rule(stages):
    """On a chain the least that is allowed, stage by stage, is what `in_flight` gives."""
    held: list[Configuration] = []
    after = Configuration(0, 0, 0)
    for size, k in reversed(stages):
        choices = (Configuration(i, size, k) for i in range(k * size, 10**4, size))
        after = next(c for c in choices if c.before(after))
        held.insert(0, after)
    count = len(stages)
    successors = [[s + 1] if s + 1 < count else [] for s in range(count)]
    sizes, ks = zip(*stages, strict=True)
    expected = in_flight(successors, sizes, Policy(), 8 * 10**6, ks=ks)
    assert tuple(c.in_flight for c in held) == expected


def test_all_configurations():
    found = configurations((1, 2), (1, 2), 4)
    assert found[0] == Configuration(0, 0, 0)
    triples = {(c.in_flight, c.micro_batch, c.k) for c in found[1:]}
    assert triples == {(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1), (2, 1, 2), (3, 1, 2), (4, 1, 2),
                       (2, 2, 1), (4, 2, 1), (4, 2, 2)}  # fmt: skip


def tower_stages(branches: int, layers: int) -> Iterator[tuple[tuple[Interval, ...], list[list[int]]]]:
    """The space over `towers`, and which stages wait for which: by the operators' own edges."""
    ends, count = range(0, branches * layers + 1, layers), branches * layers + 1
    for stages in partitions(count):
        fine = [a // layers == (b - 1) // layers if b < count else a == 0 or a >= ends[-2] for a, b in stages]
        whole = [a in ends and b in ends for a, b in stages]
        if all(one or other for one, other in zip(fine, whole, strict=True)):
            after = [count - 1 if (i + 1) % layers == 0 else i + 1 for i in range(count - 1)]
            owner = [next(s for s, (a, b) in enumerate(stages) if a <= i < b) for i in range(count)]
            pairs = {(owner[i], owner[j]) for i, j in enumerate(after) if owner[i] != owner[j]}
            yield stages, [sorted(y for x, y in pairs if x == s) for s in range(len(stages))]


def chain_stages(count: int) -> Iterator[tuple[tuple[Interval, ...], list[list[int]]]]:
    for stages in partitions(count):
        yield stages, [[s + 1] for s in range(len(stages) - 1)] + [[]]


def enumerated(
    space: Space,
    spaces: Iterator[tuple[tuple[Interval, ...], list[list[int]]]],
    sizes: tuple[int, ...],
    memory: float,
) -> float:
    """Over all stages, configurations (in flight what the rule asks) and replicas."""
    options, best = space.problem.options, float("inf")
    tables = {size: space.table(size) for size in sizes}
    for stages, successors in spaces:
        if len(stages) > space.devices:
            continue
        for chosen in itertools.product(itertools.product(sizes, options.bursts), repeat=len(stages)):
            bs, ks = zip(*chosen, strict=True)
            held = in_flight(successors, bs, Policy(), 4 * 10**6, ks=ks)
            if max(held) > options.mini_batch:
                continue
            parts = [
                least_seconds(tables[b], Configuration(i, b, k), a, z, memory)
                for i, b, k, (a, z) in zip(held, bs, ks, stages, strict=True)
            ]
            for picks in itertools.product(*(part.items() for part in parts)):
                if sum(d for d, _ in picks) <= space.devices:
                    best = min(best, max(t for _, t in picks))
    return best


def least_seconds(table: Intervals, choice: Configuration, a: int, b: int, memory: float) -> dict[int, float]:
    """Seconds of a sample by replicas, where they fit."""
    own = choice.in_flight / choice.micro_batch
    return {
        d: float(seconds[a, b]) / choice.micro_batch
        for d, seconds in table.seconds.items()
        if np.isfinite(seconds[a, b]) and table.memory(d, own, own + 1)[a, b] <= memory
    }


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["chain", "towers"]),
    st.integers(1, 4),
    st.floats(0.1, 2.0),
    st.sampled_from([(1,), (2,), (1, 2)]),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), min_size=5, max_size=5),
)
def test_the_least_of_the_enumerated_space(form, devices, part, bursts, costs):
    parents = chain(4) if form == "chain" else towers(2, 2)
    flops = {name: 1e8 * f for name, (f, _) in zip(parents, costs, strict=False)}
    stash = {name: 1e5 * s for name, (_, s) in zip(parents, costs, strict=False)}
    graph = make_graph(parents, flops=flops, stash=stash, parameters=1 << 16)
    options = Options(mini_batch=16, stage_micro_batches=True, bursts=bursts)
    space = Problem(graph, make_cluster(devices), Roofline(), options).space
    sizes = (2, 4)
    memory = part * float(space.table(2).memory(1, 2, 3)[0, -1])
    spaces = chain_stages(4) if form == "chain" else tower_stages(2, 2)
    best = enumerated(space, spaces, sizes, memory)
    found = configured(space, sizes, memory)
    if found is None:
        assert best == float("inf")
        return
    seconds, groups = found
    assert np.isclose(seconds, best, rtol=1e-8, atol=0)
    check_groups(space, groups, seconds)


def check_groups(space: Space, groups: list[Group], seconds: float) -> None:
    """They partition the operators, fit the devices, and the slowest takes what was promised."""
    operators = sorted(i for group in groups for i in group.operators)
    assert operators == list(range(len(space.problem.graph.operators)))
    assert sum(group.devices for group in groups) <= space.devices
    place = {operator: at for at, operator in enumerate(space.outline.order)}
    times = []
    for group in groups:
        at = sorted(place[i] for i in group.operators)
        assert at == list(range(at[0], at[-1] + 1))
        time = space.table(group.micro_batch).seconds[group.devices][at[0], at[-1] + 1]
        times.append(time / group.micro_batch)
    assert np.isclose(max(times), seconds, rtol=1e-8, atol=0)
    assemble(space.problem, groups, groups[0].micro_batch, "test")


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(graphs(max_operators=8), graphs(parents=lambda: series_parallel_parents(depth=3))),
    st.integers(1, 5),
    st.sampled_from([(1,), (1, 2)]),
)
def test_any_graph(graph, devices, bursts):
    options = Options(mini_batch=8, stage_micro_batches=True, bursts=bursts)
    space = Problem(graph, make_cluster(devices), Roofline(), options).space
    found = configured(space, (1, 2, 4), 1e12)
    assert found is not None  # everything in one stage
    check_groups(space, found[1], found[0])
    chosen = plan(graph, space.problem.topology, Roofline(), options)
    check_plan(chosen, graph)
    check(chosen, lower(chosen))


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4)])
def test_a_join_is_with_the_end_of_a_branch(sizes):
    graph = make_graph(towers(2, 3), flops={n: 1e9 for n in towers(2, 3) if n != "join"}, parameters=4)
    options = Options(mini_batch=16, stage_micro_batches=True, max_replicas=1)
    space = Problem(graph, make_cluster(2), Roofline(), options).space
    found = configured(space, sizes, 1e12)
    assert found is not None
    assert len(found[1]) == 2
    assert found[0] == pytest.approx(8e9 / 1e13, rel=0.1)  # the first has no input half
