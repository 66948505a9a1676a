import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from gpp.capture.capture import capture
from gpp.program.carve import carve, interface
from kernels.fuse import Fused, fuse

functional = nn.functional


def exported(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> torch.fx.GraphModule:
    """The model's ATen graph with a dynamic number of samples; parameters are its attributes."""
    x = torch.randn(shape, dtype=dtype)
    shapes = ({0: torch.export.Dim("batch")},)
    module = torch.export.export(model.to(dtype), (x,), dynamic_shapes=shapes).module()
    assert isinstance(module, torch.fx.GraphModule)
    return module


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 24, bias=False)
        self.third = nn.Linear(24, 16)
        self.last = nn.Linear(16, 3)
        self.final = nn.LayerNorm(3, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.first(self.norm(x)), approximate="tanh")
        h = functional.silu(self.second(h))
        h = functional.relu(self.third(h), inplace=True)
        return self.final(self.last(h + x))


def test_a_small_network_keeps_its_numbers() -> None:
    torch.manual_seed(0)
    plain = exported(Network(), 4, 16)
    fused, report = fuse(plain)
    x = torch.randn(6, 16)
    expected, got = plain(x), fused(x)
    torch.testing.assert_close(got, expected)
    parameters = list(plain.parameters())
    assert [id(p) for p in fused.parameters()] == [id(p) for p in parameters]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert [item.operator.split(".")[1] for item in report.fused] == [
        "layer_norm",
        *["linear"] * 3,
        "layer_norm",
    ]
    assert report.fused[1] == Fused("gpp_kernels.linear.default", ("linear", "gelu"), "first")
    assert [item.node for item in report.left] == ["linear_3"]
    assert "a plain product stays with torch" in report.left[0].reason
    text = str(report)
    assert text.startswith("fused 9 nodes to 5, left 1\n")
    assert "  gpp_kernels.linear.default <- linear_2 + relu_ + add in third" in text
    assert "  left linear_3 (aten.linear.default) in last: " in text


def test_training_a_fused_network_equals_training_the_plain_one() -> None:
    torch.manual_seed(0)
    model = Network()
    plain, (fused, _) = exported(model, 4, 16), fuse(exported(copy.deepcopy(model), 4, 16))
    x = torch.randn(8, 16)
    for module in (plain, fused):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_graph_given_is_not_changed() -> None:
    plain = exported(Network(), 4, 16)
    before = str(plain.graph)
    fuse(plain)
    assert str(plain.graph) == before


def test_the_fused_graph_has_the_meta_of_what_it_replaces() -> None:
    plain = exported(Network(), 4, 16)
    fused, _ = fuse(plain)
    node = next(n for n in fused.graph.nodes if "linear" in str(n.target))
    old = next(n for n in plain.graph.nodes if n.name == "gelu")
    assert node.meta["val"] is old.meta["val"] and node.meta["nn_module_stack"] == old.meta["nn_module_stack"]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_both_forms_of_gelu(approximate: str) -> None:
    plain = exported(nn.Sequential(nn.Linear(5, 7), nn.GELU(approximate=approximate)), 4, 5)
    fused, report = fuse(plain)
    assert len(report.fused) == 1 and not report.left
    x = torch.randn(3, 5) * 3
    assert torch.equal(fused(x), plain(x))


def test_bfloat16_is_fused() -> None:
    plain = exported(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU()), 4, 8, dtype=torch.bfloat16)
    fused, report = fuse(plain)
    assert len(report.fused) == 2
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(fused(x), plain(x))


