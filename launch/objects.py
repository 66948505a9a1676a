"""The user's model, data and optimizer from the configuration's `_target_`s."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gpp.runtime.data import Dataset
from gpp.runtime.map_style import adapt
from gpp.runtime.state import MakeOptimizer

from .settings import SettingsError


def chosen(config: DictConfig, group: str, overrides: Sequence[str]) -> DictConfig:
    """The group's node; naming another `_target_` drops the arguments of the one that it replaces.

    So `model._target_=my_package.MyNet` is all that a model without arguments needs: what remains are the
    arguments given beside it.
    """
    node: DictConfig = config[group]
    names = [o.lstrip("+~").partition("=")[0] for o in overrides]
    if f"{group}._target_" not in names or group in names:
        return node
    kept = [
        "_target_",
        *(n.removeprefix(f"{group}.").split(".")[0] for n in names if n.startswith(f"{group}.")),
    ]
    return OmegaConf.masked_copy(node, list(dict.fromkeys(kept)))


def model_builder(node: DictConfig) -> Callable[[], nn.Module]:
    """A function that builds the model. Raises SettingsError for what cannot be found or built."""

    def build() -> nn.Module:
        model = _make(node, "model")
        if not isinstance(model, nn.Module):
            raise SettingsError(
                f"model._target_={node._target_} is not an nn.Module but {type(model).__name__}"
            )
        return model

    return build


def dataset(node: DictConfig, model: nn.Module) -> Dataset:
    """The data set; one of torch's map-style data sets is adapted to the arguments of the model's `forward`.

    `data.keys` chooses among its keys, or names the items of its tuples.
    """
    keys = OmegaConf.select(node, "keys") or ()
    made = _make(OmegaConf.masked_copy(node, [str(k) for k in node if k != "keys"]), "data")
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return adapt(made, names, tuple(map(str, keys)))


def optimizer_maker(node: DictConfig) -> MakeOptimizer:
    """A function from named parameters to an optimizer."""

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        arguments = {k: v for k, v in OmegaConf.to_container(node, resolve=True).items() if k != "_target_"}  # type: ignore[union-attr]
        try:
            kind = get_class(str(node._target_))
            made = kind([parameter for _, parameter in named], **{str(k): v for k, v in arguments.items()})
        except (ImportError, TypeError, ValueError) as error:
            raise SettingsError(f"optimizer._target_={node._target_}: {error}") from error
        if not isinstance(made, torch.optim.Optimizer):
            raise SettingsError(f"optimizer._target_={node._target_} is not a torch.optim.Optimizer")
        return made

    return make


def optimizer_factor(make: MakeOptimizer) -> float:
    """Bytes of state per byte of parameters, found by one step on a small one."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = make([("probe", parameter)])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    size = sum(v.numel() * v.element_size() for v in state if v.numel() > 1)
    return size / (parameter.numel() * parameter.element_size())


def _make(node: DictConfig, group: str) -> Any:
    target = OmegaConf.select(node, "_target_")
    if target is None:
        raise SettingsError(
            f"{group}._target_ is missing: name a class, e.g. {group}._target_=my_package.MyClass"
        )
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise SettingsError(f"{group}._target_={target}: {_reason(cause)}") from error


def _reason(cause: BaseException) -> str:
    """The innermost cause in one line: Hydra wraps what went wrong."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip().splitlines()
    first = text[0] if text else ""
    return first if isinstance(cause, ImportError | ValueError) else f"{type(cause).__name__}: {first}"
