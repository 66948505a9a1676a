"""Groups of parameters and learning rates as the configuration says."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses import FakeTensorMode

from gpp.api.optimizer import optimizer_factor
from gpp.capture.export import CaptureError
from launch.optimizers import OptimizerMaker, one_launch, optimizer_maker, scheduler_maker
from launch.problems import SettingsError
from launch.start import CONF
from tests.equality import models

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.5, "weight_decay": 0.3}


def maker(**more: Any) -> OptimizerMaker:
    return optimizer_maker({**ADAMW, **more}).for_model(models.Encoder())


def named(*names: str) -> list[tuple[str, nn.Parameter]]:
    known = dict(models.Encoder().named_parameters())
    return [(name, known[name]) for name in names]


def test_without_groups_the_class_is_given_parameters() -> None:
    made = optimizer_maker({**ADAMW, "groups": [], "no_decay": []})(named("a.weight", "d.bias"))
    assert len(made.param_groups) == 1 and len(made.param_groups[0]["params"]) == 2


def test_options_of_groups() -> None:
    made = maker(groups=[{"pattern": "c.*", "lr": 0.1}, {"pattern": ["d.*"], "betas": [0.5, 0.6]}])(
        named("a.weight", "c.linear1.bias", "d.bias", "d.weight")
    )
    groups = made.param_groups
    assert [len(g["params"]) for g in groups] == [1, 1, 2]
    assert [g["lr"] for g in groups] == [0.5, 0.1, 0.5]
    assert [tuple(g["betas"]) for g in groups] == [(0.9, 0.999), (0.9, 0.999), (0.5, 0.6)]


def test_what_does_not_decay() -> None:
    made = maker(no_decay=["norms", "biases"])(named("b.norm1.weight", "b.linear1.bias", "d.weight"))
    assert [len(g["params"]) for g in made.param_groups] == [1, 2]
    assert [g["weight_decay"] for g in made.param_groups] == [0.3, 0.0]


def test_a_stage_without_a_groups_parameters_has_the_group_too() -> None:
    make = maker(groups=[{"pattern": "c.*", "lr": 0.1}], no_decay="norms")
    made = make(named("a.weight"))
    assert [len(g["params"]) for g in made.param_groups] == [1, 0, 0]
    made.param_groups[0]["params"][0].grad = torch.ones_like(made.param_groups[0]["params"][0])
    made.step()
    assert optimizer_factor(make) == 2.0


def test_patterns_are_held_against_the_whole_model() -> None:
    with pytest.raises(CaptureError, match=r"optimizer.groups\[0\]: the pattern 'e.\*' matches no parameter"):
        maker(groups=[{"pattern": ["a.*", "e.*"]}])


@pytest.mark.parametrize(
    "more, message",
    [
        ({"groups": [{"lr": 0.1}]}, "optimizer.groups must be a list of groups"),
        ({"groups": "a.*"}, "optimizer.groups must be a list of groups"),
        ({"groups": [{"pattern": "a.*", "lrr": 1}]}, "AdamW has no option 'lrr'; it has lr, betas"),
        ({"groups": [{"pattern": "a.*", "lr": -1}]}, "AdamW: Invalid learning rate: -1"),
        ({"no_decay": ["gains"]}, r"optimizer.no_decay must be some of \[norms, biases\], it has 'gains'"),
        ({"_target_": "torch.optim.LBFGS", "weight_decay": 0}, "LBFGS"),
    ],
)
def test_groups_that_cannot_be(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        optimizer_factor(maker(**more))


def test_an_optimizer_that_wants_the_loss_again() -> None:
    with pytest.raises(ValueError, match=r"LBFGS.step cannot be called without arguments"):
        optimizer_factor(optimizer_maker({"_target_": "torch.optim.LBFGS"}))


def rates(node: dict[str, Any], steps: int, optimizer: dict[str, Any] | None = None) -> list[float]:
    make = optimizer_maker(optimizer or {"_target_": "torch.optim.SGD", "lr": 1.0})
    config = OmegaConf.create({"lr_scheduler": node, "train": {"steps": steps}, "optimizer": {"lr": 1.0}})
    scheduler = scheduler_maker(config, [], make)
    assert scheduler is not None
    made = make([("a", nn.Parameter(torch.zeros(2, 2)))])
    moving = scheduler(made)
    found = []
    for _ in range(steps):
        found.append(made.param_groups[0]["lr"])
        made.step()
        moving.step()
    return found


def test_any_scheduler_of_torch() -> None:
    step = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2, "gamma": 0.5}
    assert rates(step, 5) == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_schedulers_of_schedulers() -> None:
    inner = [
        {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 0.5, "total_iters": 2},
        {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.1},
    ]
    chained = {"_target_": "torch.optim.lr_scheduler.ChainedScheduler", "schedulers": inner}
    assert rates(chained, 4) == pytest.approx([0.5, 0.05, 0.01, 0.001])
    after = {"_target_": "torch.optim.lr_scheduler.SequentialLR", "schedulers": inner, "milestones": [2]}
    assert rates(after, 4) == pytest.approx([0.5, 0.5, 1.0, 0.1])


@pytest.mark.parametrize("name", ["cosine", "warmup_cosine", "one_cycle", "sequential"])
def test_those_that_come_with_the_configuration(name: str) -> None:
    found = rates(OmegaConf.load(CONF / f"lr_scheduler/{name}.yaml"), 50, {**ADAMW, "lr": 1.0})
    assert all(0 <= rate <= 1 for rate in found) and max(found) == pytest.approx(1.0, rel=0.05)
    assert found[-1] < 0.8


def test_no_scheduler() -> None:
    config = OmegaConf.create({"lr_scheduler": OmegaConf.load(CONF / "lr_scheduler/none.yaml")})
    assert scheduler_maker(config, [], optimizer_maker(ADAMW)) is None


@pytest.mark.parametrize(
    "node, message",
    [
        ({"_target_": "torch.optim.lr_scheduler.Nope"}, "torch.optim.lr_scheduler .* has no Nope"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR"}, "StepLR: .*'step_size'"),
        ({"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, "steps without a metric"),
        ({"_target_": "torch.optim.SGD"}, r"SGD"),
        (
            {"_target_": "torch.optim.lr_scheduler.ChainedScheduler", "schedulers": [{"gamma": 1}]},
            r"a scheduler needs a _target_, one is \{'gamma': 1\}",
        ),
        (
            {
                "_target_": "torch.optim.lr_scheduler.LambdaLR",
                "lr_lambda": {
                    "_target_": "gpp.runtime.learning_rate.WarmUpCosine",
                    "warm_up": -1,
                    "steps": 1,
                },
            },
            "warm_up and steps must be at least 0",
        ),
    ],
)
def test_schedulers_that_cannot_be(node: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        rates(node, 1)


def test_on_a_gpu_one_launch_updates_all() -> None:
    with FakeTensorMode():
        there, here = (nn.Parameter(torch.zeros(2, 2, device=d)) for d in ("cuda", "cpu"))
    adamw, sgd, rprop = torch.optim.AdamW, torch.optim.SGD, torch.optim.Rprop
    for kind, parameters, options, fused in (
        (adamw, [there], {}, True),
        (sgd, [{"params": [there]}, {"params": []}], {"lr": 0.1}, True),
        (adamw, [there, here], {}, False),
        (adamw, [here], {}, False),
        (adamw, [], {}, False),
        (adamw, [there], {"foreach": True}, False),
        (adamw, [there], {"fused": False}, False),
        (rprop, [there], {}, False),
    ):
        assert one_launch(kind, parameters, options) == ({"fused": True} if fused else {})
