"""The `planner` group as a checked record: which planner, what it may choose, what the user has decided."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from gpp.planner.options import Constraints

from .problems import Collected, SettingsError
from .settings import choice, whole

SEARCHED = ("eager", "split_backward", "greedy", "recompute", "shard_optimizer", "colocate")
SCHEDULES = frozenset(SEARCHED[:3])  # those that choose another schedule
_COMMON = ("name", "max_replicas", "constraints")
_CONFIGURED = ("stage_micro_batches", "bursts")  # of graphpipe, whose plan gpp takes as it is
KEYS: Mapping[str, tuple[str, ...]] = {
    "gpp": (*_COMMON, *SEARCHED, *_CONFIGURED),
    "graphpipe": (*_COMMON, *_CONFIGURED),
    "sequential": _COMMON,
    "pipedream": _COMMON,
    "piper": (*_COMMON, "collapse"),
}
NAMES = tuple(KEYS)
_CONSTRAINTS = ("together", "pins", "uncut", "replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    """The `planner` group. `switches` are those of `SEARCHED` that are on."""

    name: str
    max_replicas: int | None
    constraints: Constraints
    stage_micro_batches: bool
    bursts: tuple[int, ...]
    collapse: bool
    switches: frozenset[str]


def planner_settings(config: DictConfig) -> PlannerSettings:
    """The `planner` group, checked; a key that the chosen planner does not know is refused."""
    with Collected() as read:
        name = read(choice, config, "planner.name", NAMES)
        read(_check_keys, config)
        found = PlannerSettings(
            name=name,
            max_replicas=read(max_replicas, config),
            constraints=read(constraints, config),
            stage_micro_batches=read(_flag, config, "planner.stage_micro_batches"),
            bursts=read(_bursts, config),
            collapse=read(_flag, config, "planner.collapse"),
            switches=frozenset(key for key in SEARCHED if read(_flag, config, f"planner.{key}")),
        )
    return found


def _check_keys(config: DictConfig) -> None:
    name = choice(config, "planner.name", NAMES)
    unknown = [str(key) for key in config.planner if key not in KEYS[name]]
    if unknown:
        known = ", ".join(KEYS[name])
        raise SettingsError(*(f"planner {name} has no key planner.{key}; it has {known}" for key in unknown))


def max_replicas(config: DictConfig) -> int | None:
    """planner.max_replicas: devices that may share one stage; None for any number."""
    key = "planner.max_replicas"
    return None if OmegaConf.select(config, key) is None else whole(config, key, 1)


def constraints(config: DictConfig) -> Constraints:
    """planner.constraints; what is left out or null decides nothing."""
    key = "planner.constraints"
    node = OmegaConf.select(config, key)
    if node is None:
        return Constraints()
    if not isinstance(node, DictConfig):
        raise SettingsError(f"{key} must be a group of {', '.join(_CONSTRAINTS)}, it is {node!r}")
    with Collected() as read:
        read(_check_names, node, key)
        found = Constraints(
            together=read(_together, node),
            pins=read(_pins, node),
            uncut=read(_uncut, node),
            replicas=read(_replicas, node),
        )
    return found


def _check_names(node: DictConfig, key: str) -> None:
    unknown = [str(name) for name in node if name not in _CONSTRAINTS]
    if unknown:
        known = ", ".join(_CONSTRAINTS)
        raise SettingsError(*(f"there is no key {key}.{name}; {key} has {known}" for name in unknown))


def _together(node: DictConfig) -> tuple[tuple[str, ...], ...]:
    return tuple(_words(group, "planner.constraints.together", 1) for group in _list(node, "together"))


def _pins(node: DictConfig) -> tuple[tuple[str, str], ...]:
    return tuple((pattern, str(label)) for pattern, label in _table(node, "pins", "{pattern: label}"))


def _uncut(node: DictConfig) -> tuple[tuple[str, str], ...]:
    return tuple(_pair(pair) for pair in _list(node, "uncut"))


def _replicas(node: DictConfig) -> tuple[tuple[str, int], ...]:
    found = _table(node, "replicas", "{pattern: number}")
    for pattern, count in found:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise SettingsError(
                f"planner.constraints.replicas of {pattern} must be a whole number of at least 1, it is "
                f"{count!r}"
            )
    return tuple(found)


def _list(node: DictConfig, name: str) -> list[Any]:
    value = node.get(name)
    if value is None:
        return []
    if not isinstance(value, ListConfig):
        raise SettingsError(
            f"planner.constraints.{name} must be a list of lists of patterns, it is {value!r}"
        )
    found = OmegaConf.to_container(value, resolve=True)
    assert isinstance(found, list)
    return found


def _words(value: Any, key: str, least: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < least or not all(isinstance(w, str) for w in value):
        raise SettingsError(
            f"{key} must be a list of lists of patterns, [[enc.*, head]], one entry is {value!r}"
        )
    return tuple(value)


def _pair(value: Any) -> tuple[str, str]:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value):
        return value[0], value[1]
    raise SettingsError(
        f"planner.constraints.uncut must be a list of pairs, [[producer, consumer]], one entry is {value!r}"
    )


def _table(node: DictConfig, name: str, form: str) -> list[tuple[str, Any]]:
    value = node.get(name)
    if value is None:
        return []
    if not isinstance(value, DictConfig):
        raise SettingsError(f"planner.constraints.{name} must be a table {form}, it is {value!r}")
    resolved: Any = OmegaConf.to_container(value, resolve=True)
    found = {str(pattern): entry for pattern, entry in resolved.items()}
    wrong = [pattern for pattern, entry in found.items() if isinstance(entry, dict | list) or entry is None]
    if wrong:
        raise SettingsError(
            f"planner.constraints.{name} must be a table {form}, {wrong[0]} has {found[wrong[0]]!r}"
        )
    return list(found.items())


def _flag(config: DictConfig, key: str) -> bool:
    value = OmegaConf.select(config, key, default=False)
    if not isinstance(value, bool):
        raise SettingsError(f"{key} must be true or false, it is {value!r}")
    return value


def _bursts(config: DictConfig) -> tuple[int, ...]:
    key = "planner.bursts"
    value = OmegaConf.select(config, key, default=[1])
    entries = list(value) if isinstance(value, list | ListConfig) else []
    if not entries or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in entries):
        raise SettingsError(f"{key} must be a list of whole numbers of at least 1, [1,2], it is {value!r}")
    return tuple(sorted(set(entries)))
