"""What a rank holds of its stage: names, layouts and compiled functions.

The runtime receives these records and nothing else of the model. Sizes are numbers of samples of one call: a
replica's share of a micro-batch, or of what is left of the data in evaluation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gpp.schedule.task import Pass

from .weights import WeightCast

RunGraph = Callable[[Pass, fx.GraphModule, list[Tensor]], Sequence[Any]]  # of a pass, on its arguments


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """A tensor that crosses an edge: `shape` of one sample; dimension 0 of the real one is the samples'."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    @property
    def bytes(self) -> int:
        """Bytes of one sample."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Port:
    """One end of an edge: which edge of the stage graph and its tensors, in the order of the message."""

    edge: int
    values: tuple[ValueSpec, ...]


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """`outputs` follow StageFunctions.outputs, `terms` StageFunctions.terms (0-dim tensors), `predictions`
    StageFunctions.predictions."""

    outputs: Sequence[Tensor]
    terms: Sequence[Tensor]
    stash: Sequence[Tensor]
    predictions: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True)
class BackwardInputResult:
    """`gradients` follow the inputs that need one, in the order of StageFunctions.inputs."""

    gradients: Sequence[Tensor]
    stash: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class TrainFunctions:
    """One stage's three graphs at one size.

    `forward(parameters, buffers, inputs, position)`: `parameters` and `buffers` by StageProgram's orders,
    `inputs` = received values in StageFunctions.inputs' order, then batch keys in StageFunctions.batch_keys'
    order; `position` = int64 tensor (step, first sample). Mutates batch-norm buffers in place.
    `backward_input(parameters, stash, gradients)`: `gradients` of the outputs that need one, in order. The
    stash list is emptied. `backward_weight(parameters, stash, sums)` adds each trainable parameter's
    gradient to its sum, in order, as soon as it is there; it returns which of them the loss reaches.
    `parameters` are the stage's, or these and behind them what `casts` says: each call then need not make it.
    `written` are the positions of the buffers that forward writes to. `with_graphs_run_by` makes the same
    functions of the same graphs, as they were before they were compiled, run by the caller; None where there
    are no graphs.
    """

    forward: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor], ForwardResult]
    backward_input: Callable[[Sequence[Tensor], list[Tensor], Sequence[Tensor]], BackwardInputResult]
    backward_weight: Callable[[Sequence[Tensor], list[Tensor], Sequence[Tensor]], Sequence[bool]]
    casts: tuple[WeightCast, ...] = ()
    written: tuple[int, ...] = ()
    with_graphs_run_by: "Callable[[RunGraph], TrainFunctions] | None" = None


@dataclass(frozen=True, slots=True)
class StageFunctions:
    """A stage in one mode (training or evaluation): its layout, and its functions by size.

    `inputs` and `outputs` are distinct values (one output may go along several edges); `receives` and `sends`
    say which edge carries which. `terms` name the scalars of this stage that rank 0 combines, `predictions`
    (in evaluation) its values for each sample that rank 0 may ask for.
    """

    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    batch_keys: tuple[str, ...]
    receives: tuple[Port, ...]
    sends: tuple[Port, ...]
    terms: tuple[str, ...]
    sizes: Mapping[int, TrainFunctions]
    predictions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageProgram:
    """Everything a rank executes of one stage.

    `evaluate` has no backward functions: calling them is an error.
    """

    stage: int
    parameters: tuple[str, ...]
    trainable: tuple[bool, ...]
    buffers: tuple[str, ...]
    train: StageFunctions
    evaluate: StageFunctions

    @property
    def casts(self) -> tuple[WeightCast, ...]:
        """Parameters in lower precision that every call takes, of any size; an update makes them anew."""
        found = {functions.casts for functions in self.train.sizes.values()}
        return found.pop() if len(found) == 1 else ()

    @property
    def written(self) -> tuple[str, ...]:
        """The buffers that training writes to."""
        positions = {i for functions in self.train.sizes.values() for i in functions.written}
        return tuple(name for i, name in enumerate(self.buffers) if i in positions)


@dataclass(frozen=True, slots=True)
class TermSum:
    """One result of a step as a linear combination of terms, in float64.

    value = (constant x samples + sum of coefficient x term) / weight. For a mean over samples each term is
    multiplied by the samples of its micro-batch and `weight` is None: the divisor is the number of samples.
    For a (sum, weight) pair both are combinations of sums, and nothing is multiplied.
    """

    name: str
    terms: tuple[tuple[str, float], ...]
    constant: float
    weight: tuple[tuple[str, float], ...] | None


@dataclass(frozen=True)
class Results:
    """What the model returns in training or in evaluation: the loss and the metrics.

    `ignored` are terms that count labels which a mean loss leaves out: more than none in one of several
    micro-batches, and their means no longer add up to the loss.
    """

    loss: TermSum
    metrics: tuple[TermSum, ...]
    ignored: tuple[str, ...] = ()
