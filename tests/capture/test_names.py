"""Parameters by patterns."""

import pytest
from torch import nn

from gpp.capture.export import CaptureError
from gpp.capture.names import freeze, group_index, matching, names_of, without_decay
from tests.equality import models


def test_every_name_of_a_tied_parameter_counts() -> None:
    model = models.Tied()
    assert names_of(model)["a.weight"] == ("a.weight", "d.weight")
    assert matching(model, ["d.*"], "key") == ["a.weight"]
    freeze(model, ["d.*"])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["a.weight"]


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(CaptureError, match=r"train.freeze: the pattern 'e.\*' matches no parameter of Chain"):
        freeze(models.Chain(), ["a.*", "e.*"])


def test_the_first_group_that_matches_has_the_parameter() -> None:
    index = group_index(models.Chain(), [["*.bias"], ["a.*", "d.*"]], [])
    assert index["a.0.bias"] == 1 and index["a.0.weight"] == 2 and index["d.bias"] == 1
    assert "b.0.weight" not in index
    with pytest.raises(CaptureError, match=r"optimizer.groups\[1\]: the pattern 'nope'"):
        group_index(models.Chain(), [["*.bias"], ["nope"]], [])


def test_norms_are_known_by_their_modules() -> None:
    model = nn.ModuleDict({"first": nn.BatchNorm1d(3), "ln": nn.LayerNorm(3), "norm_free": nn.Linear(3, 3)})
    assert without_decay(model, ["norms"]) == ["first.weight", "first.bias", "ln.weight", "ln.bias"]
    assert without_decay(model, ["biases"]) == ["first.bias", "ln.bias", "norm_free.bias"]
    index = group_index(model, [["ln.*"]], ["norms"])
    assert (index["ln.weight"], index["first.weight"], index.get("norm_free.weight", 0)) == (1, 2, 0)
