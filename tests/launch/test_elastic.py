"""A job that loses a rank goes on, is asked to end, and its work is taken up by one process."""

import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gpp.checkpoint.shelf import ROOT
from gpp.runtime.environment import fault_tolerance
from launch.elastic import check_elastic, is_wanted
from launch.preemption import REQUEUE, exit_code, listening
from launch.settings import SettingsError, train_settings
from launch.start import CONF
from tests.mpirun import why_no_mpi
from tests.thorough import thorough

from .commands import SLOW, foreign, losses, read, run_command, run_lines

STEPS = 40
PATIENCE = 30.0  # seconds
BASE = ("model._target_=my_package.Towers", *SLOW, "train.mini_batch=16", "train.micro_batch=4")
BASE += ("train.verify=false", "train.held_out=0", "planner=sequential", "train.checkpoint_keep=100")
BASE += ("train.log_every=1", f"train.steps={STEPS}")
EVERY_STEP = "train.checkpoint_every=1"
PLAIN = ("data._target_=my_package.MyData",)


@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
def test_a_rank_dies_the_job_goes_on_is_asked_to_end_and_resumed(tmp_path: Path) -> None:
    folder = foreign(tmp_path)
    arguments = ["-n", "3", "launch.train", *BASE, "data._target_=my_package.Troubled"]
    arguments += ["train.elastic=true", "train.preempted_exit=75", "hydra.run.dir=run"]
    arguments += ["train.checkpoint_every=100", "train.checkpoint_memory=3"]
    job = run_command("launch.mpirun", *arguments, cwd=folder, timeout=200)
    assert job.returncode == REQUEUE, job.stdout + job.stderr
    assert job.stdout.count("lost rank 1: 2 ranks go on, renumbered from 0") == 1
    begun = int(job.stdout.split("goes on at step ")[1].split()[0])
    assert begun % 3 == 0
    if begun:  # rank 1 reads ahead, and may be gone before the first copy
        assert f"goes on at step {begun} of {STEPS}: the copy in memory has {begun}, " in job.stdout
    (end,) = [line for line in job.stdout.splitlines() if "SIGTERM on rank " in line]
    made = int(end.split("stopped after ")[1].split()[0])
    assert begun < 12 < made < STEPS
    assert f"SIGTERM on rank 1: stopped after {made} of {STEPS} steps" in end  # it was rank 2
    kept = folder / "run" / "checkpoints"
    assert (kept / f"step-{made:08d}" / "manifest.json").exists()
    found = losses(folder / "run")
    assert len(found) == made
    rest = [f"train.resume=whole/checkpoints/step-{begun:08d}"] if begun else []
    lines = [
        ["train", *BASE, *PLAIN, "hydra.run.dir=whole", "cluster.devices=3", EVERY_STEP],
        ["train", *BASE, *PLAIN, "hydra.run.dir=two", "cluster.devices=2", *rest],
        ["train", *BASE, *PLAIN, "hydra.run.dir=run", "train.resume=auto", "cluster.devices=4"],
    ]
    for result in run_lines(folder, lines):
        result.passed()
    assert read(folder / "run", "plan.json")["topology"]["devices"] is not None
    # as a run that is started again on two devices from that checkpoint
    assert found[begun:made] == losses(folder / "two")[: made - begun]
    whole = losses(folder / "whole")
    assert losses(folder / "run") == pytest.approx(whole, rel=1e-6) and len(whole) == STEPS
    shelf = Path(job.stdout.split("copies in memory: ")[1].split()[0])
    assert shelf.parent == ROOT and is_gone(shelf)


@thorough
@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
@pytest.mark.parametrize(
    "dies",
    ["1:300,2:420", "0:350,1:350", "2:250,0:500,3:700", "1:240,2:241"],
    ids=["one after the other", "two at once", "three", "while a copy is under way"],
)
def test_losses_one_after_the_other(dies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one host all copies outlive all ranks: each time training goes on where the last copy was made."""
    monkeypatch.setenv("DIES", dies)
    folder = foreign(tmp_path)
    arguments = ["-n", "4", "tests.launch.dying", *BASE, *PLAIN, "train.elastic=true", "hydra.run.dir=run"]
    arguments += ["train.checkpoint_every=100", "train.checkpoint_memory=1"]
    job = run_command("launch.mpirun", *arguments, cwd=folder, timeout=240)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "goes on at step " in job.stdout and "the copy in memory has " in job.stdout, job.stdout
    assert [line["step"] for line in read(folder / "run", "metrics.jsonl")] == list(range(STEPS))
    (whole,) = run_lines(folder, [["train", *BASE, *PLAIN, "hydra.run.dir=whole", "cluster.devices=4"]])
    whole.passed()
    assert losses(folder / "run") == pytest.approx(losses(folder / "whole"), rel=1e-6)
    assert is_gone(Path(job.stdout.split("copies in memory: ")[1].split()[0]))


def is_gone(shelf: Path) -> bool:
    """A process of its own removes it, when the last rank has ended."""
    end = time.monotonic() + PATIENCE
    while shelf.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not shelf.exists()


def test_signals_ask_and_are_remembered() -> None:
    asked: list[str] = []
    before = signal.getsignal(signal.SIGUSR1)
    with listening(3) as listener:
        signal.raise_signal(signal.SIGUSR1)
        listener.tell(asked.append)
        signal.raise_signal(signal.SIGTERM)
    assert asked == ["SIGUSR1 on rank 3", "SIGTERM on rank 3"]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_exit_codes() -> None:
    assert exit_code(None, {}) == 0
    assert exit_code(None, {"SLURM_JOB_ID": "1"}) == REQUEUE
    assert exit_code(3, {"SLURM_JOB_ID": "1"}) == 3


def test_what_elastic_needs() -> None:
    config = OmegaConf.load(CONF / "config.yaml")
    for key, value in {"train.elastic": True, "train.checkpoint_every": None}.items():
        OmegaConf.update(config, key, value)
    with pytest.raises(SettingsError, match=r"set train\.checkpoint_every"):
        check_elastic(train_settings(config), None)
    OmegaConf.update(config, "train.checkpoint_memory", 0)
    with pytest.raises(SettingsError, match=r"train\.checkpoint_memory must be a whole number of at least 1"):
        train_settings(config)
    OmegaConf.update(config, "train.checkpoint_memory", 2)
    OmegaConf.update(config, "train.elastic", False)
    with pytest.raises(SettingsError, match=r"for train\.elastic=true alone: set that too"):
        check_elastic(train_settings(config), None)
    OmegaConf.update(config, "train.elastic", True)
    OmegaConf.update(config, "train.checkpoint_every", 5)
    with pytest.raises(SettingsError, match=r"start it with launch\.mpirun"):
        check_elastic(train_settings(config), None)
    assert is_wanted(["train.steps=3", "train.elastic=true"]) and not is_wanted(["train.elastic=false"])
    assert fault_tolerance({"OMPI_MCA_mpi_ft_enable": "1"}) and not fault_tolerance({})


@pytest.mark.parametrize("value", [126, -1, "soon", 1.5])
def test_exit_codes_that_shells_use(value: object) -> None:
    config = OmegaConf.load(CONF / "config.yaml")
    OmegaConf.update(config, "train.preempted_exit", value)
    with pytest.raises(SettingsError, match=r"train\.preempted_exit"):
        train_settings(config)
