from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from gpp.planner.options import Constraints
from launch.planner_settings import KEYS, NAMES, SEARCHED, planner_settings
from launch.problems import SettingsError
from launch.start import CONF


def asked(name: str, *assignments: str) -> DictConfig:
    """A planner's own YAML with some of its keys changed, each given as on the command line."""
    config = OmegaConf.create({"planner": OmegaConf.load(CONF / "planner" / f"{name}.yaml")})
    return OmegaConf.merge(config, OmegaConf.from_dotlist(list(assignments)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_every_planner_has_a_file_with_all_its_keys(name: str) -> None:
    config = asked(name)
    assert tuple(sorted(map(str, config.planner))) == tuple(sorted(KEYS[name]))
    found = planner_settings(config)
    assert (found.name, found.max_replicas, found.constraints) == (name, None, Constraints())
    assert (found.stage_micro_batches, found.bursts) == (False, (1,))
    assert found.switches == (set(SEARCHED) if name == "gpp" else set())


def test_switches_are_on_or_off() -> None:
    found = planner_settings(asked("gpp", "planner.greedy=false", "planner.recompute=true"))
    assert found.switches == set(SEARCHED) - {"greedy"}


def test_graphpipes_own_switches() -> None:
    config = asked("graphpipe", "planner.stage_micro_batches=true", "planner.bursts=[4,1,2,4]")
    found = planner_settings(config)
    assert (found.stage_micro_batches, found.bursts) == (True, (1, 2, 4))


def test_pipers_own_switch() -> None:
    assert not planner_settings(asked("piper")).collapse
    assert planner_settings(asked("piper", "planner.collapse=true")).collapse
    with pytest.raises(SettingsError, match=r"planner.collapse must be true or false, it is 3"):
        planner_settings(asked("piper", "planner.collapse=3"))


def test_constraints() -> None:
    config = asked(
        "gpp",
        "planner.max_replicas=2",
        "planner.constraints.together=[[enc.*,stem],[head]]",
        "planner.constraints.pins={enc.0.*: front, head: 3}",
        "planner.constraints.uncut=[[a,b]]",
        "planner.constraints.replicas={enc.*: 2}",
    )
    found = planner_settings(config)
    assert found.max_replicas == 2
    assert found.constraints == Constraints(
        together=(("enc.*", "stem"), ("head",)),
        pins=(("enc.0.*", "front"), ("head", "3")),
        uncut=(("a", "b"),),
        replicas=(("enc.*", 2),),
    )


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("name", "best", "planner.name must be one of gpp, graphpipe, sequential, pipedream, piper"),
        ("depth", 3, "planner gpp has no key planner.depth; it has name, max_replicas"),
        ("collapse", True, "planner gpp has no key planner.collapse"),
        ("max_replicas", 0, "planner.max_replicas must be a whole number of at least 1"),
        ("eager", "yes", "planner.eager must be true or false, it is 'yes'"),
        ("constraints", [1], "planner.constraints must be a group of together, pins, uncut, replicas"),
        ("constraints.apart", [], "there is no key planner.constraints.apart"),
        ("constraints.together", ["a"], "together must be a list of lists of patterns"),
        ("constraints.together", "a", "together must be a list of lists of patterns, it is 'a'"),
        ("constraints.together", [[]], r"one entry is \[\]"),
        ("constraints.uncut", [["a", "b", "c"]], "uncut must be a list of pairs"),
        ("constraints.pins", ["a"], r"pins must be a table {pattern: label}"),
        ("constraints.pins", {"a": ["b"]}, r"pins must be a table {pattern: label}, a has \['b'\]"),
        ("constraints.replicas", {"a": 0}, "replicas of a must be a whole number of at least 1, it is 0"),
        ("constraints.replicas", {"a": True}, "replicas of a must be a whole number of at least 1"),
    ],
)
def test_what_is_wrong_is_said(key: str, value: Any, message: str) -> None:
    config = asked("gpp")
    OmegaConf.update(config, f"planner.{key}", value, merge=False, force_add=True)
    with pytest.raises(SettingsError, match=message):
        planner_settings(config)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("stage_micro_batches", 1, "planner.stage_micro_batches must be true or false, it is 1"),
        ("bursts", [], r"planner.bursts must be a list of whole numbers of at least 1"),
        ("bursts", [0], r"it is \[0\]"),
        ("bursts", 2, "it is 2"),
    ],
)
def test_what_is_wrong_for_graphpipe_is_said(key: str, value: Any, message: str) -> None:
    config = asked("graphpipe")
    OmegaConf.update(config, f"planner.{key}", value, merge=False)
    with pytest.raises(SettingsError, match=message):
        planner_settings(config)
