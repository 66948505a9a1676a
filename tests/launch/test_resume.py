"""Runs of launch.train that keep checkpoints and go on, and launch.export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpp.checkpoint.folder import opened

from .commands import MINE, SLOW, Result, foreign, losses, read, run_lines
from .my_package import MyNet

BASE = (*MINE, *SLOW, "train.mini_batch=16", "train.micro_batch=4", "cluster.devices=2", "train.ema=0.9")
BASE += ("train.verify=false", "train.log_every=1", "planner=sequential")
BASE += ("lr_scheduler._target_=torch.optim.lr_scheduler.StepLR", "+lr_scheduler.step_size=2")
BASE += ("+lr_scheduler.gamma=0.5",)
KEEPS = ("train.checkpoint_every=2",)
HALF, COPY, LATER = "half/checkpoints/step-00000003", "half_copy", "step-00000004"


def train(folder: str, steps: int, *arguments: str) -> list[str]:
    return ["train", *BASE, f"train.steps={steps}", f"hydra.run.dir={folder}", *arguments]


FIRST = {
    "whole": train("whole", 6, *KEEPS),
    "half": train("half", 3, *KEEPS),
    "none": train("none", 1, "train.ema=null", "train.checkpoint_folder=kept", *KEEPS),
}
SECOND = {
    "again": train("half", 6, *KEEPS),
    "rest": train("half", 6, *KEEPS, "train.resume=auto"),
    "one device": train("one", 6, f"train.resume={COPY}", "cluster.devices=1"),
    "folder": train("folder", 4, "train.resume=half_kept"),
    "enough": train("half", 5, *KEEPS, "train.resume=auto"),
    "begins": train("begins", 1, *KEEPS, "train.resume=auto"),
    "export": ["export", "checkpoint=half/checkpoints"],
    "export whole": ["export", "checkpoint=whole/checkpoints/step-00000006", "output=deep/whole.safetensors"],
    "export averaged": ["export", f"checkpoint={COPY}", "averaged=true", "output=averaged.safetensors"],
    "nowhere": train("r", 6, "train.resume=nowhere"),
    "damaged": train("r", 6, "train.resume=damaged"),
    "all damaged": train("damaged_run", 6, "train.resume=auto"),
    "seed": train("r", 6, f"train.resume={COPY}", "train.seed=1"),
    "optimizer": train("r", 6, f"train.resume={COPY}", "optimizer=sgd"),
    "file": train("r", 1, *KEEPS, "train.checkpoint_folder=my_package.py"),
    "disk": train("r", 1, *KEEPS, "train.checkpoint_keep=1000000000000"),
    "early": train(
        "r", 1, *KEEPS, "train.checkpoint_keep=1000000000000", "model._target_=my_package.Branching"
    ),
    "emulated": train("r", 1, *KEEPS, "device=emulated"),
    "data": train("r", 6, f"train.resume={COPY}", "train.held_out=0.5"),
    "export older": ["export", "checkpoint=half_kept", "output=older.safetensors"],
    "no checkpoint": ["export"],
    "nothing": ["export", "checkpoint=nowhere"],
    "no average": ["export", "checkpoint=kept", "averaged=true"],
    "word": ["export", "checkpoint=kept", "averaged=often"],
    "output": ["export", "checkpoint=kept", "output=my_package.py/file"],
    "damaged export": ["export", "checkpoint=damaged"],
}
REFUSED = {
    "data": "was made on 183 training samples in the order of seed 0, this run has 102 in the order of",
    "again": "half/checkpoints has a checkpoint of step 4, and this run is at step 0: go on from that one "
    "(train.resume=auto), keep this run's checkpoints in another folder, or remove it",
    "nowhere": "train.resume: there is no checkpoint",
    "damaged": "damaged/averages-00001-of-00002.safetensors is damaged: its bytes are not those that were",
    "all damaged": "train.resume: no checkpoint in",
    "seed": "was made with seed 0, this run has 1: data and dropout would go another way. Use the same seed",
    "optimizer": "was made with the optimizer torch.optim.adamw.AdamW, this run has torch.optim.sgd.SGD",
    "file": "train.checkpoint_folder: nothing can be written to",
    "disk": "of free disk space, checkpoints need",
    "early": "of free disk space, checkpoints need",
    "emulated": "device=emulated trains nothing that a checkpoint could keep",
    "no checkpoint": "checkpoint",
    "nothing": "there is no checkpoint",
    "no average": "has no moving average of the weights: train.ema keeps one",
    "word": "averaged must be true or false, it is 'often'",
    "output": "output: nothing can be written to",
    "damaged export": "damaged/averages-00001-of-00002.safetensors is damaged",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def first(folder: Path) -> dict[str, Result]:
    return dict(zip(FIRST, run_lines(folder, list(FIRST.values())), strict=True))


@pytest.fixture(scope="module")
def done(folder: Path, first: dict[str, Result]) -> dict[str, Result]:
    with (folder / "half" / "metrics.jsonl").open("a") as metrics:  # as a killed run may leave it
        metrics.write(json.dumps({"step": 3, "loss": 0.0}) + "\n" + '{"step": 2, "lo')
    bad = "damaged_run/checkpoints/step-00000001"
    for name in (COPY, "damaged", bad, "half_kept/step-00000003"):
        shutil.copytree(folder / HALF, folder / name)
    (folder / "half_kept" / "step-00000009").mkdir()
    (folder / bad / "manifest.json").unlink()
    for name in (f"half_kept/{LATER}", f"half/checkpoints/{LATER}"):
        shutil.copytree(folder / "whole" / "checkpoints" / LATER, folder / name)
    for name in ("damaged", f"half_kept/{LATER}", f"half/checkpoints/{LATER}"):
        file = folder / name / "averages-00001-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\xaa")
    return dict(zip(SECOND, run_lines(folder, list(SECOND.values())), strict=True))


@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_every_line_runs_or_says_why_not(
    name: str, first: dict[str, Result], done: dict[str, Result]
) -> None:
    result = (first | done)[name]
    if name in REFUSED:
        message = result.refused()
        assert REFUSED[name] in message and message.count("\n") == 0, message
    else:
        result.passed()


def test_what_goes_on_is_the_whole(folder: Path, done: dict[str, Result]) -> None:
    whole = losses(folder / "whole")
    assert [line["step"] for line in read(folder / "half", "metrics.jsonl")] == list(range(6))
    assert losses(folder / "half") == whole
    for name in ("one", "folder"):
        lines = read(folder / name, "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(3, 3 + len(lines)))
        assert [line["loss"] for line in lines] == whole[3 : 3 + len(lines)]
    assert len(losses(folder / "one")) == 3
    results = [read(folder / name, "result.json") for name in ("whole", "half")]
    for key in ("steps", "final_loss", "eval", "eval_ema"):
        assert results[0][key] == results[1][key] is not None, key


def test_it_says_what_it_does(folder: Path, done: dict[str, Result]) -> None:
    assert f"goes on at step 3 of 6: {folder / HALF} has 3, train.steps=6" in done["rest"].out
    assert f"passed over: {folder}/half/checkpoints/{LATER}/averages-00001-of-00002.s" in done["rest"].out
    assert (folder / "half" / "checkpoints" / f"{LATER}.damaged").is_dir()
    assert "step     3  loss" in done["rest"].out and "step     2  loss" not in done["rest"].out
    assert "trained enough, evaluates only: " in done["enough"].out
    assert "held out" in done["enough"].out and "predicted," not in done["enough"].out
    assert "train.resume=auto: there is no checkpoint in" in done["begins"].out
    for name in ("folder", "export older"):
        assert "passed over: " in done[name].out and "step-00000009 is no whole" in done[name].out
        assert done[name].out.count("passed over: ") == 2 and f"{LATER}/averages" in done[name].out
    assert "6 weights of step 3" in done["export older"].out


def test_a_checkpoint_says_where_it_is_from(folder: Path, done: dict[str, Result]) -> None:
    kept = opened(folder / "whole" / "checkpoints" / "step-00000006")
    assert kept.manifest.step == 6 and kept.manifest.mini_batch == 16
    for name in ("plan.json", "config.yaml"):
        assert (kept.path / name).read_text() == (folder / "whole" / name).read_text()
    names = sorted(path.name for path in kept.path.parent.iterdir())
    assert names == ["step-00000004", "step-00000006"]


def test_plain_torch_takes_what_is_exported(folder: Path, done: dict[str, Result]) -> None:
    found = load_file(folder / "model.safetensors")
    model = MyNet()
    model.load_state_dict(found)
    assert "6 weights of step 6" in done["export"].out
    whole = load_file(folder / "deep" / "whole.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[n], whole[n]) for n in whole)
    averaged = load_file(folder / "averaged.safetensors")
    model.load_state_dict(averaged)
    assert not any(torch.equal(averaged[name], found[name]) for name in found)
    index = read(folder / COPY, "model.safetensors.index.json")
    assert index["weight_map"].keys() == found.keys()
    assert {path.name for path in folder.iterdir() if path.suffix == ".part"} == set()
