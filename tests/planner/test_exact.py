import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline, all_reduce_seconds
from gpp.plan import PlanError, device_memory
from gpp.planner.downsets import downsets
from gpp.planner.estimate import Group, Problem, assemble
from gpp.planner.exact import downset_groups, downset_optimum, fastest, memory_rule, unit_costs
from gpp.planner.options import Options
from gpp.planner.piper import plan
from gpp.topology import Link
from tests.graphs import graphs, make_cluster, make_graph, towers
from tests.planner.brute import Stages, pipelines


def own_stage(
    problem: Problem, size: int, stage: frozenset[int], later: frozenset[int], d: int, lower: bool
) -> float:
    """Seconds of a stage under the planner's costs, as `gpp.planner.downset_costs` says them."""
    graph, costs, device = problem.graph, problem.costs, problem.topology.devices[0]
    ops = [graph.operators[i] for i in sorted(stage)]
    if d > 1 and any(op.batch_coupled for op in ops):
        return math.inf
    back = [op for op in ops if op.has_backward or op.backward_input.flops]
    time = sum(costs.forward(op, size / d, device) for op in ops)
    time += sum(costs.backward_input(op, size / d, device) for op in back)
    time += sum(costs.backward_weight(op, size / d, device) for op in back)
    trained = sum(p.bytes for op in ops for p in op.parameters if p.trainable)
    rounds = problem.options.mini_batch // size
    link = problem.topology.inside
    if trained:
        time += (all_reduce_seconds(trained, d, link) + costs.update(trained, device)) / rounds
    if not lower:
        received, sent = crossing(problem, stage, later)
        time += (
            2 * link.latency * ((received > 0) + (sent > 0)) + (received + sent) * size / d / link.bandwidth
        )
    return time


def crossing(problem: Problem, stage: frozenset[int], later: frozenset[int]) -> tuple[float, float]:
    """Bytes of a sample into and out of a stage, there and back."""
    graph = problem.graph
    received = sent = 0.0
    for name, tensor in graph.tensors.items():
        source = graph.producer[name]
        readers = {i for i, op in enumerate(graph.operators) if name in op.inputs}
        size = tensor.bytes * (1 + tensor.needs_grad)
        if source in stage and readers & later:
            sent += size
        if source not in stage | later and readers & stage and not readers & later:
            received += size
    return received, sent


def own_memory(
    problem: Problem, size: int, stage: frozenset[int], later: frozenset[int], place: int, d: int
) -> float:
    """Bytes of a stage with so many stages from it to the end, under 1F1B."""
    rounds = problem.options.mini_batch // size
    ops = [problem.graph.operators[i] for i in sorted(stage)]
    received, sent = crossing(problem, stage, later)
    held, upstream = min(place, rounds), min(place + 1, rounds)
    trained = sum(p.bytes for op in ops for p in op.parameters if p.trainable)
    static = sum(p.bytes for op in ops for p in op.parameters) + sum(op.buffer_bytes for op in ops)
    static += (1 + problem.options.optimizer_factor) * trained
    return static + size / d * ((sum(op.stash for op in ops) + sent) * held + received * upstream)


def own_brute(problem: Problem, size: int, *, lower: bool, memory: float = math.inf) -> float:
    graph, count = problem.graph, len(problem.topology.devices)
    degrees = [d for d in range(1, count + 1) if size % d == 0 and (lower or d & (d - 1) == 0)]

    def best(stages: Stages, later: frozenset[int], devices: int, place: int) -> float:
        if not stages:
            return 0.0
        return min(
            (
                max(
                    own_stage(problem, size, stages[0], later, d, lower),
                    best(stages[1:], later | stages[0], devices - d, place + 1),
                )
                for d in degrees
                if d <= devices and own_memory(problem, size, stages[0], later, place, d) <= memory
            ),
            default=math.inf,
        )

    everything = frozenset(range(len(graph.operators)))
    return min(best(found, frozenset(), count, 1) for found in pipelines(graph.successors, everything))


