"""From a captured model and a plan to what each rank executes: schedules, programs, state."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpp.capture.capture import Captured
from gpp.capture.mutation import mutated_buffers
from gpp.plan import Plan
from gpp.program.build import Hooks, Roots, build_stage, mode_plan
from gpp.program.carve import ProgramError, interface
from gpp.program.stage import StageProgram
from gpp.runtime.nonfinite import MAX_SKIPS, OnNonfinite, Policy
from gpp.runtime.schedules import Schedules, call_sizes
from gpp.runtime.state import Clipping, MakeOptimizer, MakeScheduler, StageState
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.schedule.task import Schedule

Values = Callable[[Iterable[str]], dict[str, Tensor]]  # initial weights by full name


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained. `make_optimizer` gets (full name, parameter) pairs of some of the parameters,
    as any class of torch.optim takes them. `clip_norm` clips by the global norm, `log_norm` only asks for it.
    `ema` is the decay of the weights' moving average. `on_nonfinite`: what becomes of a step whose loss or
    gradients are not finite (None: nobody looks); at most `max_skips` are skipped in a row. That and norms
    want a plan with `global_norm`."""

    make_optimizer: MakeOptimizer
    make_scheduler: MakeScheduler | None = None
    clip_norm: float | None = None
    log_norm: bool = False
    ema: float | None = None
    on_nonfinite: OnNonfinite | None = None
    max_skips: int = MAX_SKIPS

    @property
    def policy(self) -> Policy | None:
        """For steps that are not finite."""
        return None if self.on_nonfinite is None else Policy(self.on_nonfinite, self.max_skips)


@dataclass(frozen=True)
class Job:
    """What all ranks share: the plan in both modes, and the schedules, checked."""

    captured: Captured
    plan: Plan
    evaluation: Plan
    lowered: Schedules


def arrange(captured: Captured, plan: Plan, sizes: Collection[int] = ()) -> Job:
    """Schedules of a training step and of the evaluation of `sizes` samples."""
    evaluation = mode_plan(plan, captured.traced.evaluate)
    plan = mode_plan(plan, captured.traced.train)
    train = lower(plan)
    check(plan, train)
    return Job(
        captured,
        plan,
        evaluation,
        Schedules(train, {size: evaluation_schedule(evaluation, size) for size in sorted(set(sizes))}),
    )


def evaluation_schedule(evaluation: Plan, size: int) -> Schedule:
    """The evaluation of `size` samples at once, checked."""
    schedule = lower(evaluation, forward_only=True, samples=size)
    check(evaluation, schedule)
    return schedule


def programs_of(
    job: Job, rank: int, schedules: Iterable[Schedule], device: torch.device, hooks: Hooks | None = None
) -> list[StageProgram]:
    """Trace and compile the stages of a rank for all calls of some schedules. Not to be called from a thread.

    Raises ProgramError naming the stage.
    """
    known = tuple(schedules)
    return [_program(job, rank, stage, known, device, hooks) for stage in job.plan.residents.get(rank, ())]


def _program(
    job: Job,
    rank: int,
    stage: int,
    schedules: Sequence[Schedule],
    device: torch.device,
    hooks: Hooks | None,
) -> StageProgram:
    captured = job.captured
    trained, sizes = (
        {n for s in schedules if s.forward_only is way for n in call_sizes(s, rank, stage)}
        for way in (False, True)
    )
    try:
        return build_stage(
            captured.traced,
            job.plan,
            job.evaluation,
            stage,
            Roots(captured.roots, captured.train.loss.weight is None),
            train_sizes=trained,
            evaluation_sizes=sizes,
            device=device,
            hooks=hooks,
        )
    except (RuntimeError, ZeroDivisionError) as error:
        few = sorted({*trained, *sizes})
        name = job.plan.stage_graph.stages[stage].name
        raise ProgramError(
            f"stage {name} cannot be traced for calls of {', '.join(map(str, few))} samples: "
            f"{str(error).strip().splitlines()[0]}. Batch norm, for one, needs more than one sample: use a "
            "larger train.micro_batch"
        ) from error


def state_of(
    job: Job,
    rank: int,
    programs: Sequence[StageProgram],
    values: Values,
    training: Training,
    device: torch.device,
) -> StageState | None:
    """Initial parameters and buffers of a rank's stages, and its optimizer; None for an idle rank."""
    if not programs:
        return None
    names = dict.fromkeys(name for p in programs for name in (*p.parameters, *p.buffers))
    clip = math.inf if training.clip_norm is None else training.clip_norm
    wanted = training.clip_norm is not None or training.log_norm
    return StageState(
        programs,
        job.plan.stage_graph,
        {name: value.to(device) for name, value in values(tuple(names)).items()},
        training.make_optimizer,
        Clipping(clip, tuple(job.captured.traced.trainable)) if wanted else None,
        rank,
        scheduler=training.make_scheduler,
        ema=training.ema,
        check_finite=training.policy is not None,
    )


def holders_of(job: Job) -> dict[str, tuple[int, ...]]:
    """The ranks that hold each parameter and buffer of the stages."""
    found: dict[str, dict[int, None]] = {}
    for mode in (job.captured.traced.train, job.captured.traced.evaluate):
        for stage in job.plan.stage_graph.stages:
            face = interface(mode, stage.operators)
            for name in (*face.parameters, *face.buffers):
                found.setdefault(name, {}).update(dict.fromkeys(stage.devices))
    return {name: tuple(ranks) for name, ranks in found.items()}


def changed_buffers(job: Job) -> tuple[str, ...]:
    """The buffers that a training step writes, by full name."""
    mode = job.captured.traced.train
    return tuple(mode.buffers[name] for name in mutated_buffers(mode.graph, mode.buffers))


def sizes_of(job: Job) -> dict[str, int]:
    """Bytes of each parameter and buffer."""
    found = {}
    for mode in (job.captured.traced.train, job.captured.traced.evaluate):
        for node, name in {**mode.parameters, **mode.buffers}.items():
            value = mode.nodes[node].meta["val"]
            found[name] = value.numel() * value.element_size()
    return found
