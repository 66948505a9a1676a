"""The acceptance test of everything: the captured graph uncut, in one process, under eager autograd.

Micro-batches of the sink's size are accumulated in order, then scaled, clipped and updated as torch does it
on one device. It shares the captured graph with the pipeline, and nothing of its cutting, scheduling or
running.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gpp.program.carve import carve, interface
from gpp.program.stage import Results
from gpp.program.traced import TracedModel

from .results import Total, combine
from .state import MakeOptimizer, MakeScheduler


@dataclass(frozen=True)
class ReferenceStep:
    """One step's loss, metrics, and gradients (scaled, before clipping) by name."""

    loss: float
    metrics: Mapping[str, float]
    gradients: Mapping[str, Tensor]
    norm: float | None


class Reference:
    """The uncut model, trained as on one device."""

    def __init__(
        self,
        traced: TracedModel,
        roots: Mapping[str, float],
        train: Results,
        evaluate: Results,
        values: Mapping[str, Tensor],
        make_optimizer: MakeOptimizer,
        max_norm: float | None = None,
        scheduler: MakeScheduler | None = None,
        ema: float | None = None,
    ) -> None:
        self.traced = traced
        self.roots = roots
        self.train_results = train
        self.evaluate_results = evaluate
        self.max_norm = max_norm
        self.parameters = {
            name: nn.Parameter(values[name].detach().clone(), requires_grad=trainable)
            for name, trainable in traced.trainable.items()
        }
        self.buffers = {
            name: value.detach().clone() for name, value in values.items() if name not in self.parameters
        }
        learning = [(n, p) for n, p in self.parameters.items() if p.requires_grad]
        self.optimizer = make_optimizer(learning)
        self.scheduler = scheduler(self.optimizer) if scheduler is not None else None
        self.average = get_ema_multi_avg_fn(ema) if ema is not None else None  # type: ignore[no-untyped-call]
        self.averages = {n: p.detach().clone() for n, p in learning}

    def step(self, step: int, batch: Mapping[str, Tensor], micro_batch: int) -> ReferenceStep:
        """One optimizer step on a mini-batch."""
        self.optimizer.zero_grad(set_to_none=True)
        samples = len(next(iter(batch.values())))
        pieces = [(s, min(s + micro_batch, samples)) for s in range(0, samples, micro_batch)]
        terms: dict[str, list[tuple[int, int, float]]] = {}
        mean = self.train_results.loss.weight is None
        for start, stop in pieces:
            found = self._run(True, step, batch, start, stop)
            roots = [found[name] for name in self.roots]
            seeds = [
                torch.full_like(found[name], coefficient * (stop - start if mean else 1))
                for name, coefficient in self.roots.items()
            ]
            pairs = [(r, s) for r, s in zip(roots, seeds, strict=True) if r.requires_grad]
            torch.autograd.backward([r for r, _ in pairs], [s for _, s in pairs])
            for name, value in found.items():
                terms.setdefault(name, []).append((start, stop, float(value.detach())))
        loss = combine(self.train_results.loss, terms, samples)
        with torch.no_grad():
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(loss.weight)
        gradients = {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
        norm = None
        if self.max_norm is not None:
            learning = [p for p in self.parameters.values() if p.grad is not None]
            norm = float(torch.nn.utils.clip_grad_norm_(learning, self.max_norm))
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            live = [self.parameters[name].detach() for name in self.averages]
            self.average(list(self.averages.values()), live, torch.tensor(0))
        metrics = {m.name: combine(m, terms, samples).mean for m in self.train_results.metrics}
        return ReferenceStep(loss.mean, metrics, gradients, norm)

    def evaluate(self, batches: Sequence[Mapping[str, Tensor]], micro_batch: int) -> dict[str, float]:
        """Loss and metrics over all samples of the batches."""
        totals: dict[str, Total] = {}
        for batch in batches:
            samples = len(next(iter(batch.values())))
            terms: dict[str, list[tuple[int, int, float]]] = {}
            for start in range(0, samples, micro_batch):
                stop = min(start + micro_batch, samples)
                with torch.no_grad():
                    for name, value in self._run(False, 0, batch, start, stop).items():
                        terms.setdefault(name, []).append((start, stop, float(value)))
            for result in (self.evaluate_results.loss, *self.evaluate_results.metrics):
                found = combine(result, terms, samples)
                totals[result.name] = totals.get(result.name, Total(0.0, 0.0)) + found
        return {name: total.mean for name, total in totals.items()}

    def _run(
        self, training: bool, step: int, batch: Mapping[str, Tensor], start: int, stop: int
    ) -> dict[str, Tensor]:
        mode = self.traced.train if training else self.traced.evaluate
        operators = set(mode.operator_of.values())
        face = interface(mode, operators)
        forward = carve(
            mode,
            operators,
            stop - start,
            list(self.parameters),
            list(self.buffers),
            device=torch.device("cpu"),
        )
        keys = [batch[key][start:stop] for key in face.batch_keys]
        results = forward(
            *self.parameters.values(), *self.buffers.values(), *keys, torch.tensor([step, start])
        )
        return dict(zip(face.terms, results, strict=False))  # predictions come behind the terms
