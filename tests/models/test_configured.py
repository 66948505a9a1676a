"""The groups of conf/model: each composes with data of its own, and its full size captures on meta."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from gpp.capture.capture import Captured, capture
from gpp.capture.weights import build_recorded
from gpp.graph import ComputationGraph
from gpp.planner.series_parallel import Parallel, Series, decompose
from launch.objects import chosen, data_object, dataset, model_builder
from launch.start import CONF
from tests.thorough import thorough


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def captured(*overrides: str) -> Captured:
    config = configured(*overrides)
    model = build_recorded(model_builder(chosen(config, "model", overrides)), 0).model
    arguments = chosen(config, "data", overrides)
    data = dataset(data_object(arguments), arguments, model)
    batch = {key: value.to("meta") for key, value in data.read(range(4), data.keys).items()}
    return capture(model, batch)


def parameters(graph: ComputationGraph) -> int:
    return sum({p.name: p.bytes for op in graph.operators for p in op.parameters}.values()) // 4


@pytest.mark.parametrize(
    "model, operators, millions, sources",
    [
        ("dlrm", 40, 1269.2, 14),
        ("candle_uno", 33, 584.0, 7),
        ("case_study", 41, 100.8, 2),
        pytest.param("mmt_paper", 169, 409.4, 4, marks=thorough),
    ],
)
def test_the_papers_models_at_full_size(model: str, operators: int, millions: float, sources: int) -> None:
    graph = captured(f"model={model}").graph
    assert len(graph.operators) == operators
    assert parameters(graph) / 1e6 == pytest.approx(millions, abs=0.1)
    assert sum(not before for before in graph.predecessors) == sources
    assert not any(op.batch_coupled for op in graph.operators)
    tree = decompose(graph)
    assert isinstance(tree, Series) and isinstance(tree.children[0], Parallel)
    assert len(tree.children[0].children) == sources


def test_data_follow_the_model_unless_named() -> None:
    target = "gpp.runtime.synthetic.clicks"
    assert configured("model=dlrm").data._target_ == target
    assert configured("data=clicks", "model=dlrm").data._target_ == target
    assert configured("model=dlrm", "data=stdlib").data._target_.endswith("StdlibFunctions")
    assert configured().data._target_.endswith("StdlibFunctions")
    files = configured("model=dlrm_criteo", "data.files=[day_0]").data
    assert files._target_ == "gpp.runtime.criteo.Criteo" and files.files == ["day_0"]
    assert files.dense * files.features == 13 and files.tables * files.bag == 26  # what a line has
    small = configured("model=dlrm", "model.rows=9", "model.tables=2").data
    assert (small.rows, small.tables) == (9, 2)


def test_the_number_of_branches_is_configuration() -> None:
    graph = captured("model=candle_uno", "model.branches=16", "model.hidden=64").graph
    assert sum(not before for before in graph.predecessors) == 16


def test_dots_of_pooled_bags_capture() -> None:
    graph = captured("model=dlrm", "model.pooling=mean", "model.interaction=dot", "model.hidden=64").graph
    names = [op.name for op in graph.operators]
    assert "bmm" in names and len(graph.predecessors[names.index("bmm")]) == 14


def test_an_export_on_meta_draws_nothing() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    captured("model=candle_uno", "model.hidden=8")
    assert torch.equal(before, torch.random.get_rng_state())
