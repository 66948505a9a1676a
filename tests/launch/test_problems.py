"""Whatever is wrong with a configuration is said before anything starts: all of it, in one numbered list."""

import re
from pathlib import Path

import pytest

from launch.problems import Collected, SettingsError
from tests.thorough import thorough

from ..mpirun import why_no_mpi
from .commands import MINE, Result, foreign, run_lines


def refuse(*texts: str) -> int:
    raise SettingsError(*texts)


def test_every_reader_is_heard_and_what_two_say_is_said_once() -> None:
    def file() -> int:
        raise FileNotFoundError("no file")

    with pytest.raises(SettingsError) as caught, Collected() as read:
        assert read(refuse, "a") is None and read(int, "3") == 3
        read(refuse, "b", "a")
        read(file)
        read(refuse, "c").bit_length()  # of None, and nothing that a user could mend
    assert caught.value.problems == ("a", "b", "no file", "c")
    assert str(caught.value) == "the configuration has 4 problems:\n1. a\n2. b\n3. no file\n4. c"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_one_problem_is_a_sentence_and_none_is_none() -> None:
    with pytest.raises(SettingsError, match=r"^alone$"), Collected() as read:
        read(refuse, "alone")
    with Collected() as read:
        assert read(str, 3) == "3"


def test_faults_of_the_program_and_ends_of_it_pass() -> None:
    with pytest.raises(ZeroDivisionError), Collected() as read:
        read(lambda: 1 // 0)
    with pytest.raises(KeyboardInterrupt), Collected() as read:
        read(refuse, "a")
        raise KeyboardInterrupt


TRAIN = (
    *("train", "train.steps=-1", "+train.stepz=3", "+train.sleep=1", "train.mini_batch=12"),
    *("train.micro_batch=5", "train.held_out=2", "train.ema=many", "train.init_from=[no.safetensors]"),
    *("cluster.memory=0", "cluster.inside.latency=-1", "planner.greedy=7", "planner.max_replicas=0"),
    *("planner.constraints.pins=3", "schedule.k=0", "kernels.name=fast", "transport.reduce=nccl"),
    *("precision.autocast=tpu", "optimizer.lr=-3", "lr_scheduler=cosine", "+model.speed=3", "data=criteo"),
    *("model=dlrm", "data.files=[gone_0,gone_1]", "data.keys=ab", "plan=gone.json", "profile=x.json"),
    *("train.resume=gone", "train.checkpoint_every=2", "train.checkpoint_folder=my_package.py", "device=cpu"),
)
TRAIN_SAYS = (
    *("there is no key train.stepz", "there is no key train.sleep", "kernels.name must be one of"),
    *(
        "precision.autocast must be one of",
        "train.steps must be a whole number",
        "train.micro_batch 5 does not divide",
    ),
    *("train.ema must be a number", "train.held_out must be at least 0", "planner.max_replicas must be a"),
    *("planner.constraints.pins must be a table", "planner.greedy must be true or false"),
    *("schedule.k must be a whole number", "cluster.memory must be larger", "cluster.inside.latency must be"),
    *("there is no plan file gone.json", "profile= is for launch.plan", "Invalid learning rate: -3"),
    *("unexpected keyword argument 'speed'", "data.keys must be a list", "7 towers of 4096 need 28672"),
    *(
        "the file gone_0 cannot be read",
        "the file gone_1 cannot be read",
        "train.init_from: there is no file",
    ),
    *("transport.reduce=nccl sums on GPUs", "there is no checkpoint", "nothing can be written to"),
)
CASES = {
    "train": (TRAIN, TRAIN_SAYS),
    "division": (
        ("train", "train.mini_batch=12", "train.micro_batch=5", "train.prefetch=0"),
        (
            "train.prefetch must",
            "train.micro_batch 5 does not divide train.mini_batch 12; use one of 1, 2, 3",
        ),
    ),
    "emulated": (
        (
            "train",
            "device=emulated",
            "emulation.slowdown=0",
            "train.resume=auto",
            "emulation.message_bytes=x",
        ),
        ("emulation.slowdown must be larger", "emulation.message_bytes must be", "trains nothing that"),
    ),
    "constructors": (
        ("train", "model._target_=my_package.Raises", "data._target_=my_package.Full"),
        ("RuntimeError: weights not found", "data._target_=my_package.Full: OSError: no space"),
    ),
    "plan": (
        ("plan", "profile=gone.json", "train.log_every=0", "cluster.devices=none", "cluster.flops=x"),
        ("there is no graph file gone.json", "train.log_every must", "cluster.devices must", "cluster.flops"),
    ),
    "costs": (
        (
            "plan",
            *MINE,
            "cost=profiled",
            "cost.path=short.json",
            "cost.update_traffic=1",
            "model._target_=no.Net",
        ),
        ("short.json: costs: malformed JSON", "there is no module 'no'"),
    ),
    "compare": (
        ("compare", "planners=[gpp,best]", "cluster.devices=[2,x]", "train.seed=-1", "profile=gone.txt"),
        ("one is 'best'", "cluster.devices must be whole", "train.seed must be", "no graph file gone.txt"),
    ),
    "simulate": (
        ("simulate", "plan=gone.json", "steps=0"),
        ("steps must be a whole", "no plan file gone.json"),
    ),
    "capture": (
        ("capture", "train.init=fast", "optimizer.no_decay=[all]", "+cluster.fast=1"),
        ("train.init must be one of", "optimizer.no_decay must be", "there is no key cluster.fast"),
    ),
    "profile": (
        ("profile", "measure.sizes=[0]", "measure.seconds=0", "+measure.more=1", "cluster.devices=0"),
        (
            "measure.sizes must be",
            "measure.seconds must be",
            "no key measure.more",
            "cluster.devices must be",
        ),
    ),
    "export": (
        ("export", "checkpoint=gone", "output=my_package.py/x", "averaged=often"),
        ("there is no checkpoint", "output: nothing can be written", "averaged must be true or false"),
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = foreign(tmp_path_factory.mktemp("problems"))
    (folder / "short.json").write_text('{"format": ')
    done = run_lines(folder, [line for line, _ in CASES.values()])
    assert not (folder / "checkpoints").exists()
    return dict(zip(CASES, done, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_all_problems_are_one_message(name: str, results: dict[str, Result]) -> None:
    message, says = results[name].refused(), CASES[name][1]
    first, *rest = message.splitlines()
    assert results[name].out == "" and first == f"the configuration has {len(says)} problems:", message
    assert [line.split(".")[0] for line in rest] == [str(i + 1) for i in range(len(says))]
    for text in says:
        assert sum(text in line for line in rest) == 1, (text, message)


@thorough
@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
def test_one_rank_speaks_for_all(tmp_path: Path) -> None:
    line = ["train", "train.steps=-1", "cluster.devices=9", "train.init_from=gone.safetensors"]
    message = run_lines(foreign(tmp_path), [line], ranks=2)[0].refused()
    assert re.findall(r"^\d\. \S+", message, re.MULTILINE) == [
        "1. train.steps",
        "2. cluster.devices",
        "3. train.init_from:",
    ]
