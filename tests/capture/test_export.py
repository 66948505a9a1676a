"""The contract of a module's forward, and what is said of a module that cannot be captured."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture.capture import capture
from gpp.capture.export import CaptureError, export_mode
from gpp.graph import Work

WIDTH, CLASSES = 8, 5


class Returns(nn.Module):
    """A linear layer whose forward returns whatever `make` says of (logits, labels)."""

    def __init__(self, make: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.a, self.make = nn.Linear(WIDTH, CLASSES), make

    def forward(self, x: Tensor, y: Tensor):
        return self.make(self.a(x), y)


def data(samples: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(samples, WIDTH), "y": torch.randint(0, CLASSES, (samples,))}


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda z, y: {"loss": cross_entropy(z, y)}, "returns a dictionary with loss"),
        (lambda z, y: (cross_entropy(z, y), z.sum(), z.mean()), "returns 3 values as its loss"),
        (lambda z, y: F.cross_entropy(z, y, reduction="none"), "not a scalar tensor"),
        (lambda z, y: z, "not a scalar tensor"),
        (lambda z, y: (cross_entropy(z, y), {"top": z.argmax(-1)}), "as its metric 'top'"),
        (lambda z, y: (cross_entropy(z, y), {"one": 1.0}), "as its metric 'one'"),
        (lambda z, y: cross_entropy(z.detach(), y), "depends on no trainable parameter"),
    ],
)
def test_forward_must_keep_the_contract(make: Callable[[Tensor, Tensor], object], says: str) -> None:
    with pytest.raises(CaptureError, match=re.escape(says)) as error:
        capture(Returns(make), data())
    assert "Returns" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pair", [tuple, list])
def test_a_pair_may_be_a_tuple_or_a_list(pair: type) -> None:
    model = Returns(lambda z, y: pair([cross_entropy(z, y), {"m": pair([z.sum(), z.abs().sum()])}]))
    captured = capture(model, data())
    assert [m.name for m in captured.train.metrics] == ["m"]
    assert captured.train.loss.weight is None and captured.train.metrics[0].weight is not None


def test_batch_keys_must_be_those_of_forward() -> None:
    model, batch = Returns(cross_entropy), data()
    with pytest.raises(CaptureError, match=r"key 'z' that Returns.forward does not take; it takes x, y"):
        capture(model, {**batch, "z": batch["x"]})
    with pytest.raises(CaptureError, match="needs 'y', which the data set does not give; it gives x"):
        capture(model, {"x": batch["x"]})
    with pytest.raises(CaptureError, match="samples in dimension 0: its shape is \\(8, 4\\) for 4 samples"):
        capture(model, {**batch, "x": batch["x"].T})
    with pytest.raises(CaptureError, match="samples in dimension 0: its shape is \\(\\)"):
        capture(model, {**batch, "x": torch.tensor(1.0)})


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(CaptureError, match="Returns has no trainable parameter"):
        capture(Returns(cross_entropy).requires_grad_(False), data())


class ReadsValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class FixesBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / float(x.shape[0])


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.a, self.inner = nn.Linear(WIDTH, CLASSES), nn.Sequential(inner)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.inner(self.a(x)), y)


@pytest.mark.parametrize(
    "inner, module, says",
    [
        (ReadsValue(), "inner.0", "control flow depends on the values of a tensor"),
        (FixesBatch(), "inner.0", "turns the batch size into a fixed number"),
        (nn.BatchNorm1d(CLASSES, momentum=None), "inner.0", "depends on the values of a tensor"),
        (torch.jit.script(nn.Linear(CLASSES, CLASSES)), "inner.0", "ScriptModule"),
    ],
)
def test_one_message_names_module_and_place(
    inner: nn.Module, module: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=says) as error:
        capture(Around(inner), data())
    text = str(error.value)
    assert "\n" not in text and text.startswith("Around cannot be captured")
    if says != "turns the batch size into a fixed number":  # noticed after forward has returned
        assert repr(module) in text and "test_export.py:" in text
    out, err = capfd.readouterr()
    assert out == err == ""


def test_model_is_left_as_it_was() -> None:
    model = Around(nn.Dropout(0.5))
    model.eval()
    model.a.train()
    before = {n: m.training for n, m in model.named_modules()}
    state = {n: v.clone() for n, v in model.state_dict().items()}
    capture(model, data())
    assert {n: m.training for n, m in model.named_modules()} == before
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


class OpenEnded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, scale: Tensor | None = None, **rest: Tensor) -> Tensor:
        assert scale is None
        return F.cross_entropy(self.a(x + rest["w"]), rest["y"])


def test_forward_may_take_keywords_and_defaults() -> None:
    model, batch = OpenEnded(), data()
    captured = capture(model, {"w": batch["x"], "y": batch["y"], "x": batch["x"]})
    assert set(captured.traced.train.batch_keys.values()) == {"w", "x", "y"}
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_meta_gives_the_same_operators(device: str) -> None:
    with torch.device(device):
        model = Around(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(CLASSES, CLASSES)))
    captured = capture(model, {k: v.to(device) for k, v in data().items()})
    assert [op.name for op in captured.graph.operators] == ["a", "inner.0.1"]


def test_no_grad_blocks_are_detached_and_inlined() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, n) for n in (WIDTH, WIDTH, CLASSES))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.a(x)
            with torch.no_grad():
                gate = self.b(h).sigmoid()
            return F.cross_entropy(self.c(h * gate), y)

    captured = capture(Block(), data())
    assert [op.name for op in captured.graph.operators] == ["a", "b", "c"]
    crossing = [[(t.name, t.needs_grad) for t in op.outputs] for op in captured.graph.operators]
    assert crossing == [[("linear", True)], [("mul", True)], []]  # the detached value is not sent beside it
    assert captured.graph.operators[1].backward_weight == Work()


def test_autocast_blocks_can_be_cut() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, n) for n in (WIDTH, WIDTH, CLASSES))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.b(self.a(x))
                with torch.autocast("cpu", enabled=False):
                    h = self.c(h.float())
            return F.cross_entropy(h, y)

    captured = capture(Block(), data())
    assert [op.name for op in captured.graph.operators] == ["a", "b", "c"]
    assert [op.outputs[0].dtype for op in captured.graph.operators[:1]] == ["bfloat16"]
    casts = [t.dtype for t in captured.graph.operators[1].outputs]
    assert casts in (["bfloat16"], ["float32"])


def test_keyed_names_do_not_depend_on_other_modules() -> None:
    """A dropout's key comes from its own path and occurrence alone."""

    class Drops(nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            self.a, self.more = nn.Linear(WIDTH, CLASSES), more
            self.first, self.second = nn.Dropout(0.1), nn.Dropout(0.2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = self.first(x) if self.more else x
            return F.cross_entropy(self.second(self.a(x)), y)

    def keys(more: bool) -> list[int]:
        graph = export_mode(Drops(more), data(), training=True, seed=7).module.graph
        return [n.args[1] for n in graph.nodes if "keyed_bits" in str(n.target)]

    assert len(keys(True)) == 2 and keys(True)[1] == keys(False)[0] != keys(True)[0]
