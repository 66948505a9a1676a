"""A run that stops and goes on is the run that did not stop, whatever the plan that goes on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpp.api.checkpoints import Checkpoints
from gpp.checkpoint import folder as folders
from gpp.checkpoint import writer
from gpp.checkpoint.folder import newest, opened
from gpp.checkpoint.manifest import MANIFEST, Manifest, Order, manifest_to_json
from gpp.checkpoint.tensors import CheckpointError, read_tensors, write_tensors
from gpp.runtime.data import Batches
from tests.equality import models
from tests.equality.cases import CASES, Case
from tests.equality.harness import captured_model
from tests.mpirun import run_mpi, why_no_mpi
from tests.thorough import thorough

from . import checkpoint_program
from .resumed import (
    HALF,
    SAMPLES,
    TIED,
    TOWERS,
    Rows,
    Statistics,
    assert_same,
    ended,
    in_one,
    kept_run,
    made,
    resumed_run,
    steps,
)

NORM = Case("norm", Statistics, (("a",), ("norm", "b"), ("",)), optimizer="sgd", ema=0.5)
LOW = Case("low", models.Dropout, (("a",), ("b",), ("",)), precision="bf16", recompute=(0, 1))
FROZEN = Case("frozen", models.Chain, (("a",), ("b",), ("c",), ("",)), freeze=("b.*",), slots=(0, 1, 0, 1))
MORE = [case for case in CASES if case.ranks <= 4 and not case.pretrained and not case.groups]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ranks there are: sums by two threads round otherwise than sums by one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


SAME, ONE = "the same plan", "one device"


@pytest.mark.parametrize(
    ("case", "schedule", "plans"),
    [
        (NORM, "sequential", (SAME, ONE)),
        (LOW, "warm-up cosine", (SAME,)),
        (FROZEN, "one cycle", (ONE,)),
    ],
    ids=("batch norm", "low precision", "frozen"),
)
def test_halves_are_the_whole(case: Case, schedule: str, plans: tuple[str, ...], tmp_path: Path) -> None:
    expected = kept_run(case, tmp_path, schedule)
    for plan in plans:
        assert_same(resumed_run(case if plan == SAME else in_one(case), tmp_path, schedule), expected)
    kept = opened(tmp_path / f"step-{HALF:08d}")
    assert tuple(kept.manifest.part.buffers) == (("centre",) if case is NORM else ())
    assert kept.manifest.part.weights.keys() == expected.weights.keys()  # what others' tools look for


def test_a_pipeline_goes_back(tmp_path: Path) -> None:
    """Under the same plan, in the same pipeline: nothing of the steps that are undone is left."""
    with made(TOWERS) as pipe:
        steps(pipe, TOWERS, HALF)
        pipe.save(Checkpoints(folder=tmp_path))
        expected = ended(pipe, steps(pipe, TOWERS, 2 * HALF))
        pipe.load(tmp_path)
        assert_same(ended(pipe, steps(pipe, TOWERS, 2 * HALF)), expected)
    assert_same(resumed_run(replace(TOWERS, stages=(("b",), ("",))), tmp_path), expected)


def test_replicas_and_shares_of_the_optimizer(tmp_path: Path) -> None:
    expected = kept_run(TIED, tmp_path / "many")
    assert_same(resumed_run(TIED, tmp_path / "many"), expected)
    other = replace(TIED, stages=(("a", "b"), ("",)), replicas=(1, 2))
    assert_same(resumed_run(other, tmp_path / "many"), expected, 1e-9)


@thorough
@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_every_case(case: Case, tmp_path: Path) -> None:
    expected = kept_run(case, tmp_path)
    assert_same(resumed_run(case, tmp_path), expected)
    bound = 0.0 if case.exact else 1e-3 if case.precision == "bf16" else 1e-6
    assert_same(resumed_run(in_one(case), tmp_path), expected, bound)


def manifest_with(**changes: Any) -> Callable[[Path, Manifest], Manifest]:
    return lambda path, manifest: replace(manifest, **changes)


def part_with(**changes: Any) -> Callable[[Path, Manifest], Manifest]:
    return lambda path, manifest: replace(manifest, part=replace(manifest.part, **changes))


def without_second_moment(path: Path, manifest: Manifest) -> Manifest:
    entries = manifest.part.optimizer
    fewer = {
        n: replace(e, tensors=tuple(k for k in e.tensors if k != "exp_avg_sq")) for n, e in entries.items()
    }
    return replace(manifest, part=replace(manifest.part, optimizer=fewer))


def wider(path: Path, manifest: Manifest) -> Manifest:
    file = manifest.part.weights["d.weight"]
    values = read_tensors(path / file)
    record = write_tensors(path / file, {**values, "d.weight": torch.zeros(7, 7)})
    return replace(manifest, part=replace(manifest.part, files={**manifest.part.files, file: record}))


def without_bias(path: Path, manifest: Manifest) -> Manifest:
    weights = {name: file for name, file in manifest.part.weights.items() if name != "d.bias"}
    return replace(manifest, part=replace(manifest.part, weights=weights))


REFUSED = {
    "mini-batch": (manifest_with(mini_batch=9), "was made with 9 samples a step, this run has 8: its place"),
    "length": (
        manifest_with(order=Order(95, 5)),
        "was made on 95 training samples in the order of seed 5, this run has 96 in the order of seed 5: the",
    ),
    "order": (
        manifest_with(order=Order(96, 4)),
        "in the order of seed 4, this run has 96 in the order of seed 5",
    ),
    "buffers": (
        lambda path, manifest: replace(
            manifest, part=replace(manifest.part, buffers={"centre": "config.yaml"})
        ),
        "is of another model: it has, and the model lacks, centre",
    ),
    "seed": (
        manifest_with(seed=6),
        "was made with seed 6, this run has 5: data and dropout would go another",
    ),
    "optimizer": (
        part_with(optimizer_class="torch.optim.sgd.SGD"),
        "with the optimizer torch.optim.sgd.SGD, this",
    ),
    "options": (
        without_second_moment,
        r"other options of the optimizer: it has no exp_avg_sq of \S+\. Use the same",
    ),
    "shape": (wider, r"is of another model: its d\.weight has shape \(7, 7\), the model's \(5, 16\)"),
    "name": (without_bias, r"is of another model: it lacks d\.bias \(1 names in all\)"),
}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good"
    with made(TOWERS) as pipe:
        steps(pipe, TOWERS, 1)
        pipe.save(Checkpoints(folder=good, texts={"config.yaml": "a: 1"}))
        losses = steps(pipe, TOWERS, 3)
        for name, (change, message) in REFUSED.items():
            path = shutil.copytree(opened(good / "step-00000001").path, tmp_path / name)
            text = manifest_to_json(change(path, opened(path).manifest))
            (path / MANIFEST).write_text(text)
            with pytest.raises(CheckpointError, match=message):
                pipe.load(path, Batches(SAMPLES, TOWERS.samples, 5))
        with pytest.raises(CheckpointError, match="there is no whole checkpoint in"):
            pipe.load(tmp_path)
        with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere"):
            pipe.load(tmp_path / "nowhere")
        assert pipe.steps == 3
        pipe.load(good)
        assert steps(pipe, TOWERS, 3) == losses


def test_bytes_that_are_damaged_are_passed_over(tmp_path: Path) -> None:
    kept = Checkpoints(folder=tmp_path, keep=3)
    with made(TOWERS) as pipe:
        losses = []
        for step in (1, 2, 3):
            losses += steps(pipe, TOWERS, step)
            pipe.save(kept)
        for step, kind in ((3, "averages"), (2, "optimizer")):
            file = next((tmp_path / f"step-0000000{step}").glob(f"{kind}-*"))
            file.write_bytes(file.read_bytes()[:-1] + b"\xaa")
        with pytest.raises(CheckpointError, match=r"optimizer-\S+ is damaged: its bytes are not"):
            pipe.load(tmp_path / "step-00000002")
        wrong = pipe.load(tmp_path)
        assert ["step-00000003/averages-" in wrong[0], "step-00000002/optimizer-" in wrong[1]] == [True, True]
        assert pipe.steps == 1 and len(wrong) == 2
        assert steps(pipe, TOWERS, 2) == losses[1:2]
        pipe.save(kept)  # what is written from here on must be the newest
        found, wrong = newest(tmp_path)
        assert found is not None and found.path == tmp_path / "step-00000002" and not wrong
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["step-00000001", "step-00000002", "step-00000003.damaged"]
        assert pipe.load(tmp_path) == [] and pipe.steps == 2
        for path in tmp_path.glob("*/averages-*"):
            path.write_bytes(path.read_bytes()[:-1] + b"\xaa")
        with pytest.raises(CheckpointError, match=r"there is no whole checkpoint in .*: \S+ is damaged"):
            pipe.load(tmp_path)


def test_checkpoints_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = captured_model(TOWERS.model, TOWERS.dtype, TOWERS.precision, TOWERS.freeze)[0].model
    data, batches = Rows(model, TOWERS.dtype), Batches(SAMPLES, TOWERS.samples, 5)
    kept = Checkpoints(folder=tmp_path, every=2, keep=2, texts={"config.yaml": "a: 1"})
    losses: list[float] = []

    def fit(count: int, checkpoints: Checkpoints | None = kept) -> None:
        pipe.fit(data, batches, count, lambda record: losses.append(record.loss), checkpoints=checkpoints)

    with made(TOWERS) as pipe:
        fit(7)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000007"]
        assert (tmp_path / "step-00000006" / "config.yaml").read_text() == "a: 1"
        whole = ended(pipe, losses)
        pipe.load(tmp_path / "step-00000006")
        with pytest.raises(CheckpointError, match="a checkpoint of step 7, and this run is at step 6: go on"):
            fit(1)
        del losses[6:]
        fit(1, None)
        assert_same(ended(pipe, losses), whole)
        real = writer.write_tensors

        def fails(path: Path, tensors: Any) -> Any:
            if "00002-of-00003" in path.name and "00000011.part" in str(path):
                raise CheckpointError(f"{path} cannot be written: the disk is on fire")
            return real(path, tensors)

        monkeypatch.setattr(writer, "write_tensors", fails)
        fit(3)  # up to step 10
        with pytest.raises(CheckpointError, match="the disk is on fire"):
            steps(pipe, TOWERS, 11)
            pipe.save(kept)
        assert pipe.steps == 11 and newest(tmp_path)[0].manifest.step == 10  # type: ignore[union-attr]
        monkeypatch.undo()
        pipe.save(kept)
        assert newest(tmp_path)[0].manifest.step == 11  # type: ignore[union-attr]
        assert newest(tmp_path)[0].manifest.order == Order(SAMPLES, 5)  # type: ignore[union-attr]
        monkeypatch.setattr(
            writer, "write_tensors", lambda path, tensors: fails(Path(f"{path}00000011.part"), tensors)
        )
        with pytest.raises(CheckpointError, match="the disk is on fire"):
            fit(3)
        assert newest(tmp_path)[0].manifest.step == 11  # type: ignore[union-attr]


def test_space_is_looked_at_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made(TOWERS) as pipe:
        pipe.save(Checkpoints(folder=tmp_path / "first"))
        steps(pipe, TOWERS, 1)
        pipe.save(Checkpoints(folder=tmp_path / "first"))
        size = opened(tmp_path / "first" / "step-00000001").manifest.bytes
        usage = shutil.disk_usage(tmp_path)
        estimate = pipe._subject().bytes
        assert estimate <= size <= estimate + 20_000  # and the files' headers
        monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=int(2.9 * estimate)))
        with pytest.raises(CheckpointError, match=r"of free disk space, checkpoints need .*: 3 of about"):
            pipe.save(Checkpoints(folder=tmp_path / "second"))
        pipe.save(Checkpoints(folder=tmp_path / "second", keep=1))
    with pytest.raises(CheckpointError, match="keep of Checkpoints must be at least 1, it is 0"):
        Checkpoints(folder=tmp_path, keep=0)


@thorough
@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")
def test_ranks_of_a_job(tmp_path: Path) -> None:
    """Three processes write, two and one go on."""
    found = {}
    for ranks in (3, 2):
        job = run_mpi(ranks, "tests.api.checkpoint_program", str(tmp_path / "kept"), timeout=200)
        assert job.returncode == 0, job.stdout + job.stderr
        found[ranks] = json.loads(job.stdout)
        if ranks == 3:
            last = opened(tmp_path / "kept" / f"step-{checkpoint_program.STEPS:08d}")
            sizes = {name: record.bytes for name, record in last.manifest.part.files.items()}
            second = last.path / sorted(sizes, key=lambda name: -sizes[name])[1]
            second.write_bytes(second.read_bytes()[:-1] + b"\xaa")
    found[1] = checkpoint_program.run(1, tmp_path / "kept")
    rest = found[3][checkpoint_program.EVERY :]
    assert len(rest) > 5 and found[2] == rest and found[1] == rest
