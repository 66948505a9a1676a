"""The configuration as checked records; each reader raises SettingsError naming key, rule and value."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from gpp.cost import CostError, CostModel, Roofline, costs_from_json
from gpp.graph import ComputationGraph
from gpp.plan import POLICIES, Policy
from gpp.topology import Device, DeviceTopology, Link

ALONE = 4  # devices of cluster.devices=auto without MPI


class SettingsError(ValueError):
    """A value of the configuration that cannot be."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """An entry of train.init_from: `strip` is taken off the file's names, `prefix` put before them."""

    file: str
    prefix: str = ""
    strip: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
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
    held_out: float
    log_every: int
    prefetch: int
    elastic: bool
    silence: float
    preempted_exit: int | None
    checkpoint_every: int | None
    checkpoint_keep: int
    checkpoint_folder: str | None
    resume: str | None

    @property
    def samples(self) -> int:
        """Of one step: `accumulate` mini-batches go through the pipeline before an update."""
        return self.mini_batch * self.accumulate

    @property
    def norm_wanted(self) -> bool:
        """Whether all ranks must learn the global norm before they update."""
        return self.clip_norm is not None or self.log_norm


# The groups in which nothing but this is read; model, data and optimizer are their classes' own, and what a
# planner knows is `planner_settings`' to say.
_LINK = ("latency", "bandwidth")
_KEYS = {
    "train": tuple(field.name for field in fields(TrainSettings)),
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
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}  # as the configuration and as plans call them


def check_keys(config: DictConfig) -> None:
    """Refuse a key that nothing reads: Hydra lets `+train.stepz=3` pass."""
    for group, known in _KEYS.items():
        node = OmegaConf.select(config, group)
        if not isinstance(node, DictConfig):
            raise SettingsError(f"{group} must be a group of {', '.join(known)}, it is {node!r}")
        for key in map(str, node):
            if key not in known:
                raise SettingsError(f"there is no key {group}.{key}; {group} has {', '.join(known)}")


def check_choices(config: DictConfig) -> None:
    """The groups of which only the name counts."""
    if choice(config, "kernels.name", KERNELS) in ("triton", "auto"):
        choice(config, "kernels.attention", ATTENTION)
    elif OmegaConf.select(config, "kernels.attention") is not None:
        raise SettingsError(
            f"kernels.attention is read with kernels=triton and auto, it is kernels={config.kernels.name}"
        )
    choice(config, "transport.name", ("auto", "device", "host"))
    choice(config, "transport.reduce", ("auto", "mpi", "nccl"))
    choice(config, "device", ("auto", "cpu", "cuda", "emulated"))
    choice(config, "precision.autocast", ("auto", "cpu", "cuda"))
    precision_name(config)


