"""Runs a case on a world of ranks and holds every number against the reference."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gpp.capture.capture import Captured, capture
from gpp.capture.export import EXAMPLES
from gpp.capture.names import freeze
from gpp.capture.pretrained import Source, pretrained
from gpp.capture.weights import Initialised, build_plain
from gpp.cost import Roofline
from gpp.plan import Plan, Policy, check_plan
from gpp.planner.estimate import Group, Problem, assemble
from gpp.planner.options import Options
from gpp.program.autocast import Autocast
from gpp.program.build import Roots, build_stage, mode_plan
from gpp.program.stage import StageProgram
from gpp.runtime.communicator import Communicator
from gpp.runtime.executor import Executor
from gpp.runtime.reference import Reference
from gpp.runtime.reports import Reports
from gpp.runtime.results import Total, combine
from gpp.runtime.schedules import Schedules, call_sizes, schedules
from gpp.runtime.staging import Staging
from gpp.runtime.state import Clipping, MakeScheduler, StageState
from gpp.schedule.check import check
from gpp.topology import Device, DeviceTopology, Link

from .cases import Case
from .models import batch

STEPS = 3
HELD_OUT = 13  # a mini-batch and a ragged rest
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ready:
    """Everything that is the same on every rank."""

    case: Case
    model: nn.Module
    captured: Captured
    values: dict[str, Tensor]
    plan: Plan
    evaluation: Plan
    lowered: Schedules
    batches: list[dict[str, Tensor]]
    held_out: dict[str, Tensor]

    def programs(self, rank: int) -> list[StageProgram]:
        return [self.program(rank, stage) for stage in self.plan.residents.get(rank, ())]

    def program(self, rank: int, stage: int) -> StageProgram:
        return build_stage(
            self.captured.traced,
            self.plan,
            self.evaluation,
            stage,
            Roots(self.captured.roots, self.captured.train.loss.weight is None),
            train_sizes=call_sizes(self.lowered.train, rank, stage),
            evaluation_sizes={
                n for schedule in self.lowered.evaluate.values() for n in call_sizes(schedule, rank, stage)
            },
            device=CPU,
        )

    def make_optimizer(self, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        case = self.case
        if not case.groups and not case.undecayed:
            return case.make_optimizer(named)
        return case.grouped.for_model(self.model)(named)

    @property
    def make_scheduler(self) -> MakeScheduler | None:
        return self.case.make_scheduler if self.case.scheduler else None

    @property
    def clipping(self) -> Clipping | None:
        return (
            None
            if self.case.clip is None
            else Clipping(self.case.clip, tuple(self.captured.traced.trainable))
        )


@cache
def captured_model(
    model: type[nn.Module], dtype: torch.dtype, precision: str, frozen: tuple[str, ...]
) -> tuple[Initialised, Captured]:
    """Several cases cut the same model."""
    built = build_plain(lambda: model().to(dtype), seed=1)
    if frozen:
        freeze(built.model, frozen)
    autocast = Autocast("cpu") if precision == "bf16" else None
    return built, capture(built.model, batch(built.model, EXAMPLES, 0, dtype), seed=5, autocast=autocast)


def loaded(built: Initialised, prefix: str) -> dict[str, Tensor]:
    """The initial values, those below `prefix` out of a file that calls them by shorter names."""
    names = [*dict(built.model.named_parameters()), *dict(built.model.named_buffers())]
    if not prefix:
        return built.values(names)
    generator = torch.Generator().manual_seed(3)
    inner = built.values(n for n in names if n.startswith(prefix))
    fresh = {n: torch.randn(v.shape, generator=generator).to(v.dtype) / 3 for n, v in inner.items()}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "part.safetensors"
        save_file({f"encoder.{n.removeprefix(prefix)}": v for n, v in fresh.items()}, file)
        values = pretrained(built, [Source(file, prefix, "encoder.")], strict=True).values(names)
    assert fresh and all(torch.equal(values[n], v) for n, v in fresh.items())
    return values


def prepare(case: Case) -> Ready:
    built, captured = captured_model(case.model, case.dtype, case.precision, case.freeze)
    plan = make_plan(case, captured)
    evaluation = mode_plan(plan, captured.traced.evaluate)
    lowered = schedules(plan, evaluation, HELD_OUT)
    check(plan, lowered.train)
    for schedule in lowered.evaluate.values():
        check(evaluation, schedule)
    return Ready(
        case,
        built.model,
        captured,
        loaded(built, case.pretrained),
        plan,
        evaluation,
        lowered,
        [batch(built.model, case.samples, 10 + i, case.dtype) for i in range(STEPS)],
        batch(built.model, HELD_OUT, 99, case.dtype),
    )


def make_plan(case: Case, captured: Captured) -> Plan:
    device = Device("test", memory=1e12, flops=1e9, bandwidth=1e9)
    link = Link(0.0, 1e9)
    topology = DeviceTopology("test", (device,) * case.ranks, case.ranks, link, link)
    options = Options(
        mini_batch=case.samples,
        micro_batch=case.micro_batch,
        policy=Policy(case.policy, case.extra),
        global_norm=case.clip is not None,
    )
    problem = Problem(captured.graph, topology, Roofline(), options)
    replicas = case.replicas or (1,) * len(case.stages)
    left = {op.name: i for i, op in enumerate(captured.graph.operators)}
    groups = []
    for prefixes, count in zip(case.stages, replicas, strict=True):
        chosen = [name for name in left if any(name.startswith(p) for p in prefixes)]
        assert chosen, (case.name, prefixes, list(captured.graph.index))
        number = len(groups)
        groups.append(
            Group(
                tuple(left.pop(name) for name in chosen),
                count,
                recompute=number in case.recompute,
                shard_optimizer=case.shard,
                slot=case.slots[number] if case.slots else None,
            )
        )
    assert not left, (case.name, left)
    plan = assemble(problem, groups, case.micro_batch, "by hand", chained=case.chained)
    if case.lags:
        stages = zip(plan.stage_graph.stages, case.lags, strict=True)
        lagging = tuple(
            replace(stage, weight_lag=lag, in_flight=stage.in_flight + lag * stage.micro_batch)
            for stage, lag in stages
        )
        plan = replace(plan, stage_graph=replace(plan.stage_graph, stages=lagging))
    check_plan(plan, captured.graph)
    return mode_plan(plan, captured.traced.train)


class Watched(StageState):
    """Keeps the gradients that the optimizer is given."""

    seen: list[dict[str, Tensor]]

    def update(self) -> float | None:
        if not hasattr(self, "seen"):
            self.seen = []
        self.seen.append({name: self.gradients[name].clone() for name in self._reached})
        return super().update()


@dataclass(frozen=True)
class Outcome:
    """What one rank ended with; losses, metrics and evaluation on rank 0 only."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    losses: list[float]
    metrics: list[dict[str, float]]
    norms: list[float | None]
    evaluation: dict[str, float]
    averages: dict[str, Tensor]
    averaged: dict[str, float]


