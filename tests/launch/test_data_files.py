"""Training for real on files of the workloads' own formats, and on sequences of different lengths."""

import random
from pathlib import Path
from statistics import mean, pvariance

import pytest

from tests.thorough import thorough

from ..mpirun import run_mpi, why_no_mpi
from .commands import SLOW, Result, losses, read, run_lines

needs_mpi = [pytest.mark.mpi, pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))]

SHARED = (*SLOW, "cluster.devices=2", "train.mini_batch=64", "train.micro_batch=16", "planner=graphpipe")
DLRM = (
    *("model=dlrm_criteo", "model.tables=3", "model.rows=64", "model.hidden=16", "model.dense_layers=1"),
    *("model.dimension=4", "model.top_layers=1", "train.steps=150", "optimizer.lr=0.02", *SHARED),
)
UNO = (
    *("model=candle_uno", "data=candle_csv", "data.responses=responses.tsv", "data.cell_rnaseq=cells.tsv"),
    *("data.drug_descriptors=drugs.csv", "data.drug_fingerprints=prints.csv", "model.features.cell_rnaseq=3"),
    *("model.features.drug1_descriptors=2", "model.features.drug2_descriptors=2"),
    *("model.features.drug1_fingerprints=4", "model.features.drug2_fingerprints=4", "model.hidden=16"),
    *("model.layers=1", "model.top_layers=1", "train.steps=80", "optimizer.lr=0.02", *SHARED),
)
WORDS = ("model._target_=sequences.Net", "data._target_=sequences.Words", "train.steps=3", *SHARED)

WIDE = (
    *("model._target_=sequences.Wide", "data._target_=sequences.Waiting", "cluster.devices=1"),
    *("train.steps=14", "train.mini_batch=64", "train.micro_batch=64", "train.held_out=0"),
)
WAIT = 0.25  # seconds of a slow read: longer than a step, so that a busy machine changes little


def into(name: str, *arguments: str) -> list[str]:
    return ["train", *arguments, f"hydra.run.dir={name}"]


LINES = {
    "criteo": into("criteo", *DLRM, "data.files='day_*'"),
    "candle": into("candle", *UNO),
    "padded": into("padded", *WORDS, "data.pad={words: 9}"),
    "cut": into("cut", *WORDS, "data.pad={words: {length: 4, longer: cut}}"),
    "fast": into("fast", *WIDE, "+data.seconds=0"),
    "slow": into("slow", *WIDE, f"+data.seconds={WAIT}"),
    "no file": into("x", *DLRM),
    "too wide": into("x", *DLRM, "model=dlrm", "data=criteo", "data.files=day_0"),
    "damaged": into("x", *DLRM, "data.files=damaged"),
    "widths": into("x", *UNO, "model.features.cell_rnaseq=9"),
    "lengths": into("x", *WORDS),
    "too long": into("x", *WORDS, "data.pad={words: 4}"),
    "no length": into("x", *WORDS, "data.pad=4"),
}
MPI_LINES = {
    "criteo": into("mpi_criteo", *DLRM, "data.files=day_*", "data.cache=mpi_kept", "train.steps=20"),
    "candle": into("mpi_candle", *UNO, "data.cache=mpi_kept"),
}

SEQUENCES = '''
import time

import torch
from torch import nn


class Words(torch.utils.data.Dataset):
    """Sequences of 1 to 9 words; 0 is no word."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        words = torch.arange(index, index + 1 + index % 9) % 7 + 1
        return {"words": words, "y": (words == 3).sum().float()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 4, padding_idx=0)
        self.out = nn.Linear(4, 1)

    def forward(self, words, y):
        known = (words > 0).unsqueeze(-1)
        guess = self.out((self.table(words) * known).sum(1)).squeeze(1)
        return nn.functional.mse_loss(guess, y)


class Waiting:
    """Waits in every read, as for a disk."""

    keys = ("x", "y")

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 1000

    def read(self, indices, keys):
        time.sleep(self.seconds)
        x = torch.tensor(indices, dtype=torch.float32)
        return {key: {"x": x[:, None] / 1000, "y": x}[key] for key in keys}


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 3600), nn.ReLU(), nn.Linear(3600, 3600), nn.Linear(3600, 1))

    def forward(self, x, y):
        return nn.functional.mse_loss(self.layers(x).squeeze(1), y)
'''


def write_clicks(folder: Path) -> None:
    """A click follows from the first category and the second number."""
    draw = random.Random(0)
    lines = []
    for _ in range(3000):
        numbers = [draw.randint(0, 200) for _ in range(13)]
        categories = [draw.randrange(40) for _ in range(26)]
        clicked = (categories[0] % 3 == 0) != (numbers[1] < 30)
        texts = [str(number) if draw.random() < 0.98 or i == 1 else "" for i, number in enumerate(numbers)]
        lines.append("\t".join([str(int(clicked)), *texts, *(f"{c:08x}" for c in categories)]))
    (folder / "day_0").write_text("\n".join(lines[:2000]) + "\n")
    (folder / "day_1").write_text("\n".join(lines[2000:]))
    lines[1499] += "\t1"
    (folder / "damaged").write_text("\n".join(lines))


