"""launch.train device=emulated: nothing is trained, the clock is real."""

from pathlib import Path

import pytest

from gpp.plan import plan_from_json
from tests.thorough import thorough

from ..mpirun import why_no_mpi
from .commands import MINE, SLOW, Result, foreign, read, run_lines

BASE = (*MINE, *SLOW, "device=emulated", "train.steps=3", "train.mini_batch=16", "planner=graphpipe")


def into(name: str, *arguments: str) -> list[str]:
    return ["train", *BASE, *arguments, f"hydra.run.dir={name}"]


LINES = {
    "threads": into("threads", "cluster.devices=2"),
    "slow": into("slow", "cluster.devices=2", "emulation.slowdown=3", "emulation.message_bytes=64"),
    "weighted": into("weighted", "cluster.devices=2", "train.clip_norm=1"),
    "replay": into("replay", "cluster.devices=2", "plan=threads/plan.json", "data._target_=nobody.Nothing"),
    "none": into("none", "emulation.slowdown=0"),
    "empty": into("empty", "emulation.message_bytes=0"),
    "unknown": into("unknown", "+emulation.speed=2"),
}
MPI_LINES = {
    "three": into("three", "transport=device"),
    "replay": into("replay3", "cluster.devices=2", "plan=threads/plan.json", "model._target_=nobody.Nothing"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Result]:
    return dict(zip(LINES, run_lines(folder, list(LINES.values())), strict=True))


def check_run(folder: Path, result: Result, ranks: int) -> float:
    """A run's files; returns measured over predicted step time."""
    out = result.passed()
    assert "nothing is trained: devices are emulated, passes take" in out and "loss" not in out
    found = read(folder, "result.json")
    assert (found["world_size"], found["steps"], found["final_loss"], found["eval"]) == (ranks, 3, None, {})
    lines = read(folder, "metrics.jsonl")
    assert len(lines) == 3 and all(
        line.keys() == {"step", "step_seconds", "samples_per_second"} for line in lines
    )
    assert plan_from_json((folder / "plan.json").read_text()).mini_batch == 16
    assert "measured" in (folder / "trace.json").read_text()
    ratio: float = found["measured_step_seconds"] / found["predicted_step_seconds"]
    assert ratio > 0.98  # it waits as long as it says
    return ratio


@pytest.mark.parametrize("name", ["threads", "slow", "weighted", "replay"])
def test_threads(name: str, folder: Path, done: dict[str, Result]) -> None:
    check_run(folder / name, done[name], 2)


def test_what_is_emulated_is_the_plan_slowed_down(folder: Path, done: dict[str, Result]) -> None:
    plain, slow = (read(folder / name, "result.json") for name in ("threads", "slow"))
    assert slow["predicted_step_seconds"] == pytest.approx(3 * plain["predicted_step_seconds"], rel=0.05)
    assert (folder / "slow" / "plan.json").read_text() == (folder / "threads" / "plan.json").read_text()
    assert (folder / "replay" / "plan.json").read_text() == (folder / "threads" / "plan.json").read_text()
    assert "3 times the plan's seconds, messages of 64 B are real" in done["slow"].out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "emulation.slowdown must be larger than 0, it is 0"),
        ("empty", "emulation.message_bytes must be a whole number of at least 1, it is 0"),
        ("unknown", "there is no key emulation.speed; emulation has slowdown, message_bytes"),
    ],
)
def test_what_cannot_be(name: str, message: str, done: dict[str, Result]) -> None:
    assert message in done[name].refused()


@thorough
@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
def test_ranks(folder: Path, done: dict[str, Result]) -> None:
    found = dict(zip(MPI_LINES, run_lines(folder, list(MPI_LINES.values()), ranks=3), strict=True))
    check_run(folder / "three", found["three"], 3)
    check_run(folder / "replay3", found["replay"], 3)
