"""The plan in each mode, and the stash of the halves."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gpp.capture.capture import capture
from gpp.program.build import Hooks, Roots, build_stage, mode_plan
from gpp.program.carve import ProgramError

from .stitched import captured_and_verified, plan_of, programs, run_stages, state_of


class Modes(nn.Module):
    """Evaluation has a head of its own, and reads another value across the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor):
        h = self.a(x)
        z = self.c(self.b(h).relu())
        z = z if self.training else z + h[:, :5]
        metrics = {} if self.training else {"accuracy": (z.argmax(-1) == y).float().mean()}
        return F.cross_entropy(z, y), metrics


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(4, 8), "y": torch.randint(0, 5, (4,))}


def test_each_mode_has_its_own_edges_and_terms() -> None:
    captured = captured_and_verified(Modes(), batch())
    plan = plan_of(captured)
    evaluation = mode_plan(plan, captured.traced.evaluate)
    edges = [[(e.source, e.target) for e in p.stage_graph.edges] for p in (plan, evaluation)]
    assert edges == [[(0, 1), (1, 2)], [(0, 1), (0, 2), (1, 2)]]
    # the loss and the count of labels that it leaves out; evaluation has a metric besides
    assert [len(p.stage_graph.stages[-1].terms) for p in (plan, evaluation)] == [2, 3]
    assert evaluation.stage_graph.stages[0].batch_keys == ("x",)
    assert all(e.gradient_bytes == 0 for e in evaluation.stage_graph.edges)


class Backwards(nn.Module):
    """Evaluation runs the two layers in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.b(self.a(x)) if self.training else self.a(self.b(x))
        return F.cross_entropy(self.c(h), y)


def test_evaluation_against_the_order_of_stages_is_refused() -> None:
    captured = capture(Backwards(), batch())
    with pytest.raises(ProgramError, match=r"evaluation sends .* from stage b back to a"):
        mode_plan(plan_of(captured), captured.traced.evaluate)


def test_evaluation_has_no_backward() -> None:
    captured = capture(Modes(), batch())
    stage = programs(captured, plan_of(captured), 2)[0]
    with pytest.raises(ProgramError, match="no backward"):
        stage.evaluate.sizes[2].backward_input([], [], [])


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.LayerNorm(8))
        self.b = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.LayerNorm(8), nn.Flatten(), nn.Linear(32, 5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.b(self.a(x)), y)


def test_norms_and_convolutions_fall_apart_into_halves() -> None:
    """The input half calls no kernel for a weight, the weight half none for an input."""
    data = {"x": torch.randn(4, 2, 8), "y": torch.randint(0, 5, (4,))}
    model = Normalised()
    captured = captured_and_verified(model, data)
    seen: list[str] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "backward" in func.name() and isinstance(args[-1], list) and type(args[-1][0]) is bool:
                seen.append(f"{func.name().removeprefix('aten::')} {args[-1]}")
            return func(*args, **(kwargs or {}))

    stages = programs(captured, plan_of(captured, None, 4), 4)
    with Spy():
        run_stages(stages, state_of(model), data)
    masks = [line.partition("[")[2] for line in seen]
    assert any(m.startswith("True") for m in masks) and any(m.startswith("False") for m in masks)
    assert not any(m.startswith("True") and "True" in m[4:] for m in masks), seen


class LateReader(nn.Module):
    """Evaluation reads the first layer's weight in the last one too; training does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.c(self.b(self.a(x)))
        return F.cross_entropy(z if self.training else z + self.a.weight[:5, 0], y)


def test_a_copy_that_would_never_learn_is_refused() -> None:
    captured = capture(LateReader(), batch())
    plan = plan_of(captured)
    with pytest.raises(ProgramError, match=r"evaluation reads a\.weight in stage c, training only in a"):
        programs(captured, plan, 2)


def test_compiled_graphs_are_called_before_any_step() -> None:
    captured = capture(Modes(), batch())
    plan = plan_of(captured)
    called: list[fx.GraphModule] = []

    def compile_(module: fx.GraphModule):
        def run(*arguments):
            called.append(module)
            return module(*arguments)

        return run

    build_stage(
        captured.traced,
        plan,
        mode_plan(plan, captured.traced.evaluate),
        1,
        Roots(captured.roots, True),
        train_sizes=[2],
        evaluation_sizes=[2, 1],
        device=torch.device("cpu"),
        hooks=Hooks(compile=compile_, warm_up=True),
    )
    assert len(called) == 3 + 2
