"""Runs that are kept and go on: their losses, and what the weights are at the end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from gpp.api.checkpoints import Checkpoints
from gpp.api.pipeline import Pipeline
from gpp.api.start import pipeline
from gpp.capture.capture import Captured
from gpp.capture.weights import Initialised
from gpp.plan import Plan
from gpp.runtime.learning_rate import WarmUpCosine
from tests.equality import models
from tests.equality.cases import Case
from tests.equality.harness import captured_model, make_plan

HALF = 3  # steps before the checkpoint, and after it
SAMPLES = 96

TOWERS = Case("towers", models.TwoTowers, (("a",), ("b",), ("",)), ema=0.9, clip=0.05)
TIED = Case(
    "tied", models.Tied, (("a",), ("b",), ("",)), exact=False, replicas=(2, 1, 1), shard=True, ema=0.9
)


def rates(kind: str, optimizer: torch.optim.Optimizer) -> LRScheduler:
    match kind:
        case "one cycle":
            return lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)
        case "warm-up cosine":
            return lr_scheduler.LambdaLR(optimizer, WarmUpCosine(2, 8))
        case _:
            first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
            later = lr_scheduler.ExponentialLR(optimizer, 0.8)
            return lr_scheduler.SequentialLR(optimizer, [first, later], milestones=[2])


class Statistics(models.BatchNorm):
    """Losses depend on a buffer that training changes and no state_dict has; another one never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(models.WIDTH), persistent=False)
        self.register_buffer("factor", torch.full((models.WIDTH,), 1.5), persistent=False)

    def forward(self, x: Tensor, y: Tensor):
        x = self.norm(self.a(x))
        if self.training:
            self.centre.mul_(0.5).add_(x.detach().mean(0))
        return F.cross_entropy(self.d(self.b((x - self.centre) * self.factor)), y)


@dataclass(frozen=True)
class Run:
    """What a run of a case came to: losses, weights and moving averages, on rank 0."""

    losses: list[float | None]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]


def made(case: Case, schedule: str = "one cycle", *, other_weights: bool = False, **more) -> Pipeline:
    """A pipeline of the case; with `other_weights` a checkpoint must bring all of them."""
    built = captured_model(case.model, case.dtype, case.precision, case.freeze)[0]

    def values(names: Iterable[str]) -> dict[str, Tensor]:
        constant = ("factor",)  # no checkpoint has it
        return {name: value + (name not in constant) for name, value in built.values(names).items()}

    def plan(captured: Captured) -> Plan:
        return replace(
            make_plan(case, captured), precision="bfloat16" if case.precision == "bf16" else "float32"
        )

    return pipeline(
        Initialised(built.model, values) if other_weights else built,
        models.batch(built.model, 4, 0, case.dtype),
        mini_batch=case.samples,
        plan=plan,
        devices=case.ranks,
        clip_norm=case.clip,
        ema=case.ema,
        precision=case.precision,
        device="cpu",
        verify=False,
        **{"optimizer": case.make_optimizer, "lr_scheduler": partial(rates, schedule), "seed": 5, **more},
    )


def steps(pipe: Pipeline, case: Case, stop: int) -> list[float | None]:
    """Steps up to `stop`, each on a batch of its own."""
    model = captured_model(case.model, case.dtype, case.precision, case.freeze)[0].model
    numbers = range(pipe.steps, stop)
    return [pipe.step(models.batch(model, case.samples, 10 + i, case.dtype)).loss for i in numbers]


def ended(pipe: Pipeline, losses: Sequence[float | None]) -> Run:
    averages = pipe.state_dict(averaged=True)
    return Run(list(losses), pipe.state_dict(), averages)


def kept_run(case: Case, folder: Path, schedule: str = "one cycle") -> Run:
    """Twice HALF steps, with a checkpoint in the middle: what comes after it."""
    with made(case, schedule) as pipe:
        steps(pipe, case, HALF)
        pipe.save(Checkpoints(folder=folder))
        return ended(pipe, steps(pipe, case, 2 * HALF))


def resumed_run(case: Case, folder: Path, schedule: str = "one cycle") -> Run:
    """HALF steps from the checkpoint."""
    with made(case, schedule, other_weights=True) as pipe:
        assert pipe.load(folder) == [] and pipe.steps == HALF
        return ended(pipe, steps(pipe, case, 2 * HALF))


def in_one(case: Case) -> Case:
    """The same on one device, with the sums in the same order."""
    return replace(
        case, stages=(("",),), replicas=(), shard=False, slots=(), recompute=(), lags=(), policy="1f1b"
    )


def assert_same(found: Run, expected: Run, bound: float = 0.0) -> None:
    """To the bit, or relative to the largest."""
    for one, other in zip(found.losses, expected.losses, strict=True):
        assert one is not None and other is not None
        assert abs(one - other) <= bound * abs(other), (one, other)
    for ours, theirs in ((found.weights, expected.weights), (found.averages, expected.averages)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not bound:
                assert torch.equal(ours[name], value), name
            else:
                distance = (ours[name].double() - value.double()).abs().max()
                assert distance <= bound * max(1.0, float(value.double().abs().max())), (name, distance)


class Rows:
    """A data set for any of the models."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._all = models.batch(model, SAMPLES, 3, dtype)
        self.keys = tuple(self._all)

    def __len__(self) -> int:
        return SAMPLES

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        return {key: self._all[key][list(indices)] for key in keys}
