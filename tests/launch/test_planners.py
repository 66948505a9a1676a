"""launch.train with every planner, and with everything that a plan can say; the losses are those of one
device."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpp.cost import Roofline
from gpp.graph import ComputationGraph, graph_from_json
from gpp.plan import Plan, Policy, plan_from_json, plan_to_json
from gpp.planner.estimate import Group, Problem, assemble, estimated
from gpp.planner.options import Options

from ..graphs import make_cluster
from ..mpirun import why_no_mpi
from ..thorough import ALL
from .commands import SLOW, Result, foreign, losses, run_lines

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(ALL and why_no_mpi() is not None, reason=str(why_no_mpi())),
]
RANKS = 4
MODEL = ("model._target_=my_package.Towers", "data._target_=my_package.MyData", "train.mini_batch=16")
QUICK = ("train.steps=2", "train.verify=false", "train.held_out=0")
TOWERS = (*MODEL, *SLOW, *QUICK, "train.clip_norm=0.5")


def into(name: str, *arguments: str) -> list[str]:
    return ["train", *TOWERS, *arguments, f"hydra.run.dir={name}"]


PINS = "{towers.0.*: a, towers.1.*: b, towers.2.*: c, head: d}"
PLANNED = {
    "gpp": into("gpp", "planner=gpp"),
    "gpp, replicas": into("gpp_replicas", "planner=gpp", "planner.max_replicas=null"),
    "graphpipe": into("graphpipe", "planner=graphpipe"),
    "piper": into("piper", "planner=piper"),
    "pipedream": into("pipedream", "planner=pipedream", "planner.max_replicas=2", "train.micro_batch=4"),
    "sequential": into("sequential", "planner=sequential", f"planner.constraints.pins={PINS}"),
}
# these runs need one process, and so one capture; how messages travel is tested elsewhere
THREADS = ("graphpipe", "piper", "pipedream", "sequential", "uneven", "greedy")
RANKED = ("gpp", "gpp, replicas", "lagging", "shared")  # in processes if all is asked for
CUT = (("towers.0",), ("towers.1",), ("towers.2",), ("head",))


def handmade(graph: ComputationGraph, make: Callable[[Problem, list[Group]], Plan]) -> str:
    """A plan of a stage for each tower and the head."""
    names = list(graph.index)
    groups = [
        Group(tuple(i for i, name in enumerate(names) if name.startswith(prefixes)), 1) for prefixes in CUT
    ]
    options = Options(mini_batch=16, micro_batch=2)
    return plan_to_json(make(Problem(graph, make_cluster(RANKS), Roofline(), options), groups))


def lagging(problem: Problem, groups: list[Group]) -> Plan:
    """Weight halves of every stage but the last trail by one or two micro-batches; two run forward again."""
    groups = [replace(group, recompute=i in (0, 3)) for i, group in enumerate(groups)]
    plan = assemble(problem, groups, 2, "by hand", policy=Policy("zero-bubble"))
    stages = tuple(
        replace(stage, weight_lag=lag, in_flight=stage.in_flight + lag * stage.micro_batch)
        for stage, lag in zip(plan.stage_graph.stages, (1, 2, 1, 0), strict=True)
    )
    return estimated(replace(plan, stage_graph=replace(plan.stage_graph, stages=stages)))


def shared(problem: Problem, groups: list[Group]) -> Plan:
    """Two stages on two devices together, the others on one each; the optimizer's state is shared out."""
    slots = ((2, 0), (2, 0), (1, 1), (1, 2))
    groups = [
        replace(group, devices=devices, slot=slot, shard_optimizer=True)
        for group, (devices, slot) in zip(groups, slots, strict=True)
    ]
    return estimated(assemble(problem, groups, 2, "by hand"))


def uneven(problem: Problem, groups: list[Group]) -> Plan:
    """Every stage its own micro-batch size, one with two micro-batches in a burst."""
    sizes = ((4, 1), (2, 2), (4, 1), (2, 1))
    groups = [replace(group, micro_batch=b, k=k) for group, (b, k) in zip(groups, sizes, strict=True)]
    return estimated(assemble(problem, groups, 2, "by hand"))


def on_a_clock(problem: Problem, groups: list[Group]) -> Plan:
    """Orders chosen on a clock, in a row."""
    return estimated(assemble(problem, groups, 2, "by hand", policy=Policy("greedy"), chained=True))


HANDMADE = {"lagging": lagging, "shared": shared, "uneven": uneven, "greedy": on_a_clock}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("planners"))


@pytest.fixture(scope="module")
def one(folder: Path) -> list[float]:
    """The losses of one device."""
    for result in run_lines(folder, [into("one", "planner=sequential", "cluster.devices=1")]):
        result.passed()
    return losses(folder / "one")


@pytest.fixture(scope="module")
def done(folder: Path, one: list[float]) -> dict[str, Result]:
    """The runs of one job of four ranks, and some of threads."""
    graph = graph_from_json((folder / "one" / "graph.json").read_text())
    lines = dict(PLANNED)
    for name, make in HANDMADE.items():
        (folder / f"{name}.json").write_text(handmade(graph, make))
        lines[name] = into(f"by_hand_{name}", f"plan={name}.json")
    alone = THREADS if ALL else (*THREADS, *RANKED)
    threads = [[*lines.pop(name), f"cluster.devices={RANKS}"] for name in alone]
    found = dict(zip(alone, run_lines(folder, threads), strict=True))
    if lines:
        found |= dict(zip(lines, run_lines(folder, list(lines.values()), ranks=RANKS), strict=True))
    return found


def made(folder: Path, line: list[str]) -> Plan:
    return plan_from_json((folder / line[-1].partition("=")[2] / "plan.json").read_text())


@pytest.mark.parametrize("name", PLANNED)
def test_every_planners_plan_trains(
    name: str, folder: Path, one: list[float], done: dict[str, Result]
) -> None:
    done[name].passed()
    plan = made(folder, PLANNED[name])
    assert plan.planner == name.partition(",")[0]
    assert len(plan.residents) > 1
    assert losses(folder / PLANNED[name][-1].partition("=")[2]) == pytest.approx(one, rel=1e-5)


def test_what_the_planners_chose(folder: Path, done: dict[str, Result]) -> None:
    plans = {name: made(folder, line) for name, line in PLANNED.items()}
    assert plans["gpp"].policy.name in ("zero-bubble", "greedy")
    assert any(edge.is_order for edge in plans["sequential"].stage_graph.edges)
    for name in ("gpp, replicas", "pipedream"):
        assert any(len(stage.devices) > 1 for stage in plans[name].stage_graph.stages), name


@pytest.mark.parametrize("name", HANDMADE)
def test_everything_that_a_plan_can_say(
    name: str, folder: Path, one: list[float], done: dict[str, Result]
) -> None:
    out = done[name].passed()
    assert ("special" in out) == (name != "greedy")
    assert losses(folder / f"by_hand_{name}") == pytest.approx(one, rel=1e-5)
