"""The command's configuration, checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from launch.problems import SettingsError
from launch.settings import number, own_path

from .kernels import KERNELS
from .rivals import RIVALS
from .work import DTYPES, PASSES, Kernel

RESULTS = Path(__file__).parents[1] / "results"
_KEYS = ("kernel", "dtype", "passes", "rivals", "stages", "tune", "limit_seconds", "seconds", "out", "plots")


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, how long, and the folder of what is written."""

    kernels: tuple[Kernel, ...]
    dtypes: tuple[str, ...]
    passes: tuple[str, ...]
    rivals: tuple[str, ...]
    stages: bool
    tune: bool
    limit: float
    seconds: float
    out: Path
    plots: bool


def settings(config: DictConfig) -> Settings:
    """Raises SettingsError for a key, a name or a number that cannot be."""
    for key in map(str, config):
        if key not in _KEYS:
            raise SettingsError(f"there is no key {key}; there are {', '.join(_KEYS)}")
    out = config.out
    return Settings(
        kernels=chosen(_words(config, "kernel", None)),
        dtypes=_words(config, "dtype", tuple(DTYPES)),
        passes=_words(config, "passes", PASSES),
        rivals=_words(config, "rivals", RIVALS),
        stages=_switch(config, "stages"),
        tune=_switch(config, "tune"),
        limit=number(config, "limit_seconds", above=0.0),
        seconds=number(config, "seconds", above=0.0),
        out=RESULTS if out is None else own_path(str(out)),
        plots=_switch(config, "plots"),
    )


def chosen(names: Sequence[str]) -> tuple[Kernel, ...]:
    """The operators that are named, a name standing for all that begin with it; all for `all`, none for
    `none`."""
    known = ", ".join(kernel.name for kernel in KERNELS)
    for name in names:
        if name not in ("all", "none") and not any(_named(kernel, name) for kernel in KERNELS):
            raise SettingsError(f"kernel must be all, none or some of {known}, one is {name!r}")
    return tuple(kernel for kernel in KERNELS if any(name == "all" or _named(kernel, name) for name in names))


def _named(kernel: Kernel, name: str) -> bool:
    return kernel.name == name or kernel.name.startswith(f"{name}_")


def _words(config: DictConfig, key: str, known: tuple[str, ...] | None) -> tuple[str, ...]:
    """One word or a list of them, of those `known`."""
    value = OmegaConf.select(config, key)
    found = list(value) if isinstance(value, ListConfig) else [value]
    for word in found:
        if not isinstance(word, str) or (known is not None and word not in known):
            choices = "names of operators" if known is None else f"some of {', '.join(known)}"
            raise SettingsError(f"{key} must be {choices}, one is {word!r}")
    return tuple(dict.fromkeys(found))


def _switch(config: DictConfig, key: str) -> bool:
    value = OmegaConf.select(config, key)
    if not isinstance(value, bool):
        raise SettingsError(f"{key} must be true or false, it is {value!r}")
    return value
