"""A stage's parameters and gradients between steps."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from gpp.plan import Shared, StageGraph
from gpp.program.stage import StageFunctions, StageProgram, TrainFunctions
from gpp.program.weights import WeightCast
from gpp.runtime.loopback import LoopbackWorld, run
from gpp.runtime.state import Clipping, StageState

NONE = StageFunctions((), (), (), (), (), (), {})


def make(names: tuple[str, ...], clip: float | None = None, shared: tuple[str, ...] = ()) -> StageState:
    program = StageProgram(0, names, (True,) * len(names), (), NONE, NONE)
    tied = (Shared(shared, 12, (0,)),) if shared else ()
    graph = StageGraph.__new__(StageGraph)
    object.__setattr__(graph, "shared", tied)
    values = {name: torch.full((3,), float(i + 1)) for i, name in enumerate(names)}
    clipping = None if clip is None else Clipping(clip, ("a", "b", "c"))
    return StageState(
        [program], graph, values, lambda named: torch.optim.SGD([p for _, p in named], lr=1.0), clipping
    )


def add(state: StageState, gradients: Sequence[torch.Tensor | None]) -> None:
    """One micro-batch's gradients, as a stage's weight half adds them."""
    for total, gradient in zip(state.sums[0], gradients, strict=True):
        if gradient is not None:
            total.add_(gradient)
    state.reach(0, [gradient is not None for gradient in gradients])


def test_a_parameter_that_no_gradient_reaches_is_left_alone() -> None:
    """As torch does with grad None: no weight decay, no momentum."""
    state = make(("a", "b"))
    state.optimizer = torch.optim.SGD(state.parameters.values(), lr=1.0, weight_decay=0.5)
    add(state, [torch.ones(3), None])
    state.update()
    assert torch.equal(state.parameters["b"], torch.full((3,), 2.0))
    assert torch.equal(state.parameters["a"], torch.full((3,), 1.0 - 1.0 - 0.5))


def test_gradients_are_summed_scaled_and_cleared() -> None:
    state = make(("a",))
    add(state, [torch.ones(3)])
    add(state, [torch.ones(3)])
    state.scale(4.0)
    state.update()
    assert torch.equal(state.parameters["a"], torch.full((3,), 0.5))
    assert torch.equal(state.gradients["a"], torch.zeros(3))


@pytest.mark.parametrize("bound", [0.1, 1e6])
def test_clipping_over_ranks_is_torchs_own(bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(3, generator=generator) for name in "abc"}

    def rank(comm) -> tuple[float | None, dict[str, torch.Tensor]]:
        names = ("a", "c") if comm.rank == 0 else ("b",)
        state = make(names, bound)
        add(state, [gradients[name] for name in names])
        state.gather_norms(comm, (0, 1))
        return state.update(), {n: p.detach() for n, p in state.parameters.items()}

    results = run(LoopbackWorld(2), rank)
    whole = {"a": 1.0, "c": 2.0, "b": 1.0}
    parameters = {n: nn.Parameter(torch.full((3,), whole[n])) for n in "abc"}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), bound)
    torch.optim.SGD(parameters.values(), lr=1.0).step()
    assert {r[0] for r in results} == {float(norm)}
    for _, found in results:
        for name, value in found.items():
            assert torch.equal(value, parameters[name].detach())


def test_a_norm_that_is_not_a_number_is_seen_everywhere() -> None:
    def rank(comm) -> float | None:
        state = make(("a",) if comm.rank == 0 else ("b",), 1.0)
        add(state, [torch.full((3,), math.nan if comm.rank == 0 else 1.0)])
        state.gather_norms(comm, (0, 1))
        return state.update()

    assert all(math.isnan(norm) for norm in run(LoopbackWorld(2), rank))


def test_tied_gradients_lie_apart() -> None:
    state = make(("a", "b"), shared=("b",))
    add(state, [torch.ones(3), torch.ones(3)])

    def rank(comm) -> None:
        state.reduce(comm, (0,), 0, 0)

    run(LoopbackWorld(1), rank)
    assert torch.equal(state.gradients["b"], torch.ones(3))


def test_several_dtypes_a_stage() -> None:
    program = StageProgram(0, ("a", "b"), (True, True), (), NONE, NONE)
    graph = StageGraph.__new__(StageGraph)
    object.__setattr__(graph, "shared", ())
    values = {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float64)}
    state = StageState([program], graph, values, lambda named: torch.optim.SGD([p for _, p in named], lr=1.0))
    add(state, [torch.ones(1), torch.ones(1, dtype=torch.float64)])
    run(LoopbackWorld(1), lambda comm: state.reduce(comm, (0,), 0, -1))
    state.update()
    assert [p.item() for p in state.parameters.values()] == [-1.0, -1.0]
    assert state.parameters["b"].dtype == torch.float64


def trained(state: StageState, steps: int, rank: int = 0) -> None:
    """Constant gradients."""

    def run_steps(comm) -> None:
        for _ in range(steps):
            add(state, [torch.ones(3) for _ in state.trainable])
            state.update()
            with torch.no_grad():
                state.spread(comm)
            state.advance()

    run(LoopbackWorld(1), run_steps)


def test_a_norm_that_is_only_wanted_changes_nothing() -> None:
    clipped, free = make(("a",), math.inf), make(("a",))
    trained(clipped, 2)
    trained(free, 2)
    assert clipped.norm == pytest.approx(3**0.5) and free.norm is None
    assert torch.equal(clipped.parameters["a"], free.parameters["a"])


def test_the_norm_is_known_where_nothing_is_updated() -> None:
    """A rank whose stages are frozen logs it as well."""

    def rank(comm) -> float | None:
        state = make(("a", "b") if comm.rank else ())
        state.clipping = Clipping(1.0, ("a", "b"))
        if comm.rank:
            add(state, [torch.ones(3), torch.ones(3)])
        state.gather_norms(comm, (0, 1))
        return state.norm

    assert run(LoopbackWorld(2), rank) == [pytest.approx(6**0.5)] * 2


@pytest.mark.parametrize("names", [("a",), ()])
@pytest.mark.filterwarnings("error")
def test_learning_rates_move_on_every_rank(names: tuple[str, ...]) -> None:
    state = make(names)
    state.scheduler = torch.optim.lr_scheduler.StepLR(state.optimizer, 1, gamma=0.5)
    seen = []
    for _ in range(3):
        seen.append(state.learning_rate)
        if names:
            state.update()
        state.advance()
    assert seen == [1.0, 0.5, 0.25]


def test_moving_averages_and_their_use() -> None:
    state = make(("a",))
    state.ema, state.averages = 0.75, {"a": state.parameters["a"].detach().clone()}
    trained(state, 2)  # 1, 0, -1
    average = 0.75 * (0.75 * 1 + 0.25 * 0) + 0.25 * -1
    with state.averaged():
        assert state.arguments[0][0].tolist() == pytest.approx([average] * 3)
    assert state.parameters["a"].tolist() == [-1.0] * 3
    assert state.averages["a"].tolist() == pytest.approx([average] * 3)


def test_averages_are_put_back_after_an_error() -> None:
    state = make(("a",))
    state.averages = {"a": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="evaluation"), state.averaged():
        raise RuntimeError("evaluation")
    assert state.parameters["a"].tolist() == [1.0] * 3


def test_copies_in_lower_precision_follow_the_weights() -> None:
    cast = WeightCast(0, torch.bfloat16)
    functions = replace(NONE, sizes={1: TrainFunctions(None, None, None, (cast,))})
    program = StageProgram(0, ("a",), (True,), (), functions, NONE)
    graph = StageGraph.__new__(StageGraph)
    object.__setattr__(graph, "shared", ())
    values = {"a": torch.full((3,), 1.0)}
    state = StageState(
        [program], graph, values, lambda named: torch.optim.SGD([p for _, p in named], lr=1 / 3)
    )
    weight, copy = state.arguments[0]
    assert (weight.dtype, copy.dtype) == (torch.float32, torch.bfloat16)
    trained(state, 1)
    assert torch.equal(copy, weight.bfloat16()) and float(weight[0]) == pytest.approx(2 / 3)
    assert state.arguments[0][1] is copy
