from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from launch import cluster, settings
from launch.problems import SettingsError
from launch.settings import WeightFile, check_choices, check_keys
from launch.start import CONF

GROUPS = ("model/mmt", "data/stdlib", "cluster/local", "cost/roofline", "planner/graphpipe", "schedule/1f1b")
GROUPS += ("kernels/eager", "transport/auto", "optimizer/adamw", "lr_scheduler/none", "precision/fp32")


def configuration(**changes: Any) -> DictConfig:
    """The default configuration, read without Hydra; changes have dots as two underscores."""
    config = OmegaConf.load(CONF / "config.yaml")
    assert isinstance(config, DictConfig)
    del config["defaults"], config["hydra"]
    groups = {name.split("/")[0]: OmegaConf.load(CONF / f"{name}.yaml") for name in GROUPS}
    merged = OmegaConf.merge(groups, config)
    assert isinstance(merged, DictConfig)
    for key, value in changes.items():
        OmegaConf.update(merged, key.replace("__", "."), value, force_add=True)
    return merged


def test_the_default_configuration_is_valid() -> None:
    config = configuration()
    check_keys(config)
    check_choices(config)
    found = settings.train_settings(config)
    assert (found.steps, found.mini_batch, found.micro_batch) == (180, 128, "auto")
    assert (found.clip_norm, found.held_out, found.verify) == (None, 0.1, True)
    assert settings.policy(config).name == "1f1b"
    assert settings.costs(config).update_traffic == 7.0


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("train__steps", -1, "train.steps must be a whole number of at least 0, it is -1"),
        ("train__steps", True, "it is True"),
        ("train__steps", 1.5, "it is 1.5"),
        ("train__steps", None, "it is None"),
        ("train__mini_batch", 0, "at least 1, it is 0"),
        ("train__micro_batch", "all", "train.micro_batch must be a whole number"),
        ("train__clip_norm", 0, "train.clip_norm must be larger than 0"),
        ("train__clip_norm", float("nan"), "must be a number, it is nan"),
        ("train__clip_norm", float("inf"), "must be a number, it is inf"),
        ("train__held_out", 1, "train.held_out must be at least 0 and below 1"),
        ("train__init", "fast", "train.init must be one of plain, recorded"),
        ("train__verify", "yes", "train.verify must be true or false"),
        ("train__seed", -1, "train.seed"),
        ("train__log_every", 0, "train.log_every"),
        ("train__accumulate", 0, "train.accumulate must be a whole number of at least 1"),
        ("train__ema", 1.0, "train.ema, the decay of the moving average, must be between 0 and 1, it is 1"),
        ("train__log_norm", "no", "train.log_norm must be true or false"),
        (
            "train__checkpoint_every",
            0,
            "train.checkpoint_every must be a whole number of at least 1",
        ),
        ("train__checkpoint_keep", None, "train.checkpoint_keep must be a whole number of at least 1"),
        ("train__checkpoint_folder", 3, "train.checkpoint_folder must be a folder, or null, it is 3"),
        ("train__resume", True, "train.resume must be auto or a checkpoint's path, or null, it is True"),
        ("train__init_strict", 1, "train.init_strict must be true or false"),
        ("train__freeze", [3], "train.freeze must be a list of patterns"),
        ("train__init_from", 3, "train.init_from must be a safetensors file, {prefix: file, ...}, or a list"),
        ("train__init_from", [{"prefix": "a."}], "train.init_from must be a safetensors file"),
        ("train__init_from", [{"file": "a", "rename": "b"}], "train.init_from must be a safetensors file"),
        ("train__prefetch", 0, "train.prefetch"),
    ],
)
def test_train_settings_say_key_rule_and_value(key: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings.train_settings(configuration(**{key: value}))


@pytest.mark.parametrize(
    "key, message",
    [
        ("train__stepz", "there is no key train.stepz; train has steps, mini_batch"),
        ("cluster__inside__speed", "no key cluster.inside.speed; cluster.inside has latency, bandwidth"),
        ("schedule__depth", "no key schedule.depth"),
    ],
)
def test_a_key_that_nothing_reads(key: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_keys(configuration(**{key: 1}))


def test_models_data_and_optimizers_may_have_any_key() -> None:
    check_keys(configuration(model__depth=3, data__path="x", optimizer__fused=True, width=64))


@pytest.mark.parametrize(
    "value, files",
    [
        (None, ()),
        ("a.safetensors", (WeightFile("a.safetensors"),)),
        ({"text.": "a", "image.": "b"}, (WeightFile("a", "text."), WeightFile("b", "image."))),
        (["a", {"file": "b", "prefix": "p.", "strip": "s."}], (WeightFile("a"), WeightFile("b", "p.", "s."))),
    ],
)
def test_weights_come_from_files_in_several_ways(value: Any, files: tuple[WeightFile, ...]) -> None:
    assert settings.train_settings(configuration(train__init_from=value)).init_from == files


def test_a_step_has_the_samples_of_all_its_parts() -> None:
    found = settings.train_settings(configuration(train__accumulate=3, train__freeze="a.*"))
    assert (found.mini_batch, found.samples, found.freeze) == (128, 384, ("a.*",))


def test_the_rate_of_a_device_is_that_of_the_precision() -> None:
    low = configuration(precision__name="bf16")
    assert cluster.topology(low, 1, None).devices[0].flops == low.cluster.flops_bf16
    assert cluster.topology(configuration(), 1, None).devices[0].flops == low.cluster.flops
    without = configuration(precision__name="bf16", cluster__flops_bf16=None)
    assert cluster.topology(without, 1, None).devices[0].flops == low.cluster.flops


@pytest.mark.parametrize(
    "key",
    [
        *("kernels__name", "transport__name", "transport__reduce", "device"),
        *("precision__name", "precision__autocast"),
    ],
)
def test_choices(key: str) -> None:
    with pytest.raises(SettingsError, match=f"{key.replace('__', '.')} must be one of .*, it is 'other'"):
        check_choices(configuration(**{key: "other"}))


@pytest.mark.parametrize("name", ["triton", "auto", "eager"])
def test_only_own_kernels_have_a_choice_of_attention(name: str) -> None:
    read = name != "eager"
    good = configuration(kernels__name=name, **({"kernels__attention": "triton"} if read else {}))
    check_keys(good)
    check_choices(good)
    says = "kernels.attention must be one of torch, triton" if read else "read with kernels=triton and auto"
    with pytest.raises(SettingsError, match=says):
        check_choices(configuration(kernels__name=name, kernels__attention="other"))


@pytest.mark.parametrize(
    "value, world, count",
    [("auto", None, 4), ("auto", 3, 3), (2, 3, 2), (3, 3, 3), (7, None, 7)],
)
def test_device_count(value: Any, world: int | None, count: int) -> None:
    assert cluster.device_count(configuration(cluster__devices=value), world) == count


def test_more_devices_than_ranks_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"cluster.devices is 4, but there are 3 MPI ranks"):
        cluster.device_count(configuration(cluster__devices=4), 3)


def test_topology_follows_the_hosts() -> None:
    alone = cluster.topology(configuration(), 4, None)
    assert (len(alone.devices), alone.per_host) == (4, 4)
    assert cluster.topology(configuration(), 4, ("a", "a", "b", "b")).per_host == 2
    assert cluster.topology(configuration(), 1, ("a", "a")).per_host == 1
    assert cluster.topology(configuration(cluster__per_host=2), 4, None).per_host == 2
    with pytest.raises(SettingsError, match=r"cluster.per_host is 1, but the fullest host has 2 ranks"):
        cluster.topology(configuration(cluster__per_host=1), 4, ("a", "a", "b", "b"))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("cluster__memory", 0, "cluster.memory must be larger than 0"),
        ("cluster__overhead", -1, "cluster.overhead must be at least 0"),
        ("cluster__flops", "fast", "cluster.flops must be a number"),
        ("cluster__between__bandwidth", 0, "cluster.between.bandwidth must be larger than 0"),
    ],
)
def test_topology_says_what_is_wrong(key: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        cluster.topology(configuration(**{key: value}), 4, None)


def test_the_digest_sees_everything_but_hydras_own() -> None:
    digest = settings.configuration_digest
    assert digest(configuration()) == digest(configuration(hydra__job__num=3))
    assert digest(configuration()) != digest(configuration(train__seed=1))
    assert "hydra" not in settings.own_yaml(configuration(hydra__job__num=3))
