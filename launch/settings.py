"""The configuration as checked records; each reader raises SettingsError naming key, rule and value."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from gpp.cost import CostError, CostModel, Roofline, costs_from_json
from gpp.graph import ComputationGraph
from gpp.plan import POLICIES, Policy
from gpp.planner.options import Options

from .problems import Collected, SettingsError

T = TypeVar("T", bound=str | None)
OnNonfinite = Literal["stop", "skip"]

MOST = (1 << 63) - 1  # of whole numbers, torch's own bound
LARGEST = 1e30  # of other numbers: products of a few are finite
SAMPLES = (1 << 31) - 1  # of a step


@dataclass(frozen=True, slots=True)
class WeightFile:
    """An entry of train.init_from: `strip` is taken off the file's names, `prefix` put before them."""

    file: str
    prefix: str = ""
    strip: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What the `train` group says of checkpoints."""

    checkpoint_every: int | None
    checkpoint_memory: int | None
    checkpoint_keep: int
    checkpoint_folder: str | None
    resume: str | None


@dataclass(frozen=True, kw_only=True)
class TrainSettings(CheckpointSettings):
    """The `train` group."""

    steps: int
    mini_batch: int
    accumulate: int
    micro_batch: int | Literal["auto"]
    seed: int
    init: str
    init_from: tuple[WeightFile, ...]
    init_strict: bool
    freeze: tuple[str, ...]
    verify: bool
    clip_norm: float | None
    log_norm: bool
    ema: float | None
    on_nonfinite: OnNonfinite | None
    max_skips: int
    held_out: float
    log_every: int
    prefetch: int
    elastic: bool
    silence: float
    preempted_exit: int | None

    @property
    def samples(self) -> int:
        """Of one step: `accumulate` mini-batches go through the pipeline before an update."""
        return self.mini_batch * self.accumulate

    @property
    def norm_wanted(self) -> bool:
        """Whether all ranks must learn the global norm, or if all is finite, before they update."""
        return self.clip_norm is not None or self.log_norm or self.on_nonfinite is not None


# The groups in which nothing but this is read; model, data and optimizer are their classes' own, and what a
# planner knows is `planner_settings`' to say.
_LINK = ("latency", "bandwidth")
_KEYS = {
    "train": (*TrainSettings.__annotations__, *CheckpointSettings.__annotations__),
    "cluster": (
        *("name", "devices", "per_host", "memory", "flops", "flops_bf16", "bandwidth", "overhead"),
        *("inside", "between"),
    ),
    "cluster.inside": _LINK,
    "cluster.between": _LINK,
    "cost": ("update_traffic", "path"),
    "emulation": ("slowdown", "message_bytes"),
    "schedule": ("name", "extra_warm_up", "k"),
    "kernels": ("name", "attention"),
    "transport": ("name", "reduce"),
    "precision": ("name", "autocast"),
}
KERNELS = ("eager", "inductor", "triton", "auto")
ATTENTION = ("torch", "triton")
TRANSPORTS = ("auto", "device", "host")
REDUCERS = ("auto", "mpi", "nccl")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}  # as the configuration and as plans call them


def check_keys(config: DictConfig) -> None:
    """Refuse keys that nothing reads: Hydra lets `+train.stepz=3` pass."""
    with Collected() as read:
        for group in _KEYS:
            read(check_group, config, group)


def check_group(config: DictConfig, group: str) -> None:
    """One group of those whose keys are known."""
    node, known = OmegaConf.select(config, group), _KEYS[group]
    if not isinstance(node, DictConfig):
        raise SettingsError(f"{group} must be a group of {', '.join(known)}, it is {node!r}")
    wrong = [str(key) for key in node if key not in known]
    if wrong:
        raise SettingsError(
            *(f"there is no key {group}.{key}; {group} has {', '.join(known)}" for key in wrong)
        )


def check_choices(config: DictConfig) -> None:
    """The groups of which only the name counts."""
    with Collected() as read:
        read(_check_kernels, config)
        read(choice, config, "transport.name", TRANSPORTS)
        read(choice, config, "transport.reduce", REDUCERS)
        read(choice, config, "device", ("auto", "cpu", "cuda", "emulated"))
        read(choice, config, "precision.autocast", ("auto", "cpu", "cuda"))
        read(precision_name, config)


def _check_kernels(config: DictConfig) -> None:
    if choice(config, "kernels.name", KERNELS) in ("triton", "auto"):
        choice(config, "kernels.attention", ATTENTION)
    elif OmegaConf.select(config, "kernels.attention") is not None:
        raise SettingsError(
            f"kernels.attention is read with kernels=triton and auto, it is kernels={config.kernels.name}"
        )


def whole(config: DictConfig, key: str, least: int, most: int = MOST) -> int:
    """An integer of at least `least`, and at most `most`."""
    value = OmegaConf.select(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingsError(f"{key} must be a whole number of at least {least}, it is {_shown(value)}")
    if value > most:
        raise SettingsError(f"{key} must be at most {most}, it is {_shown(value)}")
    return value


def number(config: DictConfig, key: str, *, above: float | None = None, least: float | None = None) -> float:
    """A finite number, larger than `above` or at least `least` if one is given."""
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise SettingsError(f"{key} must be a number, it is {_shown(value)}")
    if abs(value) > LARGEST:
        raise SettingsError(f"{key} must be at most {LARGEST:g}, it is {_shown(value)}")
    if above is not None and value <= above:
        raise SettingsError(f"{key} must be larger than {above:g}, it is {value!r}")
    if least is not None and value < least:
        raise SettingsError(f"{key} must be at least {least:g}, it is {value!r}")
    return float(value)


def choice(config: DictConfig, key: str, known: Sequence[T]) -> T:
    """One of some words, of which null may be one."""
    value = OmegaConf.select(config, key)
    for word in known:
        if value == word:
            return word
    words = ", ".join("null" if word is None else str(word) for word in known)
    raise SettingsError(f"{key} must be one of {words}, it is {value!r}")


def train_settings(config: DictConfig) -> TrainSettings:
    """The `train` group, checked."""
    micro = OmegaConf.select(config, "train.micro_batch")
    clip = OmegaConf.select(config, "train.clip_norm")
    with Collected() as read:
        read(_check_step, config)
        found = TrainSettings(
            steps=read(whole, config, "train.steps", 0),
            mini_batch=read(whole, config, "train.mini_batch", 1),
            accumulate=read(whole, config, "train.accumulate", 1),
            micro_batch="auto" if micro == "auto" else read(whole, config, "train.micro_batch", 1),
            seed=read(whole, config, "train.seed", 0),
            init=read(choice, config, "train.init", ("plain", "recorded")),
            init_from=read(weight_files, config),
            init_strict=read(_switch, config, "train.init_strict"),
            freeze=read(_patterns, config, "train.freeze"),
            verify=read(_switch, config, "train.verify"),
            clip_norm=None if clip is None else read(number, config, "train.clip_norm", above=0.0),
            log_norm=read(_switch, config, "train.log_norm"),
            ema=read(_decay, config),
            on_nonfinite=read(choice, config, "train.on_nonfinite", ("stop", "skip", None)),
            max_skips=read(whole, config, "train.max_skips", 1),
            held_out=read(_share, config, "train.held_out"),
            log_every=read(whole, config, "train.log_every", 1),
            prefetch=read(whole, config, "train.prefetch", 1),
            elastic=read(_switch, config, "train.elastic"),
            silence=read(number, config, "train.silence", above=0.0),
            preempted_exit=read(_exit_code, config),
            **(read(_checkpoint_values, config) or {}),
        )
    return found


def checkpoint_settings(config: DictConfig) -> CheckpointSettings:
    """What the `train` group says of checkpoints, checked."""
    return CheckpointSettings(**_checkpoint_values(config))


def _checkpoint_values(config: DictConfig) -> dict[str, Any]:
    with Collected() as read:
        found = {
            "checkpoint_every": read(_optional_whole, config, "train.checkpoint_every", 1),
            "checkpoint_memory": read(_optional_whole, config, "train.checkpoint_memory", 1),
            "checkpoint_keep": read(whole, config, "train.checkpoint_keep", 1),
            "checkpoint_folder": read(_optional_path, config, "train.checkpoint_folder", "a folder"),
            "resume": read(_optional_path, config, "train.resume", "auto or a checkpoint's path"),
        }
    return found


def _check_step(config: DictConfig) -> None:
    """How the samples of a step go together."""
    mini, times = whole(config, "train.mini_batch", 1), whole(config, "train.accumulate", 1)
    if mini * times > SAMPLES:
        raise SettingsError(
            f"a step has {mini * times} samples, train.mini_batch {mini} times train.accumulate {times}: it "
            f"must have at most {SAMPLES}"
        )
    if OmegaConf.select(config, "train.micro_batch") == "auto":
        return
    micro = whole(config, "train.micro_batch", 1)
    if times == 1:
        Options(mini_batch=mini, micro_batch=micro)
    elif mini * times % micro:
        raise SettingsError(
            f"train.micro_batch {micro} does not divide the {mini * times} samples of a step, "
            f"train.mini_batch {mini} times train.accumulate {times}"
        )


def _share(config: DictConfig, key: str) -> float:
    share = number(config, key)
    if not 0 <= share < 1:
        raise SettingsError(f"{key} must be at least 0 and below 1, it is {share:g}")
    return share


def _optional_whole(config: DictConfig, key: str, least: int) -> int | None:
    return None if OmegaConf.select(config, key) is None else whole(config, key, least)


def _exit_code(config: DictConfig) -> int | None:
    if OmegaConf.select(config, "train.preempted_exit") == "auto":
        return None
    code = whole(config, "train.preempted_exit", 0)
    if code > 125:
        raise SettingsError(f"train.preempted_exit must be auto or from 0 to 125, it is {code}")
    return code


def _optional_path(config: DictConfig, key: str, what: str) -> str | None:
    value = OmegaConf.select(config, key)
    if value is not None and (not isinstance(value, str) or not value):
        raise SettingsError(f"{key} must be {what}, or null, it is {value!r}")
    return value


def _switch(config: DictConfig, key: str) -> bool:
    value = OmegaConf.select(config, key)
    if not isinstance(value, bool):
        raise SettingsError(f"{key} must be true or false, it is {value!r}")
    return value


def _decay(config: DictConfig) -> float | None:
    if OmegaConf.select(config, "train.ema") is None:
        return None
    decay = number(config, "train.ema")
    if not 0 < decay < 1:
        raise SettingsError(
            f"train.ema, the decay of the moving average, must be between 0 and 1, it is {decay:g}"
        )
    return decay


def _patterns(config: DictConfig, key: str) -> tuple[str, ...]:
    value = OmegaConf.select(config, key)
    given = [value] if isinstance(value, str) else OmegaConf.to_object(value) if value is not None else []
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise SettingsError(
            f"{key} must be a list of patterns on parameters' names, [encoder.*], it is {value!r}"
        )
    return tuple(given)


def weight_files(config: DictConfig) -> tuple[WeightFile, ...]:
    """train.init_from: a file, {prefix: file}, or a list of {file, prefix, strip}."""
    value = OmegaConf.select(config, "train.init_from")
    given: Any = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if isinstance(given, str):
        given = [given]
    elif isinstance(given, dict):
        given = [{"file": file, "prefix": prefix} for prefix, file in given.items()]
    try:
        entries = [WeightFile(e) if isinstance(e, str) else WeightFile(**e) for e in given or ()]
    except TypeError:
        entries = [WeightFile(None)]  # type: ignore[arg-type]
    if not all(isinstance(v, str) for e in entries for v in (e.file, e.prefix, e.strip)):
        raise SettingsError(
            "train.init_from must be a safetensors file, {prefix: file, ...}, or a list of {file: ..., "
            f"prefix: ..., strip: ...}}, it is {given!r}"
        )
    return tuple(entries)


def _shown(value: object) -> str:
    """A value in a message: what somebody mistyped may be long."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def own_path(path: str) -> Path:
    """A file that the user names: from where the command was started."""
    return Path(to_absolute_path(path) if HydraConfig.initialized() else path)


