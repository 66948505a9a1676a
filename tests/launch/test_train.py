"""Real runs of the commands, in one process and under mpirun; several checks on the output of each."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from gpp.capture.weights import build_plain
from gpp.plan import plan_from_json
from gpp.runtime.data import hold_out
from tests.thorough import ALL, thorough

from ..mpirun import is_open_mpi, why_no_mpi
from .commands import MINE, SLOW, SMALL, Result, foreign, losses, read, run_command, run_lines
from .my_package import MyData, MyNet

needs_mpi = [pytest.mark.mpi, pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))]
TINY = (*MINE, *SLOW, "train.steps=3", "train.mini_batch=16", "planner=sequential")
TWO = (*TINY, "train.micro_batch=4", "cluster.devices=2")
BROKEN = (*TWO, "data._target_=my_package.Broken")
RESULT_KEYS = {
    *("world_size", "steps", "final_loss", "eval", "predicted_step_seconds", "measured_step_seconds"),
    *("planner_seconds", "peak_memory_bytes", "skipped_steps"),
}
METRIC_KEYS = {"step", "loss", "step_seconds", "samples_per_second", "lr"}
FILES = {"plan.json", "graph.json", "trace.json", "metrics.jsonl", "result.json", "config.yaml"}


def into(name: str, *arguments: str) -> list[str]:
    return ["train", *arguments, f"hydra.run.dir={name}"]


LINES = {
    "small": into("small", *SMALL, "cluster.devices=3"),
    "tiny": into("tiny", *TWO),
    "tuples": into("tuples", *TWO, "data._target_=my_package.Tuples"),
    "named": into("named", *TWO, "data._target_=my_package.Extra", "data.keys=[a,b,y]"),
    "talks": into("talks", *TWO, "model._target_=my_package.Talks"),
    "argument": into("argument", *TINY, "model._target_=my_package.One", "+model.outputs=3"),
    "clipped": into("clipped", *TWO, "train.clip_norm=0.1"),
    "sgd": into("sgd", *TWO, "optimizer=sgd"),
    "gpipe": into("gpipe", *TWO, "schedule=gpipe"),
    "triton": into("triton", *TWO, "kernels=triton"),
    "auto": into("auto", *TWO, "kernels=auto"),
    "recorded": into("recorded", *TWO, "train.init=recorded"),
    "skips": into("skips", *BROKEN, "train.on_nonfinite=skip", "train.max_skips=3", "kernels=triton"),
    "untrained": into("untrained", *TWO, "train.steps=0"),
    "nothing held out": into("all", *TWO, "train.held_out=0"),
    "one device": into("one", *TWO, "cluster.devices=1"),
    "replay": into("replay", *TWO, "train.micro_batch=auto", "plan=tiny/plan.json"),
    "plan": ["plan", *TWO, "hydra.run.dir=plan"],
    "captured": ["capture", *MINE, "hydra.run.dir=captured"],
    "profiled": ["plan", *TWO, "profile=captured/graph.json", "hydra.run.dir=profiled"],
    "several": ["train", "-m", *TWO, "train.steps=1,2", "hydra.sweep.dir=several"],
    "help": ["train", "--help"],
    "help plan": ["plan", "--help"],
    "help capture": ["capture", "--help"],
    "help simulate": ["simulate", "--help"],
}

MPI_LINES = {
    **({"small": into("mpi_small", *SMALL)} if ALL else {}),
    "two of three": into("mpi_two", *TWO),
    "one of three": into("mpi_one", *TINY, "model._target_=my_package.One"),
    "replay": into("mpi_replay", *TINY, "cluster.devices=2", "plan=tiny/plan.json"),
    "too many": into("mpi_many", *TINY, "cluster.devices=4"),
    "plan for two": into("mpi_wrong", *TINY, "plan=tiny/plan.json"),
    "model": into("mpi_nope", "model=nope"),
    "steps": into("mpi_steps", "train.steps=-1"),
    "capture": into("mpi_capture", *TINY, "model._target_=my_package.Branching"),
    "not finite": into("mpi_broken", *BROKEN),
    "no such choice": into("mpi_choice", *BROKEN, "train.on_nonfinite=ignore"),
    "simulate": ["simulate", "plan=tiny/plan.json", "hydra.run.dir=mpi_simulate"],
    "plan": ["plan", *TWO, "hydra.run.dir=mpi_plan"],
    "help": ["train", "--help"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Result]:
    """The runs in one process."""
    return dict(zip(LINES, run_lines(folder, list(LINES.values())), strict=True))


@pytest.fixture(scope="module")
def mpi_done(folder: Path, done: dict[str, Result]) -> dict[str, Result]:
    """The runs of one job of three ranks, after those in one process."""
    return dict(zip(MPI_LINES, run_lines(folder, list(MPI_LINES.values()), ranks=3), strict=True))


def check_folder(folder: Path, ranks: int, metrics: set[str], steps: int = 3) -> dict[str, Any]:
    """The files of a run have exactly their keys; returns the result."""
    assert {p.name for p in folder.iterdir() if p.suffix in (".json", ".jsonl", ".yaml")} == FILES
    result = read(folder, "result.json")
    assert result.keys() == RESULT_KEYS
    assert (result["world_size"], result["steps"], len(result["peak_memory_bytes"])) == (ranks, steps, ranks)
    lines = read(folder, "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(steps))
    assert all(line.keys() == METRIC_KEYS | metrics for line in lines)
    assert all(line["step_seconds"] > 0 and line["samples_per_second"] > 0 for line in lines)
    assert result["final_loss"] == lines[-1]["loss"]
    assert result["predicted_step_seconds"] > 0 and result["measured_step_seconds"] > 0
    assert "traceEvents" in read(folder, "trace.json")
    plan_from_json((folder / "plan.json").read_text())
    return dict(result)


def stages(folder: Path) -> list[Any]:
    """What a plan decided, and for what."""
    plan = plan_from_json((folder / "plan.json").read_text())
    parts = [(s.operators, s.devices, s.micro_batch, s.in_flight) for s in plan.stage_graph.stages]
    return [*parts, plan.fingerprints, plan.mini_batch, plan.estimate, plan.lower_bound]


def test_the_default_experiment(folder: Path, done: dict[str, Result]) -> None:
    out = done["small"].passed()
    assert "planner gpp" in out and "share of time" in out
    assert "predicted" in out and "measured" in out
    assert "held out (24 samples)" in out and "the most frequent label alone would be right for" in out
    result = check_folder(folder / "small", 3, {"accuracy"})
    assert result["eval"].keys() == {"loss", "accuracy"}
    names = {e["args"]["name"] for e in read(folder / "small", "trace.json")["traceEvents"] if e["ph"] == "M"}
    assert any("predicted" in n for n in names) and any("measured" in n for n in names), names


def test_a_users_own_module_and_data(folder: Path, done: dict[str, Result]) -> None:
    assert "depth 2, mini-batch 16, micro-batch 4" in done["tiny"].passed()
    check_folder(folder / "tiny", 2, {"mae"})
    assert losses(folder / "tuples") == losses(folder / "named") == losses(folder / "tiny")
    assert "idle devices: 1-3" in done["argument"].passed()


def test_only_the_users_own_words_reach_the_terminal(done: dict[str, Result]) -> None:
    assert done["talks"].code == 0
    assert set(done["talks"].err.splitlines()) == {"a word of mine"}


@pytest.mark.parametrize("name", sorted(set(LINES) - {"talks"}))
def test_nothing_is_said_on_the_error_stream(name: str, done: dict[str, Result]) -> None:
    done[name].passed()


def test_choices_change_what_they_should(folder: Path, done: dict[str, Result]) -> None:
    base = losses(folder / "tiny")
    assert losses(folder / "gpipe") == losses(folder / "replay") == base
    assert losses(folder / "one") == base
    assert losses(folder / "triton") == pytest.approx(base, rel=1e-5)
    assert losses(folder / "auto") == base or torch.cuda.is_available()
    assert "fused operators" in done["triton"].out and "fused operators" not in done["tiny"].out
    assert (folder / "triton" / "kernels.txt").read_text().startswith("rank 0: fused ")
    for other in ("sgd", "clipped"):
        assert losses(folder / other)[0] == base[0]
        assert losses(folder / other)[2] != base[2]
    assert losses(folder / "recorded")[0] == pytest.approx(base[0], rel=0.5)
    norms = [line["grad_norm"] for line in read(folder / "clipped", "metrics.jsonl")]
    assert all(norm > 0.1 for norm in norms)
    assert "schedule gpipe" in done["gpipe"].out


def test_steps_that_are_not_finite_are_counted(folder: Path, done: dict[str, Result]) -> None:
    out = done["skips"].passed()
    assert out.count("skipped step ") == 3 and "key 'b' of the batch holds NaN" in out
    lines = read(folder / "skips", "metrics.jsonl")
    assert [(line["loss"], line["skipped"]) for line in lines] == [(None, True)] * 3
    assert "skipped" not in read(folder / "tiny", "metrics.jsonl")[0]
    found = [read(folder / name, "result.json")["skipped_steps"] for name in ("tiny", "skips")]
    assert found == [0, 3]


def test_plans_replay_and_are_made_alike(folder: Path, done: dict[str, Result]) -> None:
    expected = stages(folder / "tiny")
    assert [stages(folder / other) for other in ("replay", "plan", "profiled")] == [expected] * 3
    graph = (folder / "tiny" / "graph.json").read_text()
    assert (folder / "captured" / "graph.json").read_text() == graph
    assert "3 operators, 1.25 KiB of parameters" in done["captured"].out


def test_nothing_trained_and_nothing_held_out(folder: Path, done: dict[str, Result]) -> None:
    result = read(folder / "untrained", "result.json")
    assert (result["final_loss"], result["measured_step_seconds"]) == (None, None)
    assert (folder / "untrained" / "metrics.jsonl").read_text() == ""
    assert read(folder / "all", "result.json")["eval"] == {}


def test_the_ragged_tail_counts_exactly(folder: Path, done: dict[str, Result]) -> None:
    data = MyData()
    chosen = hold_out(len(data), 0, 0.1).held_out.tolist()
    assert len(chosen) % 16, "the tail must be ragged"
    samples = [data[i] for i in chosen]
    batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
    with torch.no_grad():
        loss, metrics = build_plain(MyNet, 0).model.eval()(**batch)
    found = read(folder / "untrained", "result.json")["eval"]
    assert found == pytest.approx({"loss": float(loss), "mae": float(metrics["mae"])}, rel=1e-6)


def test_several_runs_of_one_command(folder: Path, done: dict[str, Result]) -> None:
    assert losses(folder / "several" / "0") == losses(folder / "tiny")[:1]
    assert losses(folder / "several" / "1") == losses(folder / "tiny")[:2]


@pytest.mark.parametrize("command", ["", " plan", " capture", " simulate"])
def test_help(command: str, done: dict[str, Result]) -> None:
    out = done[f"help{command}"].out
    assert out.startswith(f"python -m launch.{command.strip() or 'train'} ")
    assert "plan" in out and "--hydra-help" in out
    if command != " simulate":
        assert "model: candle_uno, " in out and "model, data  " in out and "steps: 180" in out


class TestUnderMpi:
    pytestmark = needs_mpi

    @thorough
    def test_the_same_losses_as_in_one_process(self, folder: Path, mpi_done: dict[str, Result]) -> None:
        mpi_done["small"].passed()
        check_folder(folder / "mpi_small", 3, {"accuracy"})
        assert losses(folder / "mpi_small") == losses(folder / "small")
        assert (folder / "mpi_small/plan.json").read_text() == (folder / "small/plan.json").read_text()
        evaluations = [read(folder / name, "result.json")["eval"] for name in ("mpi_small", "small")]
        assert evaluations[0] == evaluations[1]

    def test_ranks_beyond_the_plan_idle(self, folder: Path, mpi_done: dict[str, Result]) -> None:
        assert "ranks without work: 2" in mpi_done["two of three"].passed()
        check_folder(folder / "mpi_two", 3, {"mae"})
        assert losses(folder / "mpi_two") == losses(folder / "tiny")
        evaluations = [read(folder / name, "result.json")["eval"] for name in ("mpi_two", "tiny")]
        assert evaluations[0] == evaluations[1]
        assert "idle devices: 1-2" in mpi_done["one of three"].passed()
        check_folder(folder / "mpi_one", 3, set())

    def test_a_plan_replays(self, folder: Path, mpi_done: dict[str, Result]) -> None:
        mpi_done["replay"].passed()
        assert losses(folder / "mpi_replay") == losses(folder / "tiny")
        assert stages(folder / "mpi_plan") == stages(folder / "tiny")
        assert "predicted step" in mpi_done["simulate"].passed()

    @pytest.mark.parametrize(
        "name, message",
        [
            ("too many", "cluster.devices is 4, but there are 3 MPI ranks"),
            ("plan for two", "is a plan for 2 devices, this run has 3: start 2 ranks"),
            ("model", "Could not find 'model/nope'; Available options in 'model': candle_uno"),
            ("steps", "train.steps must be a whole number of at least 0, it is -1"),
            ("capture", "cannot be captured in module 'inner'"),
            ("no such choice", "train.on_nonfinite must be one of stop, skip, null, it is 'ignore'"),
            ("not finite", "step 0: the loss is nan and the gradients of "),
            ("not finite", "It began here: key 'b' of the batch holds NaN in sample"),
        ],
    )
    def test_one_message_ends_all_ranks(self, name: str, message: str, mpi_done: dict[str, Result]) -> None:
        assert message in mpi_done[name].refused()

    def test_help_comes_once(self, done: dict[str, Result], mpi_done: dict[str, Result]) -> None:
        assert mpi_done["help"].out == done["help"].out

    @thorough
    def test_the_command_that_starts_ranks(self, folder: Path) -> None:
        """From a folder of the user's, with nothing but the names of a model and a data set."""
        start = ("-n", "2", "launch.train", *MINE, "train.steps=2", "train.mini_batch=16")
        job = run_command("launch.mpirun", *start, cwd=folder)
        assert job.returncode == 0, job.stdout + job.stderr
        assert "-m launch.train model._target_=my_package.MyNet" in job.stdout.splitlines()[0]
        assert job.stdout.count("planner gpp") == 1
        runs = list((folder / "outputs").glob("*/*"))
        assert len(runs) == 1, "one output folder however many ranks"
        check_folder(runs[0], 2, {"mae"}, steps=2)

    @pytest.mark.parametrize(
        "way",
        [
            "raise",
            pytest.param("exit", marks=thorough),
            pytest.param("kill", marks=thorough),
            pytest.param("vanish", marks=thorough),
        ],
    )
    def test_one_failing_rank_ends_the_job(
        self, way: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if way == "vanish" and not is_open_mpi():
            pytest.skip("only Open MPI notices a rank that leaves with code 0")
        monkeypatch.setenv("WAY", way)
        job = failing(folder, way)
        assert job.returncode not in (0, 124), job.stdout + job.stderr
        assert "Traceback" not in job.stderr
        errors = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
        match way:
            case "raise":
                assert len(errors) == 1, job.stdout + job.stderr
                failure = "rank 1: sample 164 cannot be read: RuntimeError: disk on fire"
                assert errors[0].startswith(f"error: {failure}")
            case "exit":
                assert len(errors) == 1, job.stdout + job.stderr
                assert "sys.exit(3)" in errors[0]
            case _:
                assert len(errors) == 1, job.stdout + job.stderr  # it said nothing, but others did
                assert errors[0].startswith("error: rank 1 on ") and "ended without a word" in errors[0]
                assert re.search(r"\n  rank 0 \(.*\): step \d+: waits for \w+ of samples ", job.stderr)


def failing(folder: Path, way: str) -> subprocess.CompletedProcess[str]:
    from ..mpirun import run_mpi

    arguments = (*TWO, "train.steps=100000", "data._target_=my_package.DamagedOnOne")
    return run_mpi(2, "launch.train", *arguments, f"hydra.run.dir={way}", timeout=60, cwd=folder)


def test_without_mpi_none_is_loaded(folder: Path) -> None:
    code = "import sys; from tests.launch.lines import run; import json, pathlib; "
    code += f"r = run('train', {into('loaded', *TINY)!r}[1:]); print(r['code'], 'mpi4py' in sys.modules)"
    (folder / "loaded.py").write_text(code)
    done = run_command("loaded", cwd=folder)
    assert done.stdout == "0 False\n", done.stdout + done.stderr
