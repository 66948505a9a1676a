"""How long the three passes of some operators take, run as a stage runs them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import Tensor

from .build import Hooks, Roots, alone
from .carve import value_spec
from .stage import ForwardResult
from .traced import TracedModel

_LEAST, _MOST = 3, 100  # rounds that are measured


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one call's three passes. Adding the gradients to their sums is part of `backward_weight`."""

    forward: float
    backward_input: float
    backward_weight: float


def time_passes(
    traced: TracedModel,
    operators: Sequence[str],
    size: int,
    roots: Roots,
    batch: Mapping[str, Tensor],
    device: torch.device,
    *,
    hooks: Hooks | None = None,
    seconds: float = 0.2,
) -> Times:
    """Medians over rounds of forward, input half and weight half, for about `seconds` after a first round.

    `batch` holds at least `size` samples of the keys that the operators read; everything else is random
    numbers (integers: zeros). On a CUDA device its own clock counts. On a CPU with one thread that thread's
    time does, which what else runs on the machine does not disturb; with more threads the wall's.
    """
    run = passes(traced, operators, size, roots, batch, device, hooks)

    def call() -> list[float]:
        marks: list[Any] = []
        run(lambda: marks.append(_mark(device)))
        return _between(marks)

    with torch.no_grad():
        call()
        found: list[list[float]] = []
        start = perf_counter()
        while len(found) < _LEAST or (perf_counter() - start < seconds and len(found) < _MOST):
            found.append(call())
    return Times(*(median(column) for column in zip(*found, strict=True)))


def passes(
    traced: TracedModel,
    operators: Sequence[str],
    size: int,
    roots: Roots,
    batch: Mapping[str, Tensor],
    device: torch.device,
    hooks: Hooks | None = None,
) -> Callable[[Callable[[], object]], None]:
    """A function that runs the three passes once, on tensors that it keeps, and calls what it is given before
    the first and after each of them."""
    stage = alone(traced, operators, size, roots, device, hooks)
    face, functions = stage.face, stage.functions
    first = len(face.parameters)
    second = first + len(face.buffers)
    third = second + len(face.inputs)
    generator = torch.Generator(device=device).manual_seed(0)
    parameters = [_filled(v, generator, 0.02) for v in stage.examples[:first]]
    buffers = [torch.ones_like(v) for v in stage.examples[first:second]]
    inputs = [_filled(v, generator, 1.0) for v in stage.examples[second:third]]
    keys = [batch[key][:size].to(device) for key in face.batch_keys]
    position = torch.zeros_like(stage.examples[-1])
    carried = [value_spec(traced.train, name).needs_grad for name in face.outputs]
    sums = [
        torch.zeros_like(v) for v, n in zip(parameters, face.parameters, strict=True) if traced.trainable[n]
    ]
    parameters += [cast.of(parameters) for cast in functions.casts]
    tangents: list[Tensor] = []

    def run(mark: Callable[[], object]) -> None:
        mark()
        made: ForwardResult = functions.forward(parameters, buffers, [*inputs, *keys], position)
        mark()
        if not tangents:
            given = [v for v, flows in zip(made.outputs, carried, strict=True) if flows]
            tangents.extend(_filled(v.contiguous(), generator, 1.0) for v in given)
        stash = list(made.stash)
        del made
        back = functions.backward_input(parameters, stash, tangents)
        mark()
        functions.backward_weight(parameters, list(back.stash), sums)
        mark()

    return run


def _filled(value: Tensor, generator: torch.Generator, scale: float) -> Tensor:
    made = torch.zeros_like(value)
    return made.normal_(0, scale, generator=generator) if value.is_floating_point() else made


def _mark(device: torch.device) -> Any:
    """A point in time: an event of the device's queue, or a clock of the host."""
    if device.type != "cuda":
        return thread_time() if torch.get_num_threads() == 1 else perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(marks: Sequence[Any]) -> list[float]:
    pairs = list(pairwise(marks))
    if isinstance(marks[0], float):
        return [b - a for a, b in pairs]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairs]
