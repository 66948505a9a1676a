"""launch.compare: rows, table, CSV and figures; and what it refuses."""

import csv
import math
import sys
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gpp.cost import Roofline
from gpp.graph import graph_to_json
from gpp.plan import device_memory
from gpp.planner.estimate import Problem
from gpp.planner.options import Options
from launch.compare import drawn
from launch.comparison import (
    Row,
    answer,
    compared,
    comparison_csv,
    comparison_table,
    idle_share,
    on_true_graph,
)

from ..graphs import make_cluster, make_graph, towers
from .commands import Result, run_lines

TOWERS = make_graph(towers(3, 4), flops=1e9)


def problem(devices: int, *, memory: float = 16e9, replicas: int | None = 1) -> Problem:
    options = Options(mini_batch=32, micro_batch=2, max_replicas=replicas)
    return Problem(TOWERS, make_cluster(devices, memory=memory), Roofline(), options)


def test_rows_of_a_comparison() -> None:
    asked = problem(6)
    rows = compared({"graphpipe": asked, "sequential": asked})
    fast, slow = rows
    assert [row.planner for row in rows] == ["graphpipe", "sequential"]
    assert (slow.ratio, fast.devices, fast.mini_batch, fast.micro_batch, fast.micro_batches) == (
        1.0, 6, 32, "2", "16",
    )  # fmt: skip
    assert fast.step_seconds is not None and slow.step_seconds is not None
    assert fast.samples_per_second == 32 / fast.step_seconds
    assert fast.ratio == slow.step_seconds / fast.step_seconds > 1
    assert fast.on_graph is None and slow.on_graph is not None and slow.on_graph >= 1
    assert fast.depth is not None and slow.depth == slow.stages and fast.depth < slow.depth
    assert fast.gap is not None and fast.gap >= 0 and fast.planning_seconds is not None


def test_the_linear_plan_is_made_where_it_is_not_asked_for() -> None:
    asked = problem(6)
    (alone,) = compared({"graphpipe": asked})
    assert alone.ratio == compared({"graphpipe": asked, "sequential": asked})[0].ratio


def test_why_there_is_no_plan() -> None:
    asked = problem(2, memory=1e6)
    (row,) = compared({"graphpipe": asked})
    assert row.step_seconds is None and row.ratio is None
    assert "1.0 MiB" in row.why and "\n" not in row.why
    text = comparison_table([row])
    assert text.splitlines()[-1] == f"graphpipe on 2: {row.why}"


def test_a_chain_on_its_true_graph_waits_for_fewer_and_holds_no_more() -> None:
    asked = problem(6)
    chain = answer("sequential", asked).plan
    assert chain is not None and any(edge.is_order for edge in chain.stage_graph.edges)
    free = on_true_graph(asked, chain)
    assert free is not None and not any(edge.is_order for edge in free.stage_graph.edges)
    assert [s.operators for s in free.stage_graph.stages] == [s.operators for s in chain.stage_graph.stages]
    assert free.stage_graph.depth < chain.stage_graph.depth
    assert free.estimate < chain.estimate
    assert all(a <= b for a, b in zip(device_memory(free), device_memory(chain), strict=True))
    assert on_true_graph(asked, free) is free


def test_idle_share_of_one_device_is_nothing() -> None:
    plan = answer("sequential", problem(1)).plan
    assert plan is not None
    assert math.isclose(idle_share(plan), 0.0, abs_tol=1e-9)


def test_the_csv_has_every_field() -> None:
    rows = compared({"sequential": problem(3)})
    (read,) = csv.DictReader(StringIO(comparison_csv(rows)))
    assert read.keys() == set(Row.__dataclass_fields__)
    assert float(read["step_seconds"]) == rows[0].step_seconds
    assert (read["planner"], read["devices"], read["on_graph"] != "") == ("sequential", "3", True)


