import pytest

from gpp.cost import Roofline
from gpp.plan import PlanError
from gpp.planner import gpp, graphpipe, pipedream, piper, sequential
from gpp.planner.options import Options
from tests.graphs import chain, make_cluster, make_graph

PLANNERS = (graphpipe, pipedream, sequential, piper, gpp)


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: planner.NAME)
def test_an_operator_that_fits_no_device_is_named(planner):
    graph = make_graph(chain(4), parameters={"o0": 8, "o2": 8 << 20})
    with pytest.raises(PlanError, match=r"operator o2 by itself needs about .* MiB .* has 16.0 MiB"):
        planner.plan(graph, make_cluster(4, memory=16 << 20), Roofline(), Options(mini_batch=8))


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: planner.NAME)
def test_else_what_the_whole_needs(planner):
    graph = make_graph(chain(4), parameters=3 << 20)
    with pytest.raises(PlanError, match="fit"):
        planner.plan(graph, make_cluster(2, memory=16 << 20), Roofline(), Options(mini_batch=8))


def test_what_was_tried_besides_is_said():
    graph = make_graph(chain(4), parameters=3 << 20)
    options = Options(mini_batch=8, recompute=True, shard_optimizer=True)
    with pytest.raises(PlanError, match=r"nor does it with planner.recompute and planner.shard_optimizer"):
        gpp.plan(graph, make_cluster(2, memory=16 << 20), Roofline(), options)
