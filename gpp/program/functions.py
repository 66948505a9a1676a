"""The functions of a stage from its three graphs: what is handed over, and what comes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from gpp.schedule.task import Pass

from .accumulate import with_sums
from .halves import Halves
from .stage import BackwardInputResult, ForwardResult, RunGraph, TrainFunctions, ValueSpec
from .weights import WeightCast, completed

Fuse = Callable[[fx.GraphModule], fx.GraphModule]
Compile = Callable[[fx.GraphModule], Callable[..., Any]]


@dataclass(frozen=True)
class Layout:
    """What the arguments and results of a stage's three graphs are: parameters with their casts, the results
    that are outputs, all that are no stash, the input gradients, and which inputs these are of."""

    parameters: int
    casts: tuple[WeightCast, ...]
    outputs: int
    results: int
    gradients: int
    flowing: tuple[ValueSpec, ...]
    size: int
    device: torch.device

    @property
    def held(self) -> int:
        """Arguments that every graph takes."""
        return self.parameters + len(self.casts)


def train_functions(
    halves: Halves, backward: Fuse, compile: Compile, layout: Layout, written: tuple[int, ...]
) -> TrainFunctions:
    """The three functions of a stage at one size. `backward` and `compile` as in `build.Hooks`; `written` are
    the positions of the buffers that the forward writes to."""
    back = backward(halves.backward_input)
    weight_half, reached = with_sums(halves.backward_weight, layout.held)
    weight = backward(weight_half)

    def run_by(run: RunGraph) -> TrainFunctions:
        return _functions_of(
            _Graphs(
                lambda *arguments: run(Pass.FORWARD, halves.forward, list(arguments)),
                lambda arguments: run(Pass.BACKWARD_INPUT, back, arguments),
                lambda arguments: run(Pass.BACKWARD_WEIGHT, weight, arguments),
            ),
            layout,
            reached,
        )

    compiled = _Graphs(compile(halves.forward), compile(back), compile(weight))
    functions = _functions_of(compiled, layout, reached)
    return replace(functions, written=written, with_graphs_run_by=run_by)


@dataclass(frozen=True)
class _Graphs:
    """A stage's three graphs made callable: forward by its arguments, the others by one list of them, which
    they empty."""

    forward: Callable[..., Any]
    backward_input: Callable[[list[Tensor]], Any]
    backward_weight: Callable[[list[Tensor]], Any]


def _functions_of(graphs: _Graphs, layout: Layout, reached: tuple[bool, ...]) -> TrainFunctions:
    count, casts = layout.parameters, layout.casts
    outputs, results, gradients = layout.outputs, layout.results, layout.gradients

    def forward(
        parameters: Sequence[Tensor], buffers: Sequence[Tensor], inputs: Sequence[Tensor], position: Tensor
    ) -> ForwardResult:
        made = graphs.forward(*completed(parameters, count, casts), *buffers, *inputs, position)
        return ForwardResult(made[:outputs], made[outputs:results], made[results:])

    def backward_input(
        parameters: Sequence[Tensor], stash: list[Tensor], tangents: Sequence[Tensor]
    ) -> BackwardInputResult:
        arguments = [*completed(parameters, count, casts), *stash, *tangents]
        stash.clear()
        made = graphs.backward_input(arguments)
        found = [
            torch.zeros((layout.size, *spec.shape), dtype=spec.dtype, device=layout.device)
            if g is None
            else g
            for g, spec in zip(made[:gradients], layout.flowing, strict=True)
        ]
        return BackwardInputResult(found, made[gradients:])

    def backward_weight(
        parameters: Sequence[Tensor], stash: list[Tensor], sums: Sequence[Tensor]
    ) -> Sequence[bool]:
        totals = [total for total, is_reached in zip(sums, reached, strict=True) if is_reached]
        arguments = [*completed(parameters, count, casts), *totals, *stash]
        stash.clear()
        graphs.backward_weight(arguments)
        return reached

    return TrainFunctions(forward, backward_input, backward_weight, casts)
