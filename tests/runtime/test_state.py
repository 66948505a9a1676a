"""A stage's parameters and gradients between steps."""

import math

import pytest
import torch
from torch import nn

from gpp.plan import Shared, StageGraph
from gpp.program.stage import StageFunctions, StageProgram
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


def test_a_parameter_that_no_gradient_reaches_is_left_alone() -> None:
    """As torch does with grad None: no weight decay, no momentum."""
    state = make(("a", "b"))
    state.optimizer = torch.optim.SGD(state.parameters.values(), lr=1.0, weight_decay=0.5)
    state.accumulate(0, [torch.ones(3), None])
    state.update()
    assert torch.equal(state.parameters["b"], torch.full((3,), 2.0))
    assert torch.equal(state.parameters["a"], torch.full((3,), 1.0 - 1.0 - 0.5))


def test_gradients_are_summed_scaled_and_cleared() -> None:
    state = make(("a",))
    state.accumulate(0, [torch.ones(3)])
    state.accumulate(0, [torch.ones(3)])
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
        state.accumulate(0, [gradients[name] for name in names])
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
        state.accumulate(0, [torch.full((3,), math.nan if comm.rank == 0 else 1.0)])
        state.gather_norms(comm, (0, 1))
        return state.update()

    assert all(math.isnan(norm) for norm in run(LoopbackWorld(2), rank))


def test_tied_gradients_lie_apart() -> None:
    state = make(("a", "b"), shared=("b",))
    state.accumulate(0, [torch.ones(3), torch.ones(3)])

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
    state.accumulate(0, [torch.ones(1), torch.ones(1, dtype=torch.float64)])
    run(LoopbackWorld(1), lambda comm: state.reduce(comm, (0,), 0, -1))
    state.update()
    assert [p.item() for p in state.parameters.values()] == [-1.0, -1.0]
    assert state.parameters["b"].dtype == torch.float64
