import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from gpp.api.optimizer import optimizer_factor
from launch.objects import chosen, data_object, dataset, locate, model_builder
from launch.optimizers import optimizer_maker
from launch.plans import state_factor
from launch.problems import SettingsError

from .commands import foreign


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(foreign(tmp_path)))
    monkeypatch.delitem(sys.modules, "my_package", raising=False)


def config(**model: Any) -> Any:
    return OmegaConf.create({"size": 8, "model": {"_target_": "old.Model", "layers": 2, **model}})


def test_another_target_drops_the_arguments_of_the_old_one() -> None:
    node = config(_target_="my_package.One", outputs=3)
    assert chosen(node, "model", []) == {"_target_": "my_package.One", "layers": 2, "outputs": 3}
    assert chosen(node, "model", ["model._target_=my_package.One"]) == {"_target_": "my_package.One"}
    lines = ["model._target_=my_package.One", "+model.outputs=3"]
    assert chosen(node, "model", lines) == {"_target_": "my_package.One", "outputs": 3}
    assert chosen(node, "model", ["model=mmt", *lines])["layers"] == 2
    assert "layers" not in chosen(node, "model", ["model._target_=my_package.One", "~model.heads"])


def test_interpolations_reach_out_of_the_group() -> None:
    node = config(_target_="torch.nn.Linear", in_features="${size}", out_features="${model.in_features}")
    assert chosen(node, "model", [])["out_features"] == 8


@pytest.mark.parametrize("target", [None, ""])
def test_no_target(target: str | None) -> None:
    with pytest.raises(SettingsError, match=r"model._target_ is missing: name a class"):
        chosen(config(_target_=target), "model", [])


def test_a_model_is_built_with_its_arguments() -> None:
    made = model_builder({"_target_": "my_package.One", "outputs": 3})()
    assert isinstance(made, nn.Module) and made.only.out_features == 3
    nested = model_builder({"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU"}]})()
    assert isinstance(nested, nn.Sequential) and isinstance(nested[0], nn.ReLU)


def test_the_message_is_the_users_own_not_its_cause() -> None:
    with pytest.raises(SettingsError, match=r"RuntimeError: weights not found \(.*my_package.py:\d+\)$"):
        model_builder({"_target_": "my_package.Raises"})()


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.Net", "there is no module 'nowhere'"),
        ("nowhere", "there is no module 'nowhere'"),
        ("torch.nn.modules.nope.Net", r"torch.nn.modules \(.*\) has no nope"),
        ("my_package.MyNet.nope", "my_package.MyNet has no nope"),
        ("my_package", "is no class but module"),
        ("broken.Net", "broken.Net cannot be imported: SyntaxError"),
        ("needy.Net", "needy.Net cannot be imported: ModuleNotFoundError: No module named 'nee'"),
    ],
)
def test_locate_says_which_part_is_missing(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("class Net(\n")
    (tmp_path / "needy.py").write_text("import nee\n")
    with pytest.raises(SettingsError, match=message):
        locate(name, "model")


def test_locate_finds_nested_names() -> None:
    assert locate("torch.nn.Linear", "model") is nn.Linear
    assert locate("torch.nn.Linear.forward", "model") is nn.Linear.forward


@pytest.mark.parametrize(
    "arguments, keys",
    [
        ({"_target_": "my_package.MyData"}, ("a", "b", "y")),
        ({"_target_": "my_package.Tuples"}, ("a", "b", "y")),
        ({"_target_": "my_package.Tuples", "keys": ["b", "a", "y"]}, ("b", "a", "y")),
        ({"_target_": "my_package.Extra", "keys": ["a", "b", "y"]}, ("a", "b", "y")),
        ({"_target_": "my_package.MyData", "keys": None}, ("a", "b", "y")),
    ],
)
def test_data_sets_of_dictionaries_and_tuples(arguments: dict[str, Any], keys: tuple[str, ...]) -> None:
    model = model_builder({"_target_": "my_package.MyNet"})()
    data = dataset(data_object(arguments), arguments, model)
    assert data.keys == keys
    assert data.read([5, 7], data.keys)[keys[0]].shape == (2, 8)


def test_keys_must_be_a_list() -> None:
    model = model_builder({"_target_": "my_package.MyNet"})()
    with pytest.raises(SettingsError, match=r"data.keys must be a list of names"):
        dataset([0], {"_target_": "my_package.MyData", "keys": "aby"}, model)


def test_an_optimizer_must_be_one() -> None:
    with pytest.raises(SettingsError, match=r"is not a torch.optim.Optimizer"):
        optimizer_factor(optimizer_maker({"_target_": "torch.nn.ParameterList"}))


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("Adam", {}),
        ("AdamW", {"amsgrad": True}),
        ("Adamax", {}),
        ("NAdam", {}),
        ("RAdam", {}),
        ("Adadelta", {}),
        ("Adagrad", {}),
        ("RMSprop", {}),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
    ],
)
def test_the_state_of_an_optimizer_is_known_without_torch(name: str, arguments: dict[str, Any]) -> None:
    node = {"_target_": f"torch.optim.{name}", **arguments}
    assert state_factor(node) == optimizer_factor(optimizer_maker(node))


def test_an_optimizers_first_step_is_on_a_parameter_of_the_probe() -> None:
    make = optimizer_maker({"_target_": "torch.optim.SGD", "lr": 0.5})
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make([("weight", parameter)])
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameter.tolist() == [0.5, 0.5]
