"""The user's model and data, and what any `_target_` of the configuration names."""

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gpp.runtime.data import Dataset
from gpp.runtime.map_style import adapt
from gpp.runtime.padding import pads

from .problems import SettingsError

Arguments = Mapping[str, Any]  # a group's node, resolved: `_target_` and its arguments


def chosen(config: DictConfig, group: str, overrides: Sequence[str]) -> Arguments:
    """The group's arguments; naming another `_target_` drops those of the one that it replaces.

    So `model._target_=my_package.MyNet` is all that a model without arguments needs: what remains are the
    arguments given beside it. Raises SettingsError if there is no `_target_`.
    """
    node = OmegaConf.to_container(config[group], resolve=True)
    if not isinstance(node, dict) or not node.get("_target_"):
        raise SettingsError(
            f"{group}._target_ is missing: name a class, e.g. {group}._target_=my_package.MyClass"
        )
    names = [o.lstrip("+~").partition("=")[0] for o in overrides]
    if f"{group}._target_" in names and group not in names:
        given = {n.removeprefix(f"{group}.").split(".")[0] for n in names if n.startswith(f"{group}.")}
        node = {key: value for key, value in node.items() if key in given}
    return {str(key): value for key, value in node.items()}


def model_builder(arguments: Arguments) -> Callable[[], nn.Module]:
    """A function that builds the model. Raises SettingsError for what cannot be found or built."""

    def build() -> nn.Module:
        model = make_object(arguments, "model")
        if not isinstance(model, nn.Module):
            kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            raise SettingsError(f"model._target_={arguments['_target_']} is not an nn.Module but {kind}")
        return model

    return build


def data_object(arguments: Arguments) -> Any:
    """What the `data` group names, as its own class makes it. Raises SettingsError."""
    return make_object(made_of(arguments), "data")


def dataset(made: Any, arguments: Arguments, model: nn.Module) -> Dataset:
    """The data set; one of torch's map-style data sets is adapted to the arguments of the model's `forward`.

    `data.keys` chooses among its keys, or names the items of its tuples; `data.pad` brings sequences to one
    length, see `gpp.runtime.padding.pads`.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return adapt(made, names, data_keys(arguments), pads(arguments.get("pad") or {}))


def data_keys(arguments: Arguments) -> tuple[str, ...]:
    """data.keys."""
    keys = arguments.get("keys") or ()
    if isinstance(keys, str) or not isinstance(keys, Sequence):
        raise SettingsError(f"data.keys must be a list of names, data.keys=[a,b], it is {keys!r}")
    return tuple(map(str, keys))


def made_of(arguments: Arguments) -> Arguments:
    """What the data set's own class is given of the `data` group."""
    return {name: value for name, value in arguments.items() if name not in ("keys", "pad")}


def locate(name: str, group: str) -> Any:
    """The object of a dotted name. Raises SettingsError saying which part of the name is not there."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(path)
        except Exception as error:
            if (
                isinstance(error, ModuleNotFoundError)
                and error.name
                and f"{path}.".startswith(f"{error.name}.")
            ):
                continue  # the module's own name: the rest is to be found inside a shorter one
            raise SettingsError(f"{group}._target_={name} cannot be imported: {reason(error)}") from error
        for part in parts[count:]:
            if not hasattr(found, part):
                place = f" ({found.__file__})" if getattr(found, "__file__", None) else ""
                raise SettingsError(f"{group}._target_={name}: {path}{place} has no {part}")
            found, path = getattr(found, part), f"{path}.{part}"
        if not callable(found):
            raise SettingsError(f"{group}._target_={name} is no class but {type(found).__name__}")
        return found
    raise SettingsError(
        f"{group}._target_={name}: there is no module {parts[0]!r}; it must lie in the folder where the "
        "command is started, or on PYTHONPATH"
    )


def make_object(arguments: Arguments, group: str) -> Any:
    """What a `_target_` with its arguments gives. Raises SettingsError with the reason and its place."""
    locate(str(arguments["_target_"]), group)
    try:
        return instantiate(OmegaConf.create(dict(arguments)), _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise SettingsError(f"{group}._target_={arguments['_target_']}: {reason(cause)}") from error


def reason(cause: BaseException) -> str:
    """What went wrong in a user's code, and where."""
    text = " ".join(line.strip() for line in str(cause).splitlines() if line.strip())
    what = text if isinstance(cause, ValueError) and text else f"{type(cause).__name__}: {text}"
    frames = traceback.extract_tb(cause.__traceback__)
    foreign = ("importlib", "hydra", "omegaconf", "frozen")
    if not frames or any(part in frames[-1].filename for part in foreign):
        return what
    return f"{what} ({frames[-1].filename}:{frames[-1].lineno})"
