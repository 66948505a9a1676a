"""Every section of benchmarks.planner on small inputs: rows that add up, and verdicts that can be no."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.command import run
from benchmarks.planner.answers import against, piper_answers
from benchmarks.planner.bottleneck import against_piper
from benchmarks.planner.gains import CHOICES, gaps, over_graphpipe
from benchmarks.planner.memory import bisected, floor, least_memory
from benchmarks.planner.profiles import every_profile
from benchmarks.planner.references import LONG, references
from benchmarks.planner.rivals import bottleneck, near_optimum, never_worse
from benchmarks.planner.runs import Runs, best_of, everything
from benchmarks.planner.speed import import_seconds, planning_seconds
from benchmarks.planner.throughput import over_linear
from benchmarks.planner.workloads import (
    MICRO_BATCH,
    Workload,
    captured,
    clustered,
    paper_models,
    profiles_folder,
    published,
    questions,
)
from benchmarks.report import FORMAT, machine, markdown, merged, record, text
from benchmarks.section import Section, geometric_mean, unmeasured
from gpp.cost import Roofline
from gpp.planner.options import Options

from ..graphs import make_graph, towers

FOLDER = profiles_folder()
needs_profiles = pytest.mark.skipif(FOLDER is None, reason="no published profiles here")
SMALL = Workload("MMT", make_graph(towers(3, 3), flops=1e10, stash=1e5), Roofline(), "summit", 2.0)
MODELS: Mapping[str, Workload] = {"MMT": SMALL}
QUESTION = (SMALL, Options(mini_batch=32, micro_batch=4))


def whole(section: Section) -> Section:
    """Checked for its form."""
    assert section.columns or not section.rows
    assert all(len(row) == len(section.columns) for row in section.rows)
    assert section.name in text(section)
    return section


def test_options_with_everything_on_are_all_there_are() -> None:
    plain, full = Options(mini_batch=8), everything(Options(mini_batch=8))
    changed = {name for name in Options.__dataclass_fields__ if getattr(plain, name) != getattr(full, name)}
    assert changed == {"eager", "split_backward", "greedy", "recompute", "shard_optimizer", "colocate"}


def test_plans_are_made_once() -> None:
    runs = Runs()
    first = runs.answer("sequential", SMALL, 4, QUESTION[1])
    assert runs.answer("sequential", SMALL, 4, QUESTION[1]) is first
    assert runs.answer("sequential", SMALL, 4, QUESTION[1], memory=2e9) is not first
    assert len(runs.answers) == 2


def test_the_clock_counts_no_first_run() -> None:
    calls: list[int] = []
    seconds, found = best_of(lambda: calls.append(1) or len(calls), times=2)
    assert (found, len(calls)) == (1, 3) and 0 <= seconds < 1
    best_of(lambda: calls.append(1), times=2, patience=-1.0)
    assert len(calls) == 4


def test_gains_and_gaps() -> None:
    runs = Runs()
    gains = whole(over_graphpipe(runs, MODELS, (4,), (16, 32), (0.5,)))
    assert gains.columns == ("gpp / graphpipe", "m = 16", "m = 32")
    last = next(row for row in gains.rows if row[0] == f"after: {CHOICES[-1]}")
    alone = next(row for row in gains.rows if row[0] == "MMT alone")
    assert last[1:] == alone[1:]
    for column in (1, 2):
        steps = [row[column] for row in gains.rows if str(row[0]).startswith("after: ")]
        assert steps == sorted(steps, reverse=True)  # type: ignore[type-var]
        assert isinstance(steps[-1], float) and 0 < steps[-1] <= 1 + 1e-9
        for name in ("MMT alone", "micro-batches 0.5 times as large"):
            found, least = (r[column] for r in gains.rows if str(r[0]).startswith(name))
            assert isinstance(found, float) and isinstance(least, float) and least <= found * (1 + 1e-9)
    gap = whole(gaps(runs, MODELS, (4,), (16, 32)))
    assert [row[:2] for row in gap.rows] == [(16, "MMT"), (16, "median"), (32, "MMT"), (32, "median")]
    assert len(runs.answers) == 3 * 2 * 2  # gaps asks nothing new


def test_throughput_over_the_linear_plan() -> None:
    found = whole(over_linear(Runs(), MODELS, (4,), (32,)))
    assert [row[:4] for row in found.rows] == [
        ("MMT", "no", 4, 32),
        ("MMT", "no", 4, "swept"),
        ("MMT", "yes", 4, 32),
        ("MMT", "yes", 4, "swept"),
    ]
    for row in found.rows:
        free, graphpipe, gpp, bound, gap = row[6:]
        assert bound and str(gap).endswith("%")
        assert isinstance(free, float) and free >= 1 - 1e-9
        assert isinstance(graphpipe, float) and isinstance(gpp, float) and gpp >= graphpipe * (1 - 1e-9)


def test_rivals() -> None:
    found = whole(never_worse(Runs(), {"towers": QUESTION}, (2, 4), (None, 8.0)))
    assert [row[1] for row in found.rows] == [2, 2, 4, 4] and found.rows[1][2] == 8.0
    assert found.reached is True and "worse in 0 of" in found.measured
    assert all(isinstance(cell, float) and cell <= 1 + 1e-9 for row in found.rows for cell in row[4:] if cell)


def test_near_the_optimum_where_downsets_are_not_searched() -> None:
    found = whole(near_optimum(Runs(), {"towers": QUESTION}, (3,), (8,), few=2))
    ((name, devices, m, best, *ratios, step),) = found.rows
    assert (name, devices, m) == ("towers", 3, 8)
    assert isinstance(best, float) and best > 0
    assert all(isinstance(ratio, float) and ratio >= 1 - 1e-9 for ratio in ratios[1:])  # one stage a device
    assert isinstance(step, float) and step <= 1 + 1e-9
    assert near_optimum(Runs(), {"towers": QUESTION}, (3,), (8,)).reached is None


def test_the_bottleneck_of_a_plan_bounds_its_throughput() -> None:
    plan = Runs().plan("sequential", SMALL, 4, QUESTION[1])
    assert plan is not None
    compute = max((s.seconds.forward + s.seconds.backward) / s.micro_batch for s in plan.stage_graph.stages)
    found = bottleneck(plan)
    assert compute < found < plan.estimate / plan.mini_batch
    shared = replace(plan.stage_graph.stages[1], devices=plan.stage_graph.stages[0].devices)
    stages = (plan.stage_graph.stages[0], shared, *plan.stage_graph.stages[2:])
    assert bottleneck(replace(plan, stage_graph=replace(plan.stage_graph, stages=stages))) > 1.5 * found


def test_least_memory() -> None:
    least = floor(SMALL, 3, "graphpipe", QUESTION[1])
    assert least is not None
    runs = Runs()
    plan = runs.plan("graphpipe", SMALL, 3, QUESTION[1], memory=least.bytes)
    assert plan is not None and plan.estimate == least.step_seconds
    assert runs.plan("graphpipe", SMALL, 3, QUESTION[1], memory=0.98 * least.bytes) is None
    found = whole(least_memory([QUESTION], (3,), ("piper", "graphpipe")))
    assert [row[2] for row in found.rows] == ["piper", "graphpipe", "gpp, everything", "stages in a row"]
    assert found.reached is False  # gpp was not asked
    piper, row = found.rows[0][3], found.rows[-1][3]
    assert isinstance(piper, float) and isinstance(row, float) and 0.5 * piper < row < piper
    assert bisected(lambda value: value >= 10, 1, 100) == pytest.approx(10, rel=0.011)
    assert bisected(lambda value: False, 1, 100) is None


def test_seconds() -> None:
    found = whole(planning_seconds(MODELS, {("graphpipe", 4): 100.0, ("sequential", 4): 1e-9}))
    assert found.reached is False
    assert [row[1:4] for row in found.rows] == [("graphpipe", 4, 128), ("sequential", 4, 128)]
    loaded = whole(import_seconds(("options",), times=1))
    assert loaded.rows[0][2] == "none" and 0 < float(str(loaded.rows[0][1])) < 30


def test_every_profile() -> None:
    found = whole(every_profile(Runs(), {"towers": (SMALL, 4)}, (3,), (8,), (0.001, 16)))
    assert [(row[0], row[2]) for row in found.rows[:2]] == [("towers", "graphpipe"), ("towers", "gpp")]
    assert all(row[5] == "3 devices, N = 8, 0.001 GiB" for row in found.rows[:2])
    assert [str(row[0]).partition(",")[0] for row in found.rows[2:]] == [
        "graphpipe on towers",
        "gpp on towers",
    ]
    assert all("needs about" in str(row[5]) for row in found.rows[2:])
    assert found.measured.startswith("2 of 4 have a plan")


@needs_profiles
def test_pipers_answers() -> None:
    assert FOLDER is not None
    every = references(FOLDER)
    assert len(every) == 39 and {case.tps is None for case in every} == {True, False}
    few = [case for case in every if case.name in ("candle2x4", "case2x4_ops") and case.devices == 8]
    found = whole(against(FOLDER, few))
    assert found.reached is True and len(found.rows) == 2
    wrong = [replace(case, tps=case.tps * 1.001) for case in few if case.tps]
    assert against(FOLDER, wrong).reached is False


@needs_profiles
def test_published_profiles_have_names_of_their_own() -> None:
    assert FOLDER is not None
    found = published(FOLDER)
    assert len(found) == 19 and {"mmt4x8_layers", "nasnetamobile", "gnmt", "pipedream/gnmt"} <= set(found)
    assert set(questions(MODELS, None)) == {"MMT", "case study"}
    assert {case.name for case in LONG} <= set(found)


def test_results_of_several_runs_come_together(tmp_path: Path) -> None:
    target = tmp_path / "planner.json"
    one = unmeasured("one", "first", "1", "nothing")
    two = Section(
        name="two", what="a|b", reach="2", measured="3", reached=False, columns=("x",), rows=((0.123456,),)
    )
    target.write_text(json.dumps(merged([record(one, 1.0, machine())], target, ("two", "one"))))
    both = merged([record(two, 2.0, machine())], target, ("two", "one"))
    assert both["format"] == FORMAT and [item["name"] for item in both["sections"]] == ["two", "one"]
    lines = markdown(both["sections"], "Title", "command").splitlines()
    assert "| a\\|b | 2 | 3 | no |" in lines and "| first | 1 | nothing |  |" in lines
    assert "| 0.1235 |" in lines
    assert {"processor", "cores", "python", "numpy", "date"} <= set(both["sections"][0]["machine"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = unmeasured("gains", "what", "reach", "measured")
    known = {"gains": lambda: section, "import": lambda: section}
    run("planner", "The planners, measured", known, ["gains", "--out", str(tmp_path)])
    assert "== gains: what" in capsys.readouterr().out
    assert (tmp_path / "planner.md").read_text().startswith("# The planners, measured")
    with pytest.raises(SystemExit):
        run("planner", "The planners, measured", known, ["nowhere"])
    assert "there is no section nowhere; there are gains, import" in capsys.readouterr().err


def test_means() -> None:
    assert geometric_mean([1.0, 4.0]) == 2.0
    with pytest.raises(ValueError, match="no numbers"):
        geometric_mean([])


def test_clusters_of_the_configuration() -> None:
    found = clustered("summit", 8, memory=5.0)
    assert (len(found.devices), found.per_host, {d.memory for d in found.devices}) == (8, 4, {5.0})
    assert set(MICRO_BATCH) == {"MMT", "DLRM", "CANDLE-Uno"}


def test_a_captured_model() -> None:
    found = captured("case_study")
    assert len(found.graph.operators) > 20 and found.optimizer_factor == pytest.approx(2.0, abs=0.01)
    assert callable(paper_models) and callable(piper_answers) and callable(against_piper)
