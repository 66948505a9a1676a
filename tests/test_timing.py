import dataclasses
import itertools
import math
import time
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpp import timing
from gpp.plan import Edge, Plan, Policy, Stage, StageGraph, StageSeconds
from gpp.planner.estimate import estimated
from gpp.schedule.inflight import in_flight
from gpp.schedule.lower import lower
from gpp.schedule.task import ScheduleError
from gpp.simulate import simulate
from gpp.timing import step_seconds
from gpp.topology import Link
from tests.strategies import chain, make_plan, plans


@st.composite
def any_plans(draw: st.DrawFn) -> Plan:
    """Like `plans()`, and every other policy, control edges, recomputation, stages that share devices."""
    plan = draw(plans())
    stages, edges = list(plan.stage_graph.stages), list(plan.stage_graph.edges)
    policy = draw(
        st.sampled_from(
            [plan.policy, Policy("zero-bubble"), Policy("greedy"), Policy("greedy", patience=0.5)]
        )
    )
    if draw(st.booleans()):
        pairs = {(e.source, e.target) for e in edges}
        orders = {(u, u + 1) for u in range(len(stages) - 1)} - pairs
        edges += [Edge(u, v, (), 0, 0) for u, v in orders]
        edges.sort(key=lambda e: (e.source, e.target))
    held = in_flight(
        [[e.target for e in edges if e.source == s] for s in range(len(stages))],
        [stage.micro_batch for stage in stages],
        policy,
        plan.mini_batch,
        ks=[stage.k for stage in stages],
    )
    splits = policy.name in ("zero-bubble", "greedy")
    lags = [draw(st.integers(0, 2)) if splits else 0 for _ in stages]
    stages = [
        dataclasses.replace(
            stage,
            in_flight=samples + lag * stage.micro_batch,
            weight_lag=lag,
            recompute=draw(st.booleans()),
            seconds=dataclasses.replace(stage.seconds, recompute=stage.seconds.forward),
        )
        for stage, samples, lag in zip(stages, held, lags, strict=True)
    ]
    if draw(st.booleans()):
        stages = moved(stages, draw(st.integers(0, len(stages) - 1)), draw(st.booleans()))
    graph = StageGraph(tuple(stages), tuple(edges), plan.stage_graph.shared)
    return dataclasses.replace(plan, policy=policy, stage_graph=graph)


def moved(stages: Sequence[Stage], first: int, turned: bool) -> list[Stage]:
    """The stages, some of which move to the devices of the first."""
    home = stages[first].devices
    others = [i for i, s in enumerate(stages) if i != first and len(s.devices) == len(home)][::2]
    there = home[::-1] if turned else home
    return [dataclasses.replace(s, devices=there) if i in others else s for i, s in enumerate(stages)]


@settings(max_examples=150, deadline=None)
@given(any_plans())
def test_the_seconds_of_the_simulation(plan: Plan):
    try:
        expected = simulate(plan).step_seconds
    except ScheduleError:
        assume(False)
    assert math.isclose(step_seconds(plan), expected, rel_tol=1e-9)


@pytest.mark.parametrize("global_norm", [False, True])
@pytest.mark.parametrize("micro_batches", [[6] * 5, [6, 12, 6, 24, 12]])
@pytest.mark.parametrize("replicas", [[1, 2, 3, 6, 2], [6, 3, 6, 3, 6], [3, 3, 3, 3, 3]])
def test_replicas_in_any_ratio_inside_and_between_hosts(replicas, micro_batches, global_norm):
    plan = make_plan(
        [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)],
        micro_batches,
        48,
        replicas=replicas,
        seconds=[StageSeconds(0.9, 1.0, 1.1, update=0.1 * s) for s in range(5)],
        link=Link(0.1, 50.0),
        between=Link(0.3, 20.0),
        per_host=4,
        global_norm=global_norm,
    )
    assert math.isclose(step_seconds(plan), simulate(plan).step_seconds, rel_tol=1e-9)


def test_a_source_without_gradients_waits_for_the_buffers_of_its_receiver():
    seconds = [StageSeconds(0.0, 0.0, 0.0), StageSeconds(0.0, 0.0, 1.0)]
    plan = make_plan(chain(2), [1, 1], 1, seconds=seconds, frozen=[0], link=Link(0.0, 1.0))
    # its only buffer is in use until the backward has ended; only then the next 8 bytes come
    assert step_seconds(plan) == simulate(plan).step_seconds == 8.0 + 1.0
    schedule = lower(plan)
    channels = tuple(dataclasses.replace(c, slots=2) for c in schedule.channels)
    assert simulate(plan, dataclasses.replace(schedule, channels=channels)).step_seconds == 8.0


def test_two_steps_stand_for_the_third_only_if_they_do(monkeypatch):
    even = make_plan(chain(2), [1, 1], 4)
    free = [StageSeconds(0.0, 0.0, 0.0)] * 3
    # nothing but messages: the third step waits for buffers that the second still finds free
    uneven = make_plan(
        [(0, 1), (0, 2), (1, 2)], [1] * 3, 1, seconds=free, frozen=[0, 1, 2], link=Link(0.0, 1.0)
    )
    runs: list[object] = []
    run = timing.run

    def counted(actors):
        runs.append(actors)
        run(actors)

    monkeypatch.setattr(timing, "run", counted)
    assert step_seconds(even) == simulate(even).step_seconds
    assert len(runs) == 2
    assert step_seconds(uneven) == simulate(uneven).step_seconds
    assert len(runs) == 2 + 3
    assert simulate(uneven, steps=2).step_seconds != simulate(uneven).step_seconds


def test_the_estimate_of_a_plan_is_the_simulators_answer():
    seconds = [StageSeconds(1.0 + s / 8, 1.0, 1.5, update=0.5) for s in range(4)]
    plan = make_plan(chain(4), [4] * 4, 32, replicas=[1, 2, 4, 1], seconds=seconds, link=Link(0.25, 64.0))
    assert estimated(plan).estimate == pytest.approx(simulate(plan).step_seconds, rel=1e-12)


def test_a_deadlock_is_an_error():
    plan = make_plan([(0, 1), (0, 2), (1, 2)], [2, 4, 4], 8)
    first, *others = plan.stage_graph.stages
    for held, message in ((2, "deadlock"), (1, "nothing could ever run")):
        stages = (dataclasses.replace(first, in_flight=held), *others)
        starved = dataclasses.replace(plan, stage_graph=dataclasses.replace(plan.stage_graph, stages=stages))
        for judge in (step_seconds, simulate):
            with pytest.raises(ScheduleError, match=message):
                judge(starved)


def test_large_plans_in_time():
    seconds = itertools.cycle(
        [StageSeconds(1.0, 1.1, 0.9, update=0.1), StageSeconds(1.1, 0.9, 1.2, update=0.2)]
    )
    links = {"link": Link(0.01, 1e3), "between": Link(0.05, 2e2), "per_host": 8}
    limits = {}  # generous: a busy machine takes several times what a quiet one does
    for stages, replicas, count, limit in ((32, 1, 64, 0.1), (29, 1, 1024, 1.5), (64, 16, 64, 0.5)):
        times = list(itertools.islice(seconds, stages))
        plan = make_plan(
            chain(stages),
            [replicas] * stages,
            replicas * count,
            replicas=[replicas] * stages,
            seconds=times,
            **links,
        )
        start = time.process_time()
        step_seconds(plan)
        limits[stages, count] = (time.process_time() - start, limit)
    assert all(took < limit for took, limit in limits.values()), limits