PROFILE = ("profile=graph.json", "train.mini_batch=16", "cluster.flops=1e10")
LINES = {
    "all": [
        *("compare", *PROFILE, "planners=[graphpipe,pipedream,sequential]", "cluster.devices=[4,2]"),
        "hydra.run.dir=all",
    ],
    "scaled": [
        *("compare", "profile=graph.json", "planners=[sequential]", "cluster.devices=[2,4]"),
        *("train.mini_batch=[8,16]", "planner.max_replicas=1", "hydra.run.dir=scaled"),
    ],
    "one": ["compare", *PROFILE, "planners=sequential", "cluster.devices=3", "hydra.run.dir=one"],
    "none": ["compare", *PROFILE, "planners=[graphpipe]", "cluster.memory=1e5", "hydra.run.dir=none"],
    "planner": ["compare", *PROFILE, "planners=[best]"],
    "no planner": ["compare", *PROFILE, "planners=[]"],
    "devices": ["compare", *PROFILE, "cluster.devices=[2,0]"],
    "batches": ["compare", "profile=graph.json", "cluster.devices=[2,4]", "train.mini_batch=[8,16,32]"],
    "micro-batch": ["compare", *PROFILE, "planners=[graphpipe]", "train.micro_batch=5"],
    "switch": ["compare", *PROFILE, "planners=[graphpipe]", "+planner.bursts=[0]"],
    "key": ["compare", *PROFILE, "planners=[graphpipe,gpp]", "+planner.depth=3"],
    "profile": ["compare", "profile=nowhere.txt", "planners=[graphpipe]"],
    "help": ["compare", "--help"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compare")
    (made / "graph.json").write_text(graph_to_json(TOWERS))
    return made


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Result]:
    return dict(zip(LINES, run_lines(folder, list(LINES.values())), strict=True))


def read(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO((folder / "comparison.csv").read_text())))


def test_the_command(folder: Path, done: dict[str, Result]) -> None:
    out = done["all"].passed()
    rows = read(folder / "all")
    asked = [(int(row["devices"]), row["planner"]) for row in rows]
    assert asked == [(k, p) for k in (2, 4) for p in ("graphpipe", "pipedream", "sequential")]
    lines = [line.split() for line in out.splitlines()]
    assert [(int(line[0]), line[1]) for line in lines if line and line[0] in ("2", "4")] == asked
    assert "graph.json: 13 operators" in out


def test_figures_where_there_is_matplotlib(folder: Path, done: dict[str, Result]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("throughput", "memory"):
        assert (folder / "all" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawn = (folder / "all" / f"{name}.svg").read_text()
        assert "<svg" in drawn
    assert "throughput.svg" in done["all"].out


def test_without_matplotlib_a_line_says_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    config = OmegaConf.create({"profile": "graph.json", "cluster": {"name": "local", "memory": 1e9}})
    said = drawn(compared({"sequential": problem(3)}), tmp_path, config)
    assert said.startswith("no figures: matplotlib is not installed; pip install -e '.[plot]'")
    assert not list(tmp_path.iterdir())


def test_mini_batches_that_grow_with_the_cluster(folder: Path, done: dict[str, Result]) -> None:
    done["scaled"].passed()
    found = [(row["devices"], row["mini_batch"], row["stages"]) for row in read(folder / "scaled")]
    assert [row[:2] for row in found] == [("2", "8"), ("4", "16")]
    done["one"].passed()
    assert [(row["devices"], row["planner"]) for row in read(folder / "one")] == [("3", "sequential")]


def test_a_comparison_without_plans_says_why(folder: Path, done: dict[str, Result]) -> None:
    out = done["none"].passed()
    assert "graphpipe on 4, 8, 16, 32: " in out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("      4")] == [
        ["4", "graphpipe", "-"]
    ]
    assert "no figures: there is no plan to draw" in out
    assert not (folder / "none" / "memory.png").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("planner", "planners must be some of gpp, graphpipe, sequential, pipedream, piper, one is 'best'"),
        ("no planner", "planners must be a list of names, it is []"),
        ("devices", "cluster.devices must be whole numbers of at least 1, one is 0"),
        (
            "batches",
            "train.mini_batch must be one number or one for each of the 2 numbers of cluster.devices",
        ),
        ("micro-batch", "train.micro_batch 5 does not divide train.mini_batch 16"),
        ("switch", "planner.bursts must be a list of whole numbers of at least 1"),
        ("key", "none of the planners graphpipe, gpp has a key planner.depth"),
        ("profile", "there is no graph file nowhere.txt"),
    ],
)
def test_what_it_refuses(name: str, message: str, done: dict[str, Result]) -> None:
    assert message in done[name].refused()


def test_help(done: dict[str, Result]) -> None:
    assert "python -m launch.compare [key=value ...]" in done["help"].passed()