@settings(max_examples=40, deadline=None)
@given(
    graphs(max_operators=5, ties=False),
    st.integers(1, 4),
    st.sampled_from([1, 4, 6]),
    st.sampled_from([1e7, 1e11]),
)
def test_the_least_bottleneck_under_the_planners_own_costs(graph, devices, size, bandwidth) -> None:
    cluster = make_cluster(devices, inside=Link(1e-6, bandwidth))
    problem = Problem(graph, cluster, Roofline(), Options(mini_batch=12, micro_batch=size))
    lower = own_brute(problem, size, lower=True)
    assert downset_optimum(problem, size) == pytest.approx(lower, rel=1e-6)
    sets = downsets(graph.successors, 1000)
    found = fastest(problem, sets, unit_costs(problem, size), None)
    assert found is not None
    assert found.seconds == pytest.approx(own_brute(problem, size, lower=False), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    graphs(max_operators=5, ties=False),
    st.integers(1, 4),
    st.sampled_from([1, 2, 6]),
    st.floats(0.1, 0.9),
)
def test_memory_counts_the_stages_behind(graph, devices, size, part) -> None:
    problem = Problem(graph, make_cluster(devices), Roofline(), Options(mini_batch=12, micro_batch=size))
    everything = frozenset(range(len(graph.operators)))
    memory = part * own_memory(problem, size, everything, frozenset(), 12, 1)
    rule = memory_rule(problem, size, memory, devices)
    found = fastest(problem, downsets(graph.successors, 1000), unit_costs(problem, size), rule)
    least = own_brute(problem, size, lower=False, memory=memory)
    assert (math.inf if found is None else found.seconds) == pytest.approx(least, rel=1e-6)
    if found is not None:
        # a plan with these stages in a row holds that at least: what is charged too little are skip edges
        groups = [Group(part.units, part.devices) for part in found.parts]
        needs = device_memory(assemble(problem, groups, size, "x", chained=True))
        later: frozenset[int] = frozenset()
        for place, part in enumerate(reversed(found.parts), 1):
            stage = frozenset(part.units)
            charged = own_memory(problem, size, stage, later, place, part.devices)
            assert charged <= needs[sum(p.devices for p in found.parts[:-place])] * (1 + 1e-9)
            later |= stage


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 3), st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2]), st.floats(0.1, 1.0))
def test_equal_branches_collapsed_are_the_same_answer(branches, layers, devices, size, part) -> None:
    graph = make_graph(towers(branches, layers), stash=1e6)
    problem = Problem(graph, make_cluster(devices), Roofline(), Options(mini_batch=8, micro_batch=size))
    everything = frozenset(range(len(graph.operators)))
    rule = memory_rule(
        problem, size, part * own_memory(problem, size, everything, frozenset(), 8, 1), devices
    )
    costs = unit_costs(problem, size)
    sets = downsets(graph.successors, 1000)
    fewer = downsets(graph.successors, 1000, costs.equal_branches)
    assert len(fewer.words) < len(sets.words)
    answers = [fastest(problem, found, costs, rule) for found in (sets, fewer)]
    seconds = [math.inf if found is None else found.seconds for found in answers]
    assert seconds[1] == pytest.approx(seconds[0], rel=1e-9)


def test_stages_may_span_branches() -> None:
    """Three towers on two devices: half a tower each way, which no tree of whole branches gives."""
    graph = make_graph(towers(3, 2), parameters=0, stash=0)
    problem = Problem(graph, make_cluster(2), Roofline(), Options(mini_batch=8, max_replicas=1))
    groups = downset_groups(problem, 1)
    assert groups is not None
    assert sorted(len(group.operators) for group in groups) == [3, 4]


def test_groups_hold_what_their_own_graph_holds() -> None:
    """Three chains side by side hold a third of what they hold in a row: they fit where no row does."""
    parents = {f"{c}{i}": f"{c}{i - 1}" if i else "" for c in "abc" for i in range(4)}
    graph = make_graph(parents, parameters=4, stash=1e6, width=1)
    options = Options(mini_batch=16, micro_batch=1, max_replicas=1)
    cluster = make_cluster(6, memory=4.2e6)
    groups = downset_groups(Problem(graph, cluster, Roofline(), options), 1)
    assert groups is not None
    assert sorted(group.operators for group in groups) == [(i, i + 1) for i in range(0, 12, 2)]
    with pytest.raises(PlanError):
        plan(graph, cluster, Roofline(), options)


def test_too_many_downsets_have_no_answer() -> None:
    problem = Problem(make_graph(towers(12, 4)), make_cluster(8), Roofline(), Options(mini_batch=8))
    assert downset_optimum(problem, 1, limit=1000) is None and downset_groups(problem, 1, limit=1000) is None


def test_the_fullest_device_of_groups_fits() -> None:
    graph = make_graph(towers(3, 3), stash=1e6)
    for memory in (2e7, 3e7, 6e7):
        cluster = make_cluster(4, memory=memory)
        options = Options(mini_batch=16)
        groups = downset_groups(Problem(graph, cluster, Roofline(), options), 2)
        if groups is not None:
            made = assemble(Problem(graph, cluster, Roofline(), options), groups, 2, "x")
            assert max(device_memory(made)) <= memory
