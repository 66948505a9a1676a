"""How a model is trained, by real commands: precision, accumulation, averages, rates, files of weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from gpp.capture.weights import build_plain
from gpp.plan import Plan, plan_from_json
from tests.thorough import thorough

from ..mpirun import why_no_mpi
from .commands import MINE, SLOW, Result, foreign, losses, read, run_lines
from .my_package import MyNet

CUT = "planner.constraints.pins={left: first, right: second, head: second}"
TWO = (*MINE, *SLOW, "train.steps=3", "train.mini_batch=16", "train.micro_batch=4", "cluster.devices=2")
TWO += ("cluster.flops_bf16=4e6", "planner=sequential", CUT)
FREEZE = ("train.init_from={left.: left.safetensors}", "train.freeze=[left.*]")
ALL = (
    *FREEZE,
    *("precision=bf16", "train.accumulate=2", "train.ema=0.5", "train.clip_norm=0.5"),
    *("lr_scheduler=cosine", "optimizer.groups=[{pattern: head.*, lr: 0.01}]", "optimizer.no_decay=[biases]"),
)


def into(name: str, *arguments: str) -> list[str]:
    return ["train", *TWO, *arguments, f"hydra.run.dir={name}"]


PAIRS = ("model._target_=my_package.Contrastive", "planner.constraints.pins=null", "train.micro_batch=auto")
PAIRS += ("train.mini_batch=8", "optimizer.lr=0.0")

LINES = {
    "pairs": into("pairs", *PAIRS, "train.steps=6"),
    "accumulated pairs": into("accumulated_pairs", *PAIRS, "train.accumulate=2"),
    "cut pairs": into("cut_pairs", *PAIRS, "train.accumulate=2", "train.micro_batch=4"),
    "uneven parts": into("uneven", "train.accumulate=2", "train.micro_batch=5"),
    "plain": into("plain"),
    "bf16": into("bf16", "precision=bf16"),
    "accumulated": into("accumulated", "train.mini_batch=8", "train.accumulate=2"),
    "averaged": into("averaged", "train.ema=0.5"),
    "norm": into("norm", "train.log_norm=true"),
    "cosine": into("cosine", "lr_scheduler=cosine"),
    "grouped": into("grouped", "optimizer.groups=[{pattern: [head.*], lr: 0.5}]"),
    "loaded": into("loaded", "train.init_from=whole.safetensors"),
    "loaded recorded": into("recorded", "train.init_from=whole.safetensors", "train.init=recorded"),
    "frozen": into("frozen", *FREEZE, "train.log_norm=true"),
    "all": into("all", *ALL),
    "all recorded": into("all_recorded", *ALL, "train.init=recorded"),
    "bf16 triton": into("triton", "precision=bf16", "kernels=triton"),
    "half a plan": into("half", "plan=bf16/plan.json"),
    "too short a plan": into("short", "plan=accumulated/plan.json", "train.accumulate=2"),
    "no such pattern": into("pattern", "train.freeze=[middle.*]"),
    "no such group": into("group", "optimizer.groups=[{pattern: middle.*, lr: 1}]"),
    "wrong names": into("names", "train.init_from=left.safetensors"),
    "frozen whole": into("whole", "train.freeze=['*']"),
}
REFUSED = {
    "cut pairs": "else set train.micro_batch to the whole mini-batch, 8",
    "uneven parts": "train.micro_batch 5 does not divide the 32 samples of a step, train.mini_batch 16 times",
    "half a plan": "bf16/plan.json is a plan for bfloat16, precision=fp32 asks for float32: plan anew",
    "too short a plan": "is a plan for mini-batches of 16, train.mini_batch is 16, 2 of them a step",
    "no such pattern": "train.freeze: the pattern 'middle.*' matches no parameter of MyNet",
    "no such group": "optimizer.groups[0]: the pattern 'middle.*' matches no parameter of MyNet",
    "wrong names": "left.safetensors and MyNet differ in names or shapes: 6 missing (left.weight",
    "frozen whole": "MyNet has no trainable parameter",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = foreign(tmp_path_factory.mktemp("options"))
    state = build_plain(MyNet, 77).model.state_dict()
    save_file(state, made / "whole.safetensors")
    save_file({"weight": state["left.weight"], "bias": state["left.bias"]}, made / "left.safetensors")
    return made


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Result]:
    return dict(zip(LINES, run_lines(folder, list(LINES.values())), strict=True))


def plan(folder: Path) -> Plan:
    return plan_from_json((folder / "plan.json").read_text())


def column(folder: Path, key: str) -> list[Any]:
    return [line.get(key) for line in read(folder, "metrics.jsonl")]


@pytest.mark.parametrize("name", sorted(LINES))
def test_every_line_runs_or_says_why_not(name: str, done: dict[str, Result]) -> None:
    if name in REFUSED:
        assert REFUSED[name] in done[name].refused()
    else:
        done[name].passed()


def test_low_precision_is_close_and_its_messages_are_half(folder: Path, done: dict[str, Result]) -> None:
    base, low = losses(folder / "plain"), losses(folder / "bf16")
    assert low == pytest.approx(base, rel=0.02) and low != base
    full, half = plan(folder / "plain"), plan(folder / "bf16")
    assert (full.precision, half.precision) == ("float32", "bfloat16")
    assert len(full.stage_graph.edges) == 1
    assert [2 * e.bytes for e in half.stage_graph.edges] == [e.bytes for e in full.stage_graph.edges]
    assert [2 * e.gradient_bytes for e in half.stage_graph.edges] == [
        e.gradient_bytes for e in full.stage_graph.edges
    ]
    assert half.topology.devices[0].flops == 4e6
    assert losses(folder / "triton") == pytest.approx(low, rel=1e-2)


def test_parts_of_a_step_are_one_mini_batch(folder: Path, done: dict[str, Result]) -> None:
    assert losses(folder / "accumulated") == losses(folder / "plain")
    assert (
        read(folder / "accumulated", "result.json")["eval"] == read(folder / "plain", "result.json")["eval"]
    )


def test_a_loss_that_mixes_samples_is_the_mean_of_its_parts(folder: Path, done: dict[str, Result]) -> None:
    parts = losses(folder / "pairs")
    means = [(a + b) / 2 for a, b in zip(parts[::2], parts[1::2], strict=True)]
    assert losses(folder / "accumulated_pairs") == pytest.approx(means, rel=1e-6)
    made = plan(folder / "accumulated_pairs")
    assert (made.mini_batch, {s.micro_batch for s in made.stage_graph.stages}) == (16, {8})


def test_both_evaluations_are_told(folder: Path, done: dict[str, Result]) -> None:
    base, found = read(folder / "plain", "result.json"), read(folder / "averaged", "result.json")
    assert found["eval"] == base["eval"] and "eval_ema" not in base
    assert found["eval_ema"].keys() == found["eval"].keys() and found["eval_ema"] != found["eval"]
    assert "moving average of the weights)" in done["averaged"].out


def test_norm_and_rates_are_logged_and_printed(folder: Path, done: dict[str, Result]) -> None:
    assert losses(folder / "norm") == losses(folder / "plain")
    assert all(norm > 0 for norm in column(folder / "norm", "grad_norm"))
    assert column(folder / "plain", "grad_norm") == [None] * 3
    assert "  norm " in done["norm"].out and "  norm " not in done["plain"].out
    assert column(folder / "plain", "lr") == [0.002] * 3
    assert column(folder / "cosine", "lr") == pytest.approx([0.002, 0.0015, 0.0005])
    assert "  lr 0.0005" in done["cosine"].out


def test_a_groups_rate_is_its_own(folder: Path, done: dict[str, Result]) -> None:
    base, found = losses(folder / "plain"), losses(folder / "grouped")
    assert found[0] == base[0] and found[1] != base[1]
    assert column(folder / "grouped", "lr") == [0.002] * 3


def test_weights_of_a_file_are_the_same_however_the_rest_is_made(
    folder: Path, done: dict[str, Result]
) -> None:
    assert losses(folder / "loaded") == losses(folder / "recorded") != losses(folder / "plain")


def test_a_frozen_part_is_seen_by_the_planner(folder: Path, done: dict[str, Result]) -> None:
    graph = json.loads((folder / "frozen" / "graph.json").read_text())
    learns = {p["name"]: p["trainable"] for op in graph["operators"] for p in op["parameters"]}
    assert [n for n in learns if not learns[n]] == ["left.bias", "left.weight"]
    assert all(norm > 0 for norm in column(folder / "frozen", "grad_norm"))


@thorough
@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
def test_all_of_it_under_mpi(folder: Path, done: dict[str, Result]) -> None:
    run_lines(folder, [into("mpi_all", *ALL)], ranks=2)[0].passed()
    for key in ("loss", "grad_norm", "lr"):
        assert column(folder / "mpi_all", key) == column(folder / "all", key)
    alone, ranks = read(folder / "all", "result.json"), read(folder / "mpi_all", "result.json")
    assert (alone["eval"], alone["eval_ema"]) == (ranks["eval"], ranks["eval_ema"])
    assert len(plan(folder / "all").stage_graph.stages) == 2