def precision_name(config: DictConfig) -> str:
    """precision=, as plans call it."""
    return PRECISIONS[choice(config, "precision.name", tuple(PRECISIONS))]


def costs(config: DictConfig, graph: ComputationGraph | None = None) -> CostModel:
    """The `cost` group: the roofline, or the measured table that cost.path names.

    The table must have been measured for the `graph`, where one is given.
    Raises SettingsError if there is no such file, CostError for what it holds.
    """
    traffic = number(config, "cost.update_traffic", least=0)
    if precision_name(config) == "bfloat16":
        traffic += 1.5  # the updated weights are read, and written in half as many bytes
    if "path" not in config.cost and not OmegaConf.is_missing(config.cost, "path"):
        return Roofline(update_traffic=traffic)
    path = OmegaConf.select(config, "cost.path")
    if not isinstance(path, str):
        raise SettingsError(
            "cost=profiled needs cost.path=costs.json, a file that launch.profile has written"
        )
    file = own_path(path)
    if not file.is_file():
        raise SettingsError(f"there is no costs file {path}")
    try:
        table = costs_from_json(file.read_text())
        if graph is not None:
            table.check(graph)
    except (CostError, UnicodeDecodeError) as error:
        raise CostError(f"{path}: {error}") from None
    return replace(table, update_traffic=traffic)


def policy(config: DictConfig) -> Policy:
    """The `schedule` group."""
    return Policy(
        name=choice(config, "schedule.name", POLICIES),
        extra_warm_up=whole(config, "schedule.extra_warm_up", 0),
    )


def burst(config: DictConfig) -> int:
    """schedule.k: forwards, then backwards, that a stage runs in a row."""
    return whole(config, "schedule.k", 1)


def own_yaml(config: DictConfig) -> str:
    """Everything but Hydra's own node, resolved."""
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    return OmegaConf.to_yaml({key: value for key, value in resolved.items() if key != "hydra"})


def configuration_digest(config: DictConfig) -> str:
    """A digest of the configuration: equal on all ranks, or the run is refused."""
    return hashlib.sha256(own_yaml(config).encode()).hexdigest()[:16]
