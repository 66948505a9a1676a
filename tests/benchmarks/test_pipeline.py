"""Sections of benchmarks.pipeline on small inputs: rows that add up, and verdicts that can be no."""

import random

import pytest

from benchmarks.pipeline import jobs
from benchmarks.pipeline.bubbles import pairs, zero_bubble
from benchmarks.pipeline.compute import two_cores
from benchmarks.pipeline.models import emulations, paper_models
from benchmarks.pipeline.orders import (
    LIGHT,
    less_memory,
    light_branches,
    named_plans,
    order_quality,
    random_graph,
    random_plans,
)
from benchmarks.pipeline.overhead import task_overhead
from benchmarks.pipeline.share import Case, share_of_ideal
from benchmarks.pipeline.stage_graphs import GRAPHS, chain, diamond, fan_in, in_a_row, paced
from benchmarks.planner.runs import Runs
from benchmarks.planner.workloads import Workload
from benchmarks.report import text
from benchmarks.section import Section
from gpp.cost import Roofline
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from tests.graphs import make_graph, towers
from tests.mpirun import why_no_mpi
from tests.thorough import thorough

needs_mpi = pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))


def whole(section: Section) -> Section:
    """A section that can be printed."""
    assert section.rows and all(len(row) == len(section.columns) for row in section.rows)
    assert section.name in text(section)
    return section


def test_stage_graphs():
    assert fan_in([2, 1], 2) == [(0, 1), (1, 3), (2, 3), (3, 4)]
    assert diamond([1, 1], 1, skip=True) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert in_a_row(chain(2), chain(3)) == chain(4)
    assert len(GRAPHS) == 18
    for edges in GRAPHS.values():
        plan = paced(edges, 4, spread=0.25)
        check(plan, lower(plan))


def test_random_graphs_are_connected():
    draw = random.Random(1)
    for _ in range(50):
        edges = random_graph(draw)
        assert all(u < v for u, v in edges)
        assert {v for _, v in edges} | {0} == set(range(1 + max(v for _, v in edges)))


def test_order_quality():
    few = list(named_plans((8,)))[:6]
    section = whole(order_quality(few, list(random_plans(4)), {1.0: 1.02}))
    assert section.reached
    assert not order_quality(few, few, {1.0: 0.9}).reached
    for row in section.rows:
        assert float(row[3] or 0) >= 1 - 1e-9 and float(row[6] or 0) <= 1 + 1e-9


def test_memory_instead_of_time():
    section = whole(less_memory((16,), {"chain 8": GRAPHS["chain 8"], "chain 3": chain(3)}))
    ((_, cases, mean, bound, *_),) = section.rows
    assert cases == 6  # of the chain of 8; a chain of 3 has no three quarters
    assert float(bound or 0) <= float(mean or 0) < 1 and section.reached
    assert not less_memory((64,), {"chain 4": chain(4)}).reached


def test_light_branches():
    section = whole(light_branches(16, (0.0,)))
    assert len(section.rows) == len(LIGHT) and section.reached


@needs_mpi
def test_share_of_ideal():
    section = whole(share_of_ideal([Case(2, 4, 2e-3, 1 << 16, 2.0)], 0.1))
    assert section.rows[0][-1] is False and section.reached is False
    assert all(0.1 < float(cell or 0) < 1.2 for row in section.rows for cell in row[5:8])


@thorough
@needs_mpi
def test_zero_bubble_on_a_clock():
    (case,) = pairs(("diamond 2 x 2",), (1,), 5e-3)
    assert case.split.estimate < 0.9 * case.plain.estimate
    section = whole(zero_bubble([case], 3))
    measured = float(section.rows[0][6] or 0)
    assert 0.5 < measured < 1.1


@needs_mpi
def test_models_on_a_clock():
    work = Workload("towers", make_graph(towers(2, 2), flops=1e10), Roofline(), "summit", 2.0)
    given = {"short": paced(chain(3), 4, unit=1.0), "long": paced(chain(2), 4, unit=3.0)}
    plans = emulations(given, 512)
    assert [stage.seconds.forward for stage in plans["short"].stage_graph.stages] == [0.01] * 3
    assert [stage.seconds.forward for stage in plans["long"].stage_graph.stages] == [0.03] * 2
    section = whole(paper_models(Runs(), {"MMT": work}, (2,), steps=3))
    assert section.rows[0][0] == "MMT" and float(section.rows[0][5] or 0) > 0.9


@thorough
@needs_mpi
def test_overhead_and_compute():
    section = whole(task_overhead((2,), 3))
    assert 0 < float(section.rows[0][1] or 0) < 5000
    section = whole(two_cores(64, 16, 2))
    assert [row[0] for row in section.rows] == ["gpp", "gpp in a row", "torch in a row", "independent"]


@needs_mpi
def test_a_job_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"benchmarks.pipeline.chains on 1 ranks ended with 1.*KeyError"):
        jobs.measured("benchmarks.pipeline.chains", 1, {})
