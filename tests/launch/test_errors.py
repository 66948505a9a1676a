"""Whatever is wrong: one readable message, a code other than 0, no traceback, and soon."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from .commands import MINE, SLOW, Result, foreign, run_lines

DATA = "data._target_=my_package."
MODEL = "model._target_=my_package."


class Case(NamedTuple):
    line: tuple[str, ...]
    says: tuple[str, ...]


def train(*arguments: str, says: tuple[str, ...]) -> Case:
    return Case(("train", *arguments), says)


def mine(*arguments: str, says: tuple[str, ...]) -> Case:
    return train(*MINE, *arguments, says=says)


PLAN = (
    "plan",
    *MINE,
    *SLOW,
    "cluster.devices=2",
    "train.mini_batch=16",
    "train.micro_batch=4",
    "train.on_nonfinite=null",
    "hydra.run.dir=planned",
)
REPLAY = ("cluster.devices=2", "train.mini_batch=16", "plan=planned/plan.json")

CASES = {
    "model": train("model=nope", says=("Could not find 'model/nope'", "mmt")),
    "data": train("data=nope", says=("Could not find 'data/nope'", "stdlib")),
    "transport": train("transport=pigeon", says=("Could not find 'transport/pigeon'", "auto; device; host")),
    "device transport": train(
        "transport=device",
        "device=cpu",
        says=("transport=device hands device memory to MPI", "transport=host"),
    ),
    "key": train("train.stepz=3", says=("'train.stepz'", "there are steps, mini_batch")),
    "added key": train("+train.stepz=3", says=("there is no key train.stepz", "train has steps")),
    "no assignment": train("steps", says=("Error parsing override 'steps'",)),
    "null model": train("model=null", says=("must be a string",)),
    "steps": train("train.steps=-1", says=("train.steps must be a whole number of at least 0, it is -1",)),
    "word": train("train.steps=many", says=("train.steps must be a whole number", "'many'")),
    "micro-batch": train(
        "train.micro_batch=3",
        "train.mini_batch=16",
        says=("train.micro_batch 3 does not divide train.mini_batch 16; use one of 1, 2, 4, 8, 16",),
    ),
    "replicas": train("planner.max_replicas=many", says=("planner.max_replicas must be a whole number",)),
    "kernels": train(
        "kernels.name=fast", says=("kernels.name must be one of eager, inductor, triton, auto",)
    ),
    "cluster": train("cluster.inside=3", says=("cluster.inside must be a group of latency, bandwidth",)),
    "link": train("cluster.inside.latency=-1", says=("cluster.inside.latency must be at least 0",)),
    "plan file": train("plan=/nowhere.json", says=("there is no plan file /nowhere.json",)),
    "profile": train("profile=x.json", says=("profile= is for launch.plan",)),
    "no target": train("model._target_=null", says=("model._target_ is missing",)),
    "no module": train(
        "model._target_=nowhere.Net", says=("there is no module 'nowhere'", "folder where the command")
    ),
    "no class": mine(f"{MODEL}Nope", says=("my_package.py) has no Nope",)),
    "no data class": mine(f"{DATA}Nope", says=("data._target_=my_package.Nope: my_package",)),
    "function": mine(f"{MODEL}function", says=("is not an nn.Module but int",)),
    "no module class": mine(f"{MODEL}NoData", says=("is not an nn.Module but NoData",)),
    "constructor": mine(f"{MODEL}Raises", says=("RuntimeError: weights not found", "my_package.py:")),
    "argument": mine("+model.speed=3", says=("unexpected keyword argument 'speed'",)),
    "no data set": mine(f"{DATA}NoData", says=("NoData is no data set: it needs __len__",)),
    "three samples": mine(f"{DATA}Three", says=("has 3 samples, capture alone needs 4",)),
    "extra key": mine(f"{DATA}Extra", says=("'z' that MyNet.forward does not take", "data.keys=[...]")),
    "lacking key": mine(f"{DATA}Lacking", says=("MyNet.forward needs 'b'", "it gives a, y")),
    "mini-batch": mine("train.mini_batch=1000", says=("183 training samples, it has 1000",)),
    "capture": mine(
        f"{MODEL}Branching", says=("cannot be captured in module 'inner' at", "my_package.py:", "torch.where")
    ),
    "shapes": mine(f"{MODEL}WrongShape", says=("cannot be captured", "same reduction dim")),
    "ignore_index": train(
        f"{MODEL}IgnoringLoss",
        f"{DATA}Classes",
        "train.mini_batch=8",
        "train.micro_batch=4",
        says=("it mixes samples", "Return (sum, weight) from forward", "train.micro_batch to the whole"),
    ),
    "optimizer": mine("optimizer._target_=torch.optim.Nope", says=("torch.optim", "has no Nope")),
    "optimizer's argument": mine(
        "+optimizer.speed=3", says=("optimizer._target_=torch.optim.AdamW", "'speed'")
    ),
    "learning rate": mine("optimizer.lr=-1", says=("Invalid learning rate: -1",)),
    "memory": mine("cluster.memory=1000", says=("by itself needs about", "devices with more memory")),
    "another model's plan": mine(
        f"{MODEL}One",
        *REPLAY,
        says=(
            "planned/plan.json was made for another model: the model has 1 operator that the plan lacks (on",
            "the plan has 3 operators that the model lacks (left, right, head)",
            "plan anew",
        ),
    ),
    "another mini-batch": mine(
        *REPLAY, "train.mini_batch=8", says=("mini-batches of 16, train.mini_batch is 8",)
    ),
    "another micro-batch": mine(
        *REPLAY, "train.micro_batch=1", says=("train.micro_batch is 1: leave it at auto",)
    ),
    "another schedule": mine(
        *REPLAY, "schedule=gpipe", says=("the command line asks for gpipe: leave schedule away",)
    ),
    "truncated plan": mine(*REPLAY, "plan=short.json", says=("short.json: not a plan: malformed JSON",)),
    "no plan at all": mine(*REPLAY, "plan=planned/graph.json", says=('must be "gpp.plan/3"',)),
    "overlapping plan": mine(
        *REPLAY, "plan=overlap.json", says=("overlap.json", "device 0 belongs to stage")
    ),
}
LATE = {  # after the plan has been printed
    "damaged sample": mine(
        f"{DATA}Damaged", "train.mini_batch=16", says=("sample 164 cannot be read: KeyError: 'no file 164'",)
    ),
}
ALONE = {
    "device": mine("device=cuda", says=("torch sees no CUDA device here",)),
    "device count": mine(*REPLAY, "cluster.devices=3", says=("plan for 2 devices, this run has 3",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = foreign(tmp_path_factory.mktemp("errors"))
    assert run_lines(made, [PLAN])[0].code == 0
    plan = (made / "planned" / "plan.json").read_text()
    (made / "short.json").write_text(plan[: len(plan) // 2])
    record = json.loads(plan)
    assert len(record["stage_graph"]["stages"]) == 2
    record["stage_graph"]["stages"][1]["devices"] = [0, 1]
    (made / "overlap.json").write_text(json.dumps(record))
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> Callable[[str], Result]:
    cases = CASES | LATE | ALONE
    done = dict(zip(cases, run_lines(folder, [case.line for case in cases.values()]), strict=True))
    return done.__getitem__


@pytest.mark.parametrize("name", CASES | ALONE)
def test_refused(name: str, results: Callable[[str], Result]) -> None:
    result = results(name)
    message = result.refused()
    assert result.out == ""
    assert message.count("\n") == 0, message
    for part in (CASES | ALONE)[name].says:
        assert part in message


@pytest.mark.parametrize("name", LATE)
def test_refused_in_training(name: str, results: Callable[[str], Result]) -> None:
    message = results(name).refused()
    assert all(part in message for part in LATE[name].says)
    assert "planner gpp" in results(name).out


def test_cuda_without_a_gpu(results: Callable[[str], Result]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "use device=cpu" in results("device").refused()
