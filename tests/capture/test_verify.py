"""What torch.export drops in silence is found before planning."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpp.capture.capture import capture
from gpp.capture.export import CaptureError
from gpp.capture.verify import verify


class Net(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.layer, self.b = nn.Linear(8, 8), layer or nn.Identity(), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.b(self.layer(self.a(x))), y)


def check(model: nn.Module) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 8), "y": torch.tensor([0, 3, 1, 2])}
    verify(model, batch, capture(model, batch))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


class GradientReversal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Reversed.apply(x)


class TensorHook(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and not torch.compiler.is_exporting():
            x.register_hook(lambda g: 2 * g)
        return x * 1.0


def with_backward_hook() -> nn.Module:
    model = Net()
    model.b.register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))
    return model


@pytest.mark.parametrize("model", [Net(GradientReversal()), Net(TensorHook()), with_backward_hook()])
def test_another_backward_is_refused(model: nn.Module) -> None:
    with pytest.raises(CaptureError, match=r"another gradient for a\.weight") as error:
        check(model)
    assert "\n" not in str(error.value)


def test_forward_hooks_are_captured() -> None:
    model = Net()
    model.a.register_forward_hook(lambda module, inputs, output: output * 2)
    check(model)


class Checkpointed(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = checkpoint(lambda v: self.a(v).relu(), x, use_reentrant=False)
        return F.cross_entropy(self.b(h), y)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1).expand(-1, 3, -1)
        h, _ = self.mha(h, h, h, need_weights=True)
        return self.encoder(h).mean(1)


class Image(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x.view(-1, 2, 2, 2)).flatten(1)


@pytest.mark.parametrize(
    "model",
    [
        Checkpointed(),
        Net(nn.Dropout(0.5)),
        Net(nn.Dropout(0.5, inplace=True)),
        Net(Image(nn.Dropout2d(0.5))),
        Net(Attends()),
        Net(nn.BatchNorm1d(8)),
        Net(nn.Dropout(1.0)),
    ],
)
def test_what_is_the_same_passes_and_leaves_no_trace(model: nn.Module) -> None:
    state = {n: v.clone() for n, v in model.state_dict().items()}
    first, *others = model.parameters()
    first.grad = left = torch.ones_like(first)  # by a user's own backward
    check(model)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert first.grad is left and bool((left == 1).all()) and all(p.grad is None for p in others)
