"""Plans, graphs, profiles and cost tables that are damaged: what commands do with them, file to answer."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from gpp.api.plan import machine
from gpp.cost import CostError, CostTable, Timing, costs_to_json
from gpp.formats.profile import ProfileError
from gpp.graph import GraphError, graph_to_json
from gpp.plan import PlanError, check_plan, plan_to_json
from gpp.plan_table import plan_table
from gpp.planner.named import planned
from gpp.planner.options import Options
from gpp.schedule.check import ScheduleError, check
from gpp.schedule.lower import lower
from gpp.simulate import predicted
from gpp.trace import to_chrome
from launch.compare import _requests
from launch.emulate import emulation
from launch.plans import read_plan, read_subject, request_of
from launch.problems import SettingsError
from launch.profile import _check_measure
from launch.settings import costs
from launch.start import CONF
from launch.validation import check_material

from ..damaged import survives, written
from ..graphs import make_graph
from ..mutated_json import mutated, mutated_bytes, mutated_text
from ..strategies import make_plan
from ..test_formats import small
from .test_settings import configuration

PLAN = plan_to_json(
    make_plan([(0, 1), (0, 2), (1, 3), (2, 3)], [2] * 4, 8, replicas=[1, 2, 1, 1], shared=[(0, 3)])
)
MODEL = make_graph({"left": "", "right": "", "join": "left right"}, stash=65536.0)
GRAPH = graph_to_json(MODEL)
TIMINGS = tuple(Timing(op.name, (1.0, 4.0), (1.0, 3.0), (1.0, 3.0), (1.0, 2.0)) for op in MODEL.operators)
COSTS = costs_to_json(CostTable(TIMINGS, graph=MODEL.fingerprint()))
COSTLY = "forward_compute_time=1.5, backward_compute_time=2.0, activation_size=[10; 20], parameter_size=400.0"
DREAM = f"node1 -- Input0 -- {COSTLY}\nnode2 -- Conv(1, 2) -- {COSTLY}\nnode3 -- Linear -- {COSTLY}\n"
DREAM += "\tnode1 -- node2\n\tnode2 -- node3\n"


def simulated(file: Path) -> None:
    """What launch.simulate does."""
    plan = read_plan(str(file))
    check(plan, lower(plan))
    prediction = predicted(plan, steps=2)
    assert plan_table(plan) and to_chrome(prediction.trace)
    check_plan(plan)


def planned_for(file: Path) -> None:
    """What launch.plan profile= does."""
    subject = read_subject(str(file), {})
    options = Options(mini_batch=4, optimizer_factor=subject.optimizer_factor)
    for planner in ("sequential", "graphpipe"):
        planned(planner, subject.graph, machine(2), subject.costs or costs(configuration()), options)


def test_a_damaged_plan_is_refused_or_simulated(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    expected = (PlanError, SettingsError, ScheduleError)
    survives(mutated_text(PLAN), lambda text: simulated(written(file, text)), expected)
    survives(mutated_text(PLAN), lambda text: read_plan(str(written(file, text))), expected[:2], str(file))
    survives(mutated_bytes(PLAN.encode()), lambda data: simulated(written(file, data)), expected, share=0.3)


def test_a_damaged_graph_is_refused_or_planned_for(tmp_path: Path) -> None:
    file, expected = tmp_path / "graph.json", (GraphError, ProfileError, SettingsError)
    read = mutated_text(GRAPH), lambda text: read_subject(str(written(file, text)), {})
    survives(*read, expected, str(file))
    survives(mutated_text(GRAPH), lambda text: planned_for(written(file, text)), (*expected, PlanError))


def test_a_damaged_profile_is_refused_or_planned_for(tmp_path: Path) -> None:
    for name, strategy in (
        ("piper.json", mutated_text(json.dumps(small()))),
        ("graph.txt", mutated_bytes(DREAM.encode())),
    ):
        file, expected = tmp_path / name, (ProfileError, GraphError, SettingsError)
        survives(strategy, lambda text, f=file: read_subject(str(written(f, text)), {}), expected, str(file))
        survives(strategy, lambda text, f=file: planned_for(written(f, text)), (*expected, PlanError))


def test_a_damaged_cost_table_is_refused_or_planned_with(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    config = configuration(cost={"path": str(file), "update_traffic": 7.0})

    def used(text: str) -> None:
        table = costs(config, MODEL if written(file, text) else None)
        planned("sequential", MODEL, machine(2), table, Options(mini_batch=4))

    survives(mutated_text(COSTS), lambda text: written(file, text) and costs(config), (CostError,), str(file))
    survives(mutated_text(COSTS), used, (CostError, PlanError, ValueError))


def test_any_value_of_a_setting_is_read_or_refused() -> None:
    base = OmegaConf.to_container(configuration(planner=OmegaConf.load(CONF / "planner" / "gpp.yaml")))
    assert isinstance(base, dict)
    base |= {"measure": {"sizes": "auto", "seconds": 60, "stages": 3, "cache": "auto"}, "planners": ["gpp"]}
    base["cluster"]["devices"] = [2, 4]

    def read(values: object) -> None:
        if not isinstance(values, dict):
            return
        try:
            config = OmegaConf.create(values)
        except Exception:  # a key that YAML cannot have
            return
        for reader in (
            lambda: request_of(config, ()),
            lambda: emulation(config),
            lambda: _requests(config, ()),
            lambda: _check_measure(config),
            lambda: check_material(config, ()),
        ):
            try:
                reader()
            except SettingsError as error:
                assert all(error.problems)

    survives(mutated(base), read, (), share=0.5)
