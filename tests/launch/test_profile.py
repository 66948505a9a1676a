"""Measured costs as commands see them: files, settings, table; and the numbers of the clusters."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from gpp.cost import CostError, CostTable, Roofline, Timing, costs_from_json, costs_to_json
from gpp.graph import ComputationGraph, Operator, Work
from gpp.topology import DeviceTopology
from launch import settings
from launch.cluster import topology
from launch.problems import SettingsError
from launch.profile import sizes_of
from launch.start import CONF

from .test_settings import configuration

GRAPH = ComputationGraph((Operator("a", "linear", (), (), forward=Work(flops=1.0)),))
TIMING = Timing("a", (1.0, 4.0), (0.1, 0.4), (0.2, 0.8), (0.3, 1.2))


def table(**changes: Any) -> CostTable:
    return CostTable(**({"timings": (TIMING,), "graph": GRAPH.fingerprint(), "measured_on": "it"} | changes))


def test_costs_survive_their_file() -> None:
    assert costs_from_json(costs_to_json(table())) == table()
    broken = costs_to_json(table())
    for wrong, message in (
        (broken.replace("gpp.costs/1", "gpp.graph/1"), '"format" must be "gpp.costs/1"'),
        (broken.replace("0.4", "-0.4"), "timing of a: a time must be finite and not negative"),
        (broken.replace('"measured_on"', '"measured_in"'), "no key 'measured_in'"),
        (broken[:-9], "malformed JSON"),
    ):
        with pytest.raises(CostError, match=message):
            costs_from_json(wrong)


def test_profiled_costs_are_those_of_the_file_for_its_graph(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(costs_to_json(table()))
    config = configuration(cost__path=str(file), cost__update_traffic=5.0)
    settings.check_keys(config)
    found = settings.costs(config, GRAPH)
    assert isinstance(found, CostTable) and found.timings == (TIMING,) and found.update_traffic == 5.0
    other = ComputationGraph((Operator("a", "linear", (), (), forward=Work(flops=2.0)),))
    with pytest.raises(CostError, match=r"costs\.json: the costs were measured for another model"):
        settings.costs(config, other)
    with pytest.raises(SettingsError, match="there is no costs file nix"):
        settings.costs(configuration(cost__path="nix"), GRAPH)
    assert settings.costs(configuration(), GRAPH) == Roofline(7.0)


def test_profiled_costs_need_a_path() -> None:
    config = configuration()
    config.cost = OmegaConf.load(CONF / "cost/profiled.yaml")
    for graph in (None, GRAPH):
        with pytest.raises(SettingsError, match=r"cost=profiled needs cost\.path"):
            settings.costs(config, graph)


@pytest.mark.parametrize(
    "sizes, train, expected",
    [
        ("auto", {"mini_batch": 128}, (1, 2, 16, 128)),
        ("auto", {"mini_batch": 128, "micro_batch": 4}, (1, 4)),
        ("auto", {"mini_batch": 1}, (1,)),
        ([8, 1, 8], {}, (1, 8)),
    ],
)
def test_sizes(sizes: Any, train: dict[str, int], expected: tuple[int, ...]) -> None:
    changes = {f"train__{key}": value for key, value in train.items()}
    config = configuration(measure={"sizes": sizes}, **changes)
    assert sizes_of(config, settings.train_settings(config)) == expected


@pytest.mark.parametrize("sizes", [[], [0], [1.5], "all", 3, [True]])
def test_sizes_that_cannot_be(sizes: Any) -> None:
    config = configuration(measure={"sizes": sizes})
    with pytest.raises(SettingsError, match=r"measure\.sizes must be auto or numbers of samples"):
        sizes_of(config, settings.train_settings(config))


def cluster(name: str, devices: int = 16) -> DeviceTopology:
    config = configuration()
    config.cluster = OmegaConf.load(CONF / f"cluster/{name}.yaml")
    settings.check_keys(config)
    return topology(config, devices, None)


@pytest.mark.parametrize(
    "name, per_host, memory, flops, bandwidth",
    [
        ("summit", 4, 17.2e9, 15.7e12, 0.9e12),
        ("dgx_h100", 8, 85.9e9, 67e12, 3.35e12),
        ("h200", 8, 151e9, 67e12, 4.8e12),
    ],
)
def test_clusters_stay_below_their_data_sheets(
    name: str, per_host: int, memory: float, flops: float, bandwidth: float
) -> None:
    found = cluster(name)
    device = found.devices[0]
    assert found.name == name and found.per_host == per_host and len(found.devices) == 16
    assert 0.9 * memory < device.memory < memory
    assert 0.7 * flops < device.flops < flops
    assert 0.8 * bandwidth < device.bandwidth < bandwidth
    assert 1e-6 < device.overhead < 1e-4
    assert device.bandwidth > found.inside.bandwidth > 3 * found.between.bandwidth
    assert found.inside.latency <= found.between.latency < 1e-4
    assert found.link(0, per_host - 1) == found.inside and found.link(0, per_host) == found.between