def write_responses(folder: Path) -> list[float]:
    """Growth follows from cell, drugs and doses; returns it."""
    draw = random.Random(1)
    cells = {f"c.{i}": [draw.gauss(5, 2) for _ in range(3)] for i in range(12)}
    drugs = {f"d.{i}": [draw.gauss(0, 9), draw.random()] for i in range(10)}
    rows, growths = ["CELL\tDRUG1\tDOSE1\tDRUG2\tDOSE2\tGROWTH"], []
    for _ in range(1500):
        cell, first, second = draw.choice([*cells]), draw.choice([*drugs]), draw.choice([*drugs, ""])
        doses = draw.uniform(4, 8), draw.uniform(4, 8)
        other = drugs[second or first][0]
        growth = 60 * (cells[cell][0] - 5) / 2 + 40 * (drugs[first][0] + other) / 18 + 10 * (doses[0] - 6)
        rows.append(f"{cell}\t{first}\t{doses[0]}\t{second}\t{doses[1] if second else ''}\t{growth}")
        growths.append(growth)
    (folder / "responses.tsv").write_text("\n".join(rows))
    texts = ["\t".join([name, "lung", *map(str, values)]) for name, values in cells.items()]
    (folder / "cells.tsv").write_text("\n".join(["Sample\tCancer_type_id\tg1\tg2\tg3", *texts]))
    texts = [",".join([name, *map(str, values)]) for name, values in drugs.items()]
    (folder / "drugs.csv").write_text("\n".join(["NAME,a,b", *texts]))
    texts = [",".join([name, *(str(draw.randint(0, 1)) for _ in range(4))]) for name in drugs]
    (folder / "prints.csv").write_text("\n".join(["NAME,1,2,3,4", *texts]))
    return growths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_clicks(folder)
    write_responses(folder)
    (folder / "sequences.py").write_text(SEQUENCES)
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Result]:
    return dict(zip(LINES, run_lines(folder, list(LINES.values())), strict=True))


@pytest.fixture(scope="module")
def mpi_done(folder: Path) -> dict[str, Result]:
    """The training runs of one job of two ranks."""
    return dict(zip(MPI_LINES, run_lines(folder, list(MPI_LINES.values()), ranks=2), strict=True))


def test_criteo_files_are_learnt(folder: Path, done: dict[str, Result]) -> None:
    done["criteo"].passed()
    result = read(folder / "criteo", "result.json")
    assert result["world_size"] == 2
    assert losses(folder / "criteo")[0] > 0.6  # the mean click alone leaves 0.68
    assert mean(losses(folder / "criteo")[-10:]) < 0.4 and result["eval"]["loss"] < 0.4
    assert result["eval"]["accuracy"] > 0.8


def test_tables_of_drug_responses_are_learnt(folder: Path, done: dict[str, Result], tmp_path: Path) -> None:
    done["candle"].passed()
    variance = pvariance([growth / 100 for growth in write_responses(tmp_path)])  # what the mean alone leaves
    assert mean(losses(folder / "candle")[-10:]) < 0.1 * variance
    assert read(folder / "candle", "result.json")["eval"]["loss"] < 0.1 * variance


@thorough
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_mpi) for n in MPI_LINES])
def test_two_ranks_read_and_learn_the_same(
    folder: Path, done: dict[str, Result], mpi_done: dict[str, Result], name: str
) -> None:
    done[name].passed()
    mpi_done[name].passed()
    found = losses(folder / f"mpi_{name}")
    assert found == losses(folder / name)[: len(found)] and len(found) >= 20
    kept = [path.suffix for path in (folder / "mpi_kept").iterdir()]
    assert (kept.count(".lines"), kept.count(".features"), kept.count(".responses")) == (2, 3, 1)


def test_a_slow_read_hides_behind_the_step(folder: Path, done: dict[str, Result]) -> None:
    """A step takes the longer of reading and computing, not both."""
    for name in ("fast", "slow"):
        done[name].passed()
    fast, slow = (read(folder / name, "result.json")["measured_step_seconds"] for name in ("fast", "slow"))
    assert fast > 0.3 * WAIT, "the step is too short to hide anything"
    assert 0.95 * WAIT - 0.01 < slow < max(fast, WAIT) + 0.5 * min(fast, WAIT)


@thorough
@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
def test_a_damaged_line_on_one_rank_ends_the_job(folder: Path, done: dict[str, Result]) -> None:
    arguments = (*DLRM, "data.files=damaged", "hydra.run.dir=mpi_damaged")
    job = run_mpi(2, "launch.train", *arguments, timeout=60, cwd=folder)
    assert job.returncode not in (0, 124), job.stdout + job.stderr
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith("damaged, line 1500: it has 41 columns with tabs between them, it must have 40")


@pytest.mark.parametrize("name", ["padded", "cut"])
def test_sequences_of_different_lengths_are_padded(folder: Path, done: dict[str, Result], name: str) -> None:
    done[name].passed()
    assert len(losses(folder / name)) == 3


@pytest.mark.parametrize(("name", "message"), [
    ("no file", "no file of Criteo's is named: data.files=[day_0,day_1], or data.files='day_*'"),
    ("too wide", "7 towers of 4096 need 28672: use model.dense=1 model.features=13"),
    ("damaged", "damaged, line 1500: it has 41 columns with tabs between them, it must have 40"),
    ("widths", "the model has other widths than the files: use model.features.cell_rnaseq=3"),
    ("lengths", "all samples of a key need one shape, pad sequences to a bound, data.pad={words: length}"),
    ("too long", "more than data.pad.words allows (4): raise it, or cut what is longer with data.pad.words="),
    ("no length", "data.pad must say a length for each of its keys, {key: length}, it is 4"),
])  # fmt: skip
def test_one_message_says_what_is_wrong(done: dict[str, Result], name: str, message: str) -> None:
    assert message in done[name].refused()
