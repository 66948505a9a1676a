from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.planner.colocate import PER_DEVICE, colocated
from gpp.planner.draft import Drafts, Part
from gpp.planner.estimate import Group, Problem, assemble
from gpp.planner.exhaustive import every_partition
from gpp.planner.options import Options
from tests.graphs import chain, graphs, make_cluster, make_graph


def loads(problem: Problem, groups: list[Group]) -> list[float]:
    """Seconds of a step on each device, by the plan itself."""
    plan = assemble(problem, groups, problem.options.micro_batches[0], "x")
    stages = plan.stage_graph.stages
    work = [
        plan.mini_batch // s.micro_batch * (s.seconds.forward + s.seconds.backward) + s.seconds.update
        for s in stages
    ]
    return [sum(work[i] for i in held) for held in plan.residents.values()]


def test_what_no_partition_balances():
    flops = {f"o{i}": weight * 1e10 for i, weight in enumerate((1, 4, 2, 4, 1))}
    graph = make_graph(chain(5), flops=flops, parameters=1 << 10)
    problem = Problem(graph, make_cluster(3), Roofline(), Options(mini_batch=16, micro_batch=2))
    drafts = Drafts(problem, 2)
    draft = drafts.draft([Part(frozenset(units), 1) for units in ([0, 1], [2], [3, 4])])
    assert draft is not None
    found = list(colocated(drafts, draft))
    assert [max(loads(problem, list(f.groups))) / min(loads(problem, list(f.groups))) for f in found][
        -1
    ] < 1.3
    last = {group.operators: group.at for group in found[-1].groups}
    assert last[(0,)] == last[(2,)] or last[(4,)] == last[(2,)]


@settings(max_examples=40, deadline=None)
@given(graphs(max_operators=6, all_train=True), st.data())
def test_plans_that_are_ever_better_balanced(graph, data):
    options = Options(mini_batch=8, micro_batch=2, max_replicas=1)
    problem = Problem(graph, make_cluster(3), Roofline(), options)
    drafts = Drafts(problem, 2)
    parts = data.draw(st.sampled_from(every_partition(drafts)))
    draft = drafts.draft(parts)
    assert draft is not None
    shared = list(colocated(drafts, draft))
    found = [drafts.groups(draft), *(list(each.groups) for each in shared)]
    heaviest = [max(loads(problem, groups)) for groups in found]
    assert heaviest[1:] == pytest.approx([each.load for each in shared])
    assert all(after < before * (1 + 1e-9) for before, after in pairwise(heaviest))
    for groups in found:
        placed = [group.at for group in groups]
        assert all(placed.count(place) <= PER_DEVICE for place in placed)
        assert sorted(i for group in groups for i in group.operators) == list(range(len(graph.operators)))
