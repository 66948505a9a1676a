from dataclasses import replace

import pytest

from gpp.cost import Roofline
from gpp.graph import ComputationGraph
from gpp.planner.draft import Drafts, Part
from gpp.planner.estimate import Problem
from gpp.planner.options import Options
from gpp.planner.places import matters, placed
from gpp.planner.polish import Shape, shaped
from gpp.planner.rhythm import Kind
from gpp.topology import DeviceTopology, Link
from tests.graphs import chain, make_cluster, make_graph

TWO_CHAINS = {"a0": "", "b0": "", "a1": "a0", "b1": "b0"}
FAR = Link(1e-3, 1e7)


def started(graph: ComputationGraph, cluster: DeviceTopology) -> tuple[Drafts, Shape]:
    """Every operator on a device of its own, in the order of the graph."""
    options = Options(mini_batch=16, micro_batch=2)
    drafts = Drafts(Problem(graph, cluster, Roofline(), options), 2)
    parts = tuple(Part(frozenset([u]), 1) for u in range(len(graph.operators)))
    found = shaped(drafts, parts, Kind())
    assert found is not None
    return drafts, found


def test_heavy_edges_come_inside_a_host():
    graph = make_graph(TWO_CHAINS, flops=1e10, width=1 << 16)
    cluster = make_cluster(4, per_host=2, between=FAR)
    drafts, start = started(graph, cluster)
    better = placed(drafts, start, Kind(), 20)
    hosts = {
        min(p.units): cluster.host(d[0]) for p, d in zip(better.draft.parts, better.draft.places, strict=True)
    }
    assert hosts[0] == hosts[2] != hosts[1] == hosts[3]
    near = started(graph, make_cluster(4, per_host=4))[1]
    assert better.seconds == pytest.approx(near.seconds, rel=1e-9)
    assert better.seconds < 0.5 * start.seconds


def test_the_heaviest_stage_gets_the_fastest_device():
    cluster = make_cluster(3)
    fast = replace(cluster.devices[0], name="fast", flops=8 * cluster.devices[0].flops)
    cluster = replace(cluster, devices=(*cluster.devices[:2], fast))
    flops = {"o0": 8e10, "o1": 1e10, "o2": 1e10}
    drafts, start = started(make_graph(chain(3), flops=flops), cluster)
    better = placed(drafts, start, Kind(), 20)
    heavy = next(i for i, part in enumerate(better.draft.parts) if 0 in part.units)
    assert better.draft.places[heavy] == (2,)
    assert better.seconds < 0.3 * start.seconds


def test_no_tries_change_nothing():
    drafts, start = started(make_graph(TWO_CHAINS, width=1 << 16), make_cluster(4, per_host=2, between=FAR))
    assert placed(drafts, start, Kind(), 0) is start


def test_equal_devices_of_one_host_need_no_choice():
    graph = make_graph(TWO_CHAINS)
    assert not matters(started(graph, make_cluster(4))[0])
    assert matters(started(graph, make_cluster(4, per_host=2))[0])
