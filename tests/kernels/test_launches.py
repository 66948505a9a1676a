"""Counting kernels without a GPU, and without computing anything."""

import pytest
import torch
from torch import Tensor, nn

from kernels.launch import launch
from kernels.launches import launches, with_gradients
from kernels.linear import linear

NETWORK = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU())


def test_operators_of_torch_are_a_kernel_each_and_views_none() -> None:
    assert launches(NETWORK, torch.randn(2, 3, 8)) == {
        "aten.native_layer_norm.default": 1,
        "aten.addmm.default": 1,
        "aten.gelu.default": 1,
    }
    assert not launches(lambda x: torch.empty_like(x.view(-1)[1:].unbind()[0]), torch.randn(3, 2))


def test_backward_is_of_all_that_requires_gradients() -> None:
    forward, both = launches(NETWORK, X := torch.randn(2, 8)), launches(with_gradients(NETWORK), X)
    assert both - forward == {
        "aten.gelu_backward.default": 1,
        "aten.mm.default": 2,  # the norm needs the gradient of its result
        "aten.sum.dim_IntList": 1,
        "aten.native_layer_norm_backward.default": 1,
    }
    for parameter in NETWORK[0].parameters():
        parameter.requires_grad_(False)
    assert launches(with_gradients(NETWORK), X)["aten.mm.default"] == 1
    assert launches(with_gradients(NETWORK), X.requires_grad_())["aten.mm.default"] == 2
    frozen = launches(with_gradients(lambda x: x.sum()), torch.randn(3))
    assert frozen == {"aten.sum.default": 1}


def test_operators_of_this_package_are_the_kernels_that_they_launch() -> None:
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, None, "silu")

    weight = torch.randn(5, 4, requires_grad=True)
    found = launches(with_gradients(layer), torch.randn(3, 4), weight)
    assert found["activation_backward_kernel"] == 1
    assert not any("gpp_kernels" in name for name in found)


def test_nothing_is_written_and_launches_are_real_again() -> None:
    x = torch.zeros(4)
    assert launches(lambda t: t.add_(1), x) == {"aten.add_.Tensor": 1}
    assert torch.equal(x, torch.zeros(4))
    with pytest.raises(AssertionError, match="ran"):
        launch(Kernel(), (1,), x)


class Kernel:
    """A kernel that says that it ran."""

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        raise AssertionError("it ran")