def run_rank(
    ready: Ready, comm: Communicator, programs: Sequence[StageProgram], staging: Staging | None = None
) -> Outcome:
    case, captured = ready.case, ready.captured
    train = captured.train
    evaluate = captured.evaluate
    state = None
    if programs:
        owned = {n: ready.values[n].clone() for p in programs for n in (*p.parameters, *p.buffers)}
        state = Watched(
            programs,
            ready.plan.stage_graph,
            owned,
            ready.make_optimizer,
            ready.clipping,
            comm.rank,
            scheduler=ready.make_scheduler,
            ema=case.ema,
        )

    def runner(plan: Plan, schedule, results, tag) -> tuple[Executor, Reports]:
        executor = Executor(comm, plan, schedule, programs, state, results.loss, CPU, staging)
        return executor, Reports(comm, schedule, programs, tag)

    executor, reports = runner(ready.plan, ready.lowered.train, train, 100)
    losses, metrics, norms = [], [], []
    executor.channels.open(STEPS)
    for step in range(STEPS):
        outcome = executor.run(step, rows(executor, ready.batches[step]))
        terms = reports.exchange(outcome)
        norms.append(state.norm if state else None)
        if state:
            state.advance()
        if comm.rank == 0:
            losses.append(combine(train.loss, terms, case.samples).mean)
            metrics.append({m.name: combine(m, terms, case.samples).mean for m in train.metrics})
    executor.channels.close()
    reports.flush()

    def evaluated(tag: int) -> dict[str, float]:
        totals: dict[str, Total] = {}
        for i, (start, stop) in enumerate(ragged(case.samples)):
            schedule = ready.lowered.evaluate[stop - start]
            executor, reports = runner(ready.evaluation, schedule, evaluate, tag + i)
            part = {k: v[start:stop] for k, v in ready.held_out.items()}
            executor.channels.open(1)
            terms = reports.exchange(executor.run(0, rows(executor, part)))
            executor.channels.close()
            reports.flush()
            if comm.rank == 0:
                for result in (evaluate.loss, *evaluate.metrics):
                    found = combine(result, terms, stop - start)
                    totals[result.name] = totals.get(result.name, Total(0.0, 0.0)) + found
        return {name: total.mean for name, total in totals.items()}

    averaged: dict[str, float] = {}
    if case.ema is not None:
        with state.averaged() if state else nullcontext():
            averaged = evaluated(101)
    evaluation = evaluated(201)
    return Outcome(
        {n: p.detach().clone() for n, p in state.parameters.items()} if state else {},
        dict(state.buffers) if state else {},
        getattr(state, "seen", []),
        losses,
        metrics,
        norms,
        evaluation,
        dict(state.averages) if state else {},
        averaged,
    )