class Losses(nn.Module):
    """Every loss and norm that is a pattern, as plain modules make them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(5)
        self.other = nn.RMSNorm(5, eps=1e-3, elementwise_affine=False)
        self.classes = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1)
        self.binary = nn.BCEWithLogitsLoss()
        self.squares = nn.MSELoss(reduction="sum")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.norm(x) + self.other(x)
        labels = functional.one_hot(y, 5).float()
        likely = functional.cross_entropy(z, y, reduction="none").mean()
        return self.classes(z, y) + self.binary(z, labels) + self.squares(z, x) + likely


def test_losses_and_rms_norms_keep_their_numbers() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    batch = torch.export.Dim("batch")
    exported_program = torch.export.export(Losses(), (x, y), dynamic_shapes=({0: batch}, {0: batch}))
    plain = exported_program.module()
    assert isinstance(plain, torch.fx.GraphModule)
    fused, report = fuse(plain)
    assert [item.operator.split(".")[1] for item in report.fused] == [
        "rms_norm",
        "rms_norm",
        "cross_entropy",
        "cross_entropy",
        "binary_cross_entropy_with_logits",
        "mse_loss",
    ]
    assert not report.left
    x, y = torch.randn(9, 5, requires_grad=True), torch.randint(5, (9,))
    expected, got = plain(x, y), fused(x, y)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        *(torch.autograd.grad(t, (x, *plain.parameters())) for t in (got, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_half_precision_rms_norm_has_torchs_default_eps() -> None:
    plain = exported(nn.RMSNorm(8), 4, 8, dtype=torch.bfloat16)
    fused, report = fuse(plain)
    x = torch.randn(3, 8, dtype=torch.bfloat16) * 1e-3  # so small that eps decides
    assert len(report.fused) == 1 and torch.equal(fused(x), plain(x))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(self.layers(x), y)


def test_the_loss_of_a_captured_stage_is_fused() -> None:
    captured = capture(Classifier(), {"x": torch.randn(4, 8), "y": torch.randint(5, (4,))})
    mode = captured.traced.train
    operators = [operator.name for operator in captured.graph.operators]
    face = interface(mode, operators)
    stage = carve(mode, operators, 4, face.parameters, face.buffers, device=torch.device("cpu"))
    _, report = fuse(stage)
    assert [item.operator.split(".")[1] for item in report.fused] == ["rms_norm", "cross_entropy"]
    assert [item.target for item in report.left] == ["aten.linear.default"] * 2


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return torch.relu(z) + z


class NormOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


LEFT = [
    (TwoReaders(), (4, 4), torch.float32, "2 nodes read its output, an activation must be the only one"),
    (NormOfTwo(), (4, 3, 4), torch.float32, "it normalises 2 dimensions, the operator one"),
    (nn.LayerNorm(4), (4, 4), torch.float64, "its dtype is torch.float64, the kernels compute in float32"),
    (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (4, 4), torch.float32, "no activation follows but tanh"),
]


@pytest.mark.parametrize("model, shape, dtype, reason", LEFT, ids=[case[3][:30] for case in LEFT])
def test_what_does_not_fit_is_left(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, reason: str
) -> None:
    plain = exported(model, *shape, dtype=dtype)
    fused, report = fuse(plain)
    assert not report.fused and len(report.left) == 1
    assert reason in report.left[0].reason
    assert str(fused.graph) == str(plain.graph)


X, LABEL = torch.randn(4, 5), torch.randint(5, (4,))
LEFT_LOSSES: list[tuple[Callable[[], torch.fx.GraphModule], str]] = [
    (
        lambda: traced(lambda x, y: functional.cross_entropy(x, y, weight=x[0]), X, LABEL),
        "it has a weight, the operator none",
    ),
    (
        lambda: traced(lambda x, y: functional.cross_entropy(x[..., None], y[..., None]), X, LABEL),
        "its classes are dimension 1 of 3, the operator takes the last",
    ),
    (
        lambda: traced(lambda x, y: functional.cross_entropy(x, y), X, X.softmax(-1)),
        "cross_entropy: target must be torch.int64 or torch.int32",
    ),
    (
        lambda: traced(
            lambda x, y: functional.binary_cross_entropy_with_logits(x, y, pos_weight=x[0]), X, X.sigmoid()
        ),
        "it has a pos_weight, the operator none",
    ),
    (
        lambda: traced(lambda x, y: functional.mse_loss(x, y), X, X.half()),
        "mse_loss: target must be torch.float32",
    ),
    (
        lambda: traced(lambda x, y: torch.ops.aten.mse_loss(x, y), X, X[:1]),
        "mse_loss: target must have input's shape (4, 5)",
    ),
    (
        lambda: traced(lambda x, y: functional.rms_norm(x.view(2, 2, 5), (2, 5)), X, X),
        "it normalises 2 dimensions, the operator one",
    ),
]


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> torch.fx.GraphModule:
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    assert isinstance(module, torch.fx.GraphModule)
    return module


@pytest.mark.parametrize("make, reason", LEFT_LOSSES, ids=[case[1][:30] for case in LEFT_LOSSES])
def test_losses_that_do_not_fit_are_left(make: Callable[[], torch.fx.GraphModule], reason: str) -> None:
    plain = make()
    fused, report = fuse(plain)
    assert not report.fused and [item.reason.partition(reason)[1] for item in report.left] == [reason]
    assert str(fused.graph) == str(plain.graph)


def test_a_loss_of_an_unknown_target_is_left() -> None:
    plain = traced(lambda x, y: functional.cross_entropy(x, y), X, LABEL)
    next(n for n in plain.graph.nodes if n.name == "y_1").meta.pop("val")
    assert fuse(plain)[1].left[0].reason == "the shape and dtype of y_1 are not known"


def test_a_node_of_unknown_shape_is_left() -> None:
    plain = exported(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 4, 4)
    for node in plain.graph.nodes:
        node.meta.pop("val", None)
    _, report = fuse(plain)
    assert not report.fused and report.left[0].reason == "its shape and dtype are not known"


def test_placeholders_need_no_shape() -> None:
    plain = exported(Network(), 4, 16)
    for node in plain.graph.nodes:
        if node.op != "call_function":
            node.meta.pop("val", None)
    assert len(fuse(plain)[1].fused) == 5


def test_what_the_operator_refuses_is_left() -> None:
    def vector_weight(x: Tensor, weight: Tensor) -> Tensor:
        return torch.relu(functional.linear(x, weight))

    plain = make_fx(vector_weight, pre_dispatch=True)(torch.randn(4, 8), torch.randn(8))
    _, report = fuse(plain)
    assert not report.fused and "weight must have two dimensions" in report.left[0].reason


def test_nodes_of_sub_graphs_are_listed_as_left() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.norm(x)
            return x * 2

    _, report = fuse(exported(Frozen(), 4, 4))
    assert not report.fused
    assert [item.reason.rpartition(" ")[0] for item in report.left] == ["it is inside the sub-graph"]


def test_a_traced_graph_with_placeholders_for_parameters() -> None:
    def stage(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.relu(functional.linear(x, weight, bias))

    inputs = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    plain = make_fx(stage, pre_dispatch=True)(*inputs)
    fused, report = fuse(plain)
    assert [item.nodes for item in report.fused] == [("linear", "relu")]
    assert torch.equal(fused(*inputs), plain(*inputs))


def test_a_joint_trace_of_a_fused_graph_has_separate_gradients() -> None:
    def stage(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.silu(functional.linear(functional.layer_norm(x, (8,)), weight, bias))

    inputs = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    plain = make_fx(stage, pre_dispatch=True)(*inputs)
    fused, _ = fuse(plain)

    def gradients(module: torch.fx.GraphModule, *values: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_() for value in values]
        return torch.autograd.grad(module(*leaves).square().sum(), leaves)

    joint = make_fx(lambda *values: gradients(fused, *values))(*inputs)
    names = [str(n.target).split(".")[1] for n in joint.graph.nodes if "gpp_kernels" in str(n.target)]
    assert names == [
        "layer_norm_forward",
        "linear_keeping",
        "linear_backward_activation",
        "linear_backward_input",
        "linear_backward_weight",
        "linear_backward_bias",
        "layer_norm_backward_input",
    ]
    for got, expected in zip(joint(*inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(got, expected)