def whole(config: DictConfig, key: str, least: int) -> int:
    """An integer of at least `least`."""
    value = OmegaConf.select(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingsError(f"{key} must be a whole number of at least {least}, it is {value!r}")
    return value


def number(config: DictConfig, key: str, *, above: float | None = None, least: float | None = None) -> float:
    """A finite number, larger than `above` or at least `least` if one is given."""
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SettingsError(f"{key} must be a number, it is {value!r}")
    if above is not None and value <= above:
        raise SettingsError(f"{key} must be larger than {above:g}, it is {value!r}")
    if least is not None and value < least:
        raise SettingsError(f"{key} must be at least {least:g}, it is {value!r}")
    return float(value)


def choice(config: DictConfig, key: str, known: Sequence[str]) -> str:
    """One of some words."""
    value = OmegaConf.select(config, key)
    if value not in known:
        raise SettingsError(f"{key} must be one of {', '.join(known)}, it is {value!r}")
    return str(value)


def train_settings(config: DictConfig) -> TrainSettings:
    """The `train` group, checked."""
    micro = OmegaConf.select(config, "train.micro_batch")
    clip = OmegaConf.select(config, "train.clip_norm")
    share = number(config, "train.held_out")
    if not 0 <= share < 1:
        raise SettingsError(f"train.held_out must be at least 0 and below 1, it is {share:g}")
    found = TrainSettings(
        steps=whole(config, "train.steps", 0),
        mini_batch=whole(config, "train.mini_batch", 1),
        accumulate=whole(config, "train.accumulate", 1),
        micro_batch="auto" if micro == "auto" else whole(config, "train.micro_batch", 1),
        seed=_seed(config),
        init=choice(config, "train.init", ("plain", "recorded")),
        init_from=_weight_files(config),
        init_strict=_switch(config, "train.init_strict"),
        freeze=_patterns(config, "train.freeze"),
        verify=_switch(config, "train.verify"),
        clip_norm=None if clip is None else number(config, "train.clip_norm", above=0.0),
        log_norm=_switch(config, "train.log_norm"),
        ema=_decay(config),
        held_out=share,
        log_every=whole(config, "train.log_every", 1),
        prefetch=whole(config, "train.prefetch", 1),
        elastic=_switch(config, "train.elastic"),
        silence=number(config, "train.silence", above=0.0),
        preempted_exit=_exit_code(config),
        checkpoint_every=_optional_whole(config, "train.checkpoint_every", 1),
        checkpoint_keep=whole(config, "train.checkpoint_keep", 1),
        checkpoint_folder=_optional_path(config, "train.checkpoint_folder", "a folder"),
        resume=_optional_path(config, "train.resume", "auto or a checkpoint's path"),
    )
    if found.accumulate > 1 and found.micro_batch != "auto" and found.samples % found.micro_batch:
        raise SettingsError(
            f"train.micro_batch {found.micro_batch} does not divide the {found.samples} samples of a step, "
            f"train.mini_batch {found.mini_batch} times train.accumulate {found.accumulate}"
        )
    return found


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


def _weight_files(config: DictConfig) -> tuple[WeightFile, ...]:
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


def own_path(path: str) -> Path:
    """A file that the user names: from where the command was started."""
    return Path(to_absolute_path(path) if HydraConfig.initialized() else path)


def precision_name(config: DictConfig) -> str:
    """precision=, as plans call it."""
    return PRECISIONS[choice(config, "precision.name", tuple(PRECISIONS))]


def _seed(config: DictConfig) -> int:
    seed = whole(config, "train.seed", 0)
    if seed >= 1 << 63:
        raise SettingsError(f"train.seed must be below 2**63, it is {seed}")
    return seed


def device_count(config: DictConfig, world: int | None) -> int:
    """cluster.devices: `auto` is the world's size under MPI, else ALONE. Raises if the world is too small."""
    value = OmegaConf.select(config, "cluster.devices")
    if value == "auto":
        return ALONE if world is None else world
    count = whole(config, "cluster.devices", 1)
    if world is not None and count > world:
        raise SettingsError(
            f"cluster.devices is {count}, but there are {world} MPI ranks, one a device: start {count} ranks "
            "or leave cluster.devices=auto"
        )
    return count


def topology(config: DictConfig, count: int, hosts: Sequence[str] | None) -> DeviceTopology:
    """The `cluster` group for `count` devices; `hosts` names each rank's host under MPI."""
    name = str(config.cluster.name)
    device = Device(
        name=name,
        memory=number(config, "cluster.memory", above=0),
        flops=_rate(config),
        bandwidth=number(config, "cluster.bandwidth", above=0),
        overhead=number(config, "cluster.overhead", least=0),
    )
    return DeviceTopology(
        name=name,
        devices=(device,) * count,
        per_host=_per_host(config, count, hosts),
        inside=_link(config, "cluster.inside"),
        between=_link(config, "cluster.between"),
    )


def _rate(config: DictConfig) -> float:
    """FLOPs per second of matrix products in the precision that is asked for; what else is computed is bound
    by memory."""
    low = precision_name(config) == "bfloat16" and OmegaConf.select(config, "cluster.flops_bf16") is not None
    return number(config, "cluster.flops_bf16" if low else "cluster.flops", above=0)


def _link(config: DictConfig, key: str) -> Link:
    return Link(
        latency=number(config, f"{key}.latency", least=0),
        bandwidth=number(config, f"{key}.bandwidth", above=0),
    )


def _per_host(config: DictConfig, count: int, hosts: Sequence[str] | None) -> int:
    """Devices of one host, checked against where the ranks are."""
    wanted = OmegaConf.select(config, "cluster.per_host")
    found = None
    if hosts is not None:
        counts = {host: list(hosts).count(host) for host in hosts}
        found = max(counts.values())
    if wanted == "auto":
        return min(count, found or count)
    given = whole(config, "cluster.per_host", 1)
    if found is not None and len(set(hosts or ())) > 1 and found != given:
        raise SettingsError(
            f"cluster.per_host is {given}, but the fullest host has {found} ranks: start {given} ranks a "
            "host or set cluster.per_host=auto"
        )
    return given


def costs(config: DictConfig, graph: ComputationGraph | None = None) -> CostModel:
    """The `cost` group: the roofline, or the measured table that cost.path names.

    The file is read for a `graph`, which it must have been measured for; else only the keys are checked.
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
    if graph is None:
        return Roofline(update_traffic=traffic)
    file = own_path(path)
    if not file.is_file():
        raise SettingsError(f"there is no costs file {path}")
    try:
        table = costs_from_json(file.read_text())
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
