"""Optimizer and learning rates from the configuration: any class of torch.optim and of its lr_scheduler."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gpp.api.optimizer import probe
from gpp.capture.names import NO_DECAY, group_index
from gpp.runtime.state import MakeOptimizer, MakeScheduler

from .objects import Arguments, chosen, locate, make_object
from .problems import SettingsError


@dataclass(frozen=True)
class OptimizerMaker:
    """Makes the optimizer of some parameters, in groups: what no pattern matches, then each of `groups`
    (their options), then those that do not decay. Every rank has all groups, some of them empty.

    `index` says which group a parameter is in, by full name; `for_model` fills it in.
    """

    target: str
    options: Mapping[str, Any]
    patterns: tuple[tuple[str, ...], ...] = ()
    groups: tuple[Mapping[str, Any], ...] = ()
    undecayed: tuple[str, ...] = ()
    index: Mapping[str, int] = field(default_factory=dict)

    def for_model(self, model: nn.Module) -> "OptimizerMaker":
        """Raises CaptureError for a pattern that matches no parameter of the whole model."""
        return replace(self, index=group_index(model, self.patterns, self.undecayed))

    def __call__(self, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Raises SettingsError for arguments that the class does not take."""
        others = (*self.groups, *(({"weight_decay": 0.0},) if self.undecayed else ()))
        if not others:
            return self._made([parameter for _, parameter in named], {})
        for options in others:  # torch checks what all groups share, and lets these pass
            known = self._made([nn.Parameter(torch.zeros(1, 1))], {}).defaults
            unknown = [name for name in options if name not in known]
            if unknown:
                raise SettingsError(
                    f"optimizer.groups: {self.target} has no option {unknown[0]!r}; it has {', '.join(known)}"
                )
            self._made([nn.Parameter(torch.zeros(1, 1))], options)
        groups = [
            {"params": [p for n, p in named if self.index.get(n, 0) == i], **options}
            for i, options in enumerate(({}, *others))
        ]
        return self._made(groups, {})

    def _made(self, parameters: list[Any], options: Mapping[str, Any]) -> torch.optim.Optimizer:
        kind = locate(self.target, "optimizer")
        given = {**self.options, **options}
        try:
            made = kind(parameters, **one_launch(kind, parameters, given), **given)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"optimizer._target_={self.target}: {error}") from error
        if not isinstance(made, torch.optim.Optimizer):
            raise SettingsError(f"optimizer._target_={self.target} is not a torch.optim.Optimizer")
        return made


def one_launch(kind: Any, parameters: Sequence[Any], options: Mapping[str, Any]) -> dict[str, bool]:
    """`fused=True` where all parameters are on GPUs, the class knows it, and the user chose no other way.

    torch's fused AdamW updates all parameters of a stage in a few launches. Weights and summed gradients are
    float32 there whatever a stage computes in, so nothing is left for a kernel of this project's own to save.
    """
    tensors = [t for p in parameters for t in (p["params"] if isinstance(p, dict) else [p])]
    chosen_already = any(options.get(way) for way in ("fused", "foreach", "differentiable", "capturable"))
    if "fused" in options or chosen_already or not tensors or not all(t.is_cuda for t in tensors):
        return {}
    return {"fused": True} if "fused" in inspect.signature(kind).parameters else {}


def optimizer_maker(arguments: Arguments) -> OptimizerMaker:
    """From the `optimizer` group. Raises SettingsError for a class that is not there, and for wrong groups.

    `groups` is a list of {pattern: [...], and options}, `no_decay` lists kinds of parameters whose
    weight_decay is 0.
    """
    target = str(arguments["_target_"])
    locate(target, "optimizer")
    options = {k: v for k, v in arguments.items() if k not in ("_target_", "groups", "no_decay")}
    given = arguments.get("groups") or []
    if not isinstance(given, Sequence) or not all(isinstance(g, Mapping) and "pattern" in g for g in given):
        raise SettingsError(
            "optimizer.groups must be a list of groups, [{pattern: [*.bias, *norm*], weight_decay: 0}], it "
            f"is {given!r}"
        )
    undecayed = _words(arguments.get("no_decay") or [], "optimizer.no_decay")
    wrong = [word for word in undecayed if word not in NO_DECAY]
    if wrong:
        raise SettingsError(
            f"optimizer.no_decay must be some of [{', '.join(NO_DECAY)}], it has {wrong[0]!r}; any other "
            "parameters by optimizer.groups=[{pattern: ..., weight_decay: 0}]"
        )
    return OptimizerMaker(
        target,
        options,
        tuple(_words(group["pattern"], "pattern of optimizer.groups") for group in given),
        tuple({str(k): v for k, v in group.items() if k != "pattern"} for group in given),
        undecayed,
    )


def _words(value: Any, key: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not all(isinstance(word, str) for word in value):
        raise SettingsError(f"{key} must be a list of texts, it is {value!r}")
    return tuple(value)


def scheduler_maker(
    config: DictConfig, overrides: Sequence[str], make: MakeOptimizer
) -> MakeScheduler | None:
    """From the `lr_scheduler` group, tried once; None where there is none. Its `schedulers`, of a
    SequentialLR or a ChainedScheduler, are made with the same optimizer. Raises SettingsError."""
    if OmegaConf.select(config, "lr_scheduler._target_") is None:
        return None
    arguments = chosen(config, "lr_scheduler", overrides)

    def scheduler(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return _scheduler(arguments, optimizer)

    scheduler(probe(make)[0])
    return scheduler


def _scheduler(arguments: Any, optimizer: torch.optim.Optimizer) -> LRScheduler:
    if not isinstance(arguments, Mapping) or not arguments.get("_target_"):
        raise SettingsError(f"lr_scheduler: a scheduler needs a _target_, one is {arguments!r}")
    target = str(arguments["_target_"])
    given: dict[str, Any] = {str(k): v for k, v in arguments.items() if k != "_target_"}
    for name, value in given.items():
        if name == "schedulers":
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise SettingsError(f"lr_scheduler.schedulers must be a list of schedulers, it is {value!r}")
            given[name] = [_scheduler(item, optimizer) for item in value]
        elif isinstance(value, Mapping) and "_target_" in value:  # a function of the step
            given[name] = make_object(value, f"lr_scheduler.{name}")
    kind = locate(target, "lr_scheduler")
    try:
        made = kind(optimizer=optimizer, **given)
    except Exception as error:  # a class that is given what it did not expect
        raise SettingsError(f"lr_scheduler._target_={target}: {error or type(error).__name__}") from error
    if isinstance(made, ReduceLROnPlateau) or not isinstance(made, LRScheduler):
        raise SettingsError(
            f"lr_scheduler._target_={target} must be a class of torch.optim.lr_scheduler that steps without "
            "a metric"
        )
    return made
