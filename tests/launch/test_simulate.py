"""launch.simulate and launch.plan with a profile, where there is no torch."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpp.graph import graph_to_json
from gpp.plan import plan_from_json

from ..graphs import make_graph
from .commands import Result, read, run_command, run_lines

# Runs a command and then says which heavy modules came in.
SPY = """
import sys
from launch import start
from launch.{name} import {name}
try:
    start.launch({name}, "{name}")
finally:
    print("heavy:", sorted({{"torch", "mpi4py", "triton"}} & set(sys.modules)))
"""
GRAPH = graph_to_json(make_graph({"left": "", "right": "", "join": "left right"}, stash=65536.0))


def spied(name: str, *arguments: str, cwd: Path) -> Any:
    (cwd / f"spy_{name}.py").write_text(SPY.format(name=name))
    return run_command(f"spy_{name}", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("simulate")
    (made / "graph.json").write_text(GRAPH)
    done = spied(
        "plan",
        *("profile=graph.json", "cluster.devices=3", "train.mini_batch=8", "hydra.run.dir=planned"),
        cwd=made,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "heavy: []" in done.stdout
    assert "planner gpp: " in done.stdout
    return made


def test_planning_from_a_written_graph_needs_no_torch(folder: Path) -> None:
    assert (folder / "planned" / "graph.json").read_text() == GRAPH
    plan = plan_from_json((folder / "planned" / "plan.json").read_text())
    assert (len(plan.topology.devices), plan.mini_batch) == (3, 8)


def test_what_a_plan_promises(folder: Path) -> None:
    done = spied("simulate", "plan=planned/plan.json", "hydra.run.dir=simulated", cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "heavy: []" in done.stdout
    assert "predicted step" in done.stdout
    rows = done.stdout.partition("rank ")[2].splitlines()
    assert rows[0].split() == ["bubble", "memory", "stage"]
    assert [row.split()[0] for row in rows[1:4]] == ["0", "1", "2"]
    trace = read(folder / "simulated", "trace.json")
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    assert {e["ph"] for e in events} <= {"X", "M", "s", "f", "C"}
    spans = [e for e in events if e["ph"] == "X"]
    assert spans and all(e["dur"] >= 0 and e["ts"] >= 0 and {"name", "pid", "tid"} <= e.keys() for e in spans)


@pytest.fixture(scope="module")
def refused(folder: Path) -> dict[str, Result]:
    text = (folder / "planned" / "plan.json").read_text()
    (folder / "short.json").write_text(text[:200])
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    record = json.loads(text)
    record["stage_graph"]["stages"][0]["micro_batch"] = 3
    (folder / "uneven.json").write_text(json.dumps(record))
    record = json.loads(text)
    del record["mini_batch"]
    (folder / "lacking.json").write_text(json.dumps(record))
    lines = {
        "none": ["simulate"],
        "nowhere": ["simulate", "plan=nowhere.json"],
        "folder": ["simulate", "plan=planned"],
        "short": ["simulate", "plan=short.json"],
        "binary": ["simulate", "plan=binary.json"],
        "uneven": ["simulate", "plan=uneven.json"],
        "lacking": ["simulate", "plan=lacking.json"],
        "graph": ["simulate", "plan=graph.json"],
        "steps": ["simulate", "plan=planned/plan.json", "steps=0"],
        "no profile": ["plan", "profile=nowhere.json"],
        "a plan as profile": ["plan", "profile=planned/plan.json"],
        "a plan to plan": ["plan", "profile=graph.json", "plan=planned/plan.json"],
    }
    return dict(zip(lines, run_lines(folder, list(lines.values())), strict=True))


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "say which plan: plan=path/to/plan.json"),
        ("nowhere", "there is no plan file nowhere.json"),
        ("folder", "there is no plan file planned"),
        ("short", "short.json: not a plan: malformed JSON"),
        ("binary", "binary.json is no plan file"),
        ("uneven", "micro-batch 3 of stage"),
        ("lacking", "lacking.json: not a plan: Plan lacks the key 'mini_batch'"),
        ("graph", 'graph.json: not a plan: the key "format" must be "gpp.plan/3"'),
        ("steps", "steps must be a whole number of at least 1, it is 0"),
        ("no profile", "there is no graph file nowhere.json"),
        ("a plan as profile", "planned/plan.json: not a computation graph"),
        ("a plan to plan", "this command makes a plan"),
    ],
)
def test_files_that_are_not_what_they_should_be(name: str, message: str, refused: dict[str, Result]) -> None:
    assert message in refused[name].refused()
    assert refused[name].out == ""