def rows(executor: Executor, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: whole[key][executor.rows] for key in executor.keys}


def ragged(mini_batch: int) -> list[tuple[int, int]]:
    return [(s, min(s + mini_batch, HELD_OUT)) for s in range(0, HELD_OUT, mini_batch)]


def reference(ready: Ready) -> tuple[Reference, list, dict[str, float], dict[str, float]]:
    case, captured = ready.case, ready.captured
    single = Reference(
        captured.traced,
        captured.roots,
        captured.train,
        captured.evaluate,
        ready.values,
        ready.make_optimizer,
        case.clip,
        ready.make_scheduler,
        case.ema,
    )
    steps = [single.step(i, b, case.call) for i, b in enumerate(ready.batches)]
    parts = [{k: v[s:t] for k, v in ready.held_out.items()} for s, t in ragged(case.samples)]
    evaluation = single.evaluate(parts, case.micro_batch)
    if case.ema is None:
        return single, steps, evaluation, {}
    live = {name: single.parameters[name].detach().clone() for name in single.averages}
    with torch.no_grad():
        for name, average in single.averages.items():
            single.parameters[name].copy_(average)
        averaged = single.evaluate(parts, case.micro_batch)
        for name, value in live.items():
            single.parameters[name].copy_(value)
    return single, steps, evaluation, averaged


def compare(ready: Ready, outcomes: Sequence[Outcome]) -> None:
    """Assert that every number of the ranks is the reference's."""
    case = ready.case
    single, steps, evaluation, averaged = reference(ready)
    same = exactly if case.exact else partial(closely, bound=case.bound)

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=case.dtype)

    first = next((o for o in outcomes if o.losses), None)
    if first is not None:
        for i, step in enumerate(steps):
            same(scalar(first.losses[i]), scalar(step.loss), f"loss {i}")
            for name, value in step.metrics.items():
                same(scalar(first.metrics[i][name]), scalar(value), f"{name} {i}")
        for name, value in evaluation.items():
            closely(scalar(first.evaluation[name]), scalar(value), f"evaluation {name}", case.rounding)
        for name, value in averaged.items():
            closely(scalar(first.averaged[name]), scalar(value), f"averaged evaluation {name}", case.rounding)
    for outcome in outcomes:
        for i, gradients in enumerate(outcome.gradients):
            for name, gradient in gradients.items():
                same(gradient, steps[i].gradients[name], f"gradient of {name} in step {i}")
        for name, value in outcome.parameters.items():
            same(value, single.parameters[name].detach(), f"parameter {name}")
        for name, value in outcome.averages.items():
            same(value, single.averages[name], f"average of {name}")
        for name, value in outcome.buffers.items():
            same(value, single.buffers[name], f"buffer {name}")
        if case.clip is not None and any(outcome.norms):
            for i, step in enumerate(steps):
                same(scalar(outcome.norms[i]), scalar(step.norm), f"norm {i}")
    covered = {name for outcome in outcomes for name in outcome.parameters}
    if len(outcomes) == case.ranks:
        assert covered == set(single.parameters), set(single.parameters) - covered


def exactly(found: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(found, expected), f"{what}: {found} is not {expected}"


def closely(found: Tensor, expected: Tensor, what: str, bound: float = 1e-10) -> None:
    distance = (found.double() - expected.double()).norm()
    assert distance <= bound * expected.double().norm() + 1e-300, f"{what}: off by {distance}"
