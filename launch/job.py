"""From a configuration to everything that ranks need to train: capture, plan, schedules, programs.

Every rank captures by itself (what it gets is compared); rank 0 plans and broadcasts. Without MPI one process
does it once and is all ranks.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from time import perf_counter

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch._logging._internal import set_logs

from gpp.capture.capture import Captured, capture
from gpp.capture.export import EXAMPLES
from gpp.capture.verify import verify
from gpp.capture.weights import Initialised, build_plain, build_recorded
from gpp.plan import Plan, plan_from_json, plan_to_json
from gpp.program.build import Roots, build_stage, mode_plan
from gpp.program.stage import StageProgram
from gpp.runtime.agreement import same
from gpp.runtime.communicator import Communicator
from gpp.runtime.data import Batches, Dataset, Subset, hold_out
from gpp.runtime.schedules import Schedules, call_sizes, schedules
from gpp.runtime.state import Clipping, MakeOptimizer, StageState
from gpp.schedule.check import check

from .guard import TRACEBACK, together
from .kernels import hooks
from .objects import chosen, dataset, model_builder, optimizer_factor, optimizer_maker
from .plans import Request, Subject, check_request, make_plan, replay
from .settings import (
    SettingsError,
    TrainSettings,
    choice,
    configuration_digest,
    device_count,
    train_settings,
)


@dataclass(frozen=True)
class Material:
    """What a process has before there is a plan."""

    settings: TrainSettings
    captured: Captured
    subject: Subject
    train_data: Dataset
    held_out: Dataset
    batches: Batches
    make_optimizer: MakeOptimizer
    device: torch.device


@dataclass(frozen=True)
class Job:
    """What all ranks of a process share."""

    material: Material
    plan: Plan
    evaluation: Plan
    lowered: Schedules
    planner_seconds: float


def prepare(
    config: DictConfig, overrides: Sequence[str], comm: Communicator, *, alone: bool
) -> tuple[Job, int, Initialised]:
    """The job, the number of ranks, and the initial weights; called by all ranks together.

    `alone`: one process is all ranks. The weights are the whole model's where it is built on the host: let go
    of them once each stage has its own.
    """
    together(comm, lambda: same(comm, "configuration", configuration_digest(config)))

    def ask() -> Request:
        count = device_count(config, None if alone else comm.size)
        request = Request(config, overrides, count, None if alone else comm.hosts)
        check_request(request)
        if OmegaConf.select(config, "profile") is not None:
            raise SettingsError("profile= is for launch.plan: training needs the model itself")
        if comm.rank == 0 and request.plan_path is not None:
            replay(request, request.plan_path)  # before a long capture; other hosts need not see the file
        return request

    request = together(comm, ask)
    material, initialised = together(comm, lambda: gather(config, overrides))
    together(comm, lambda: same(comm, "captured model", material.subject.graph.fingerprint()))

    def make() -> tuple[str, float]:
        start = perf_counter()
        plan = make_plan(request, material.subject)
        return plan_to_json(plan), perf_counter() - start

    text, seconds = together(comm, lambda: comm.broadcast_object(make))
    job = together(comm, lambda: arrange(material, plan_from_json(text), seconds))
    return job, request.count if alone else comm.size, initialised


def gather(config: DictConfig, overrides: Sequence[str]) -> tuple[Material, Initialised]:
    """Read settings, build model and data, capture, verify."""
    settings = train_settings(config)
    device = pick_device(config)
    make_optimizer = optimizer_maker(chosen(config, "optimizer", overrides))
    factor = optimizer_factor(make_optimizer)
    build = model_builder(chosen(config, "model", overrides))
    initialised = (build_plain if settings.init == "plain" else build_recorded)(build, settings.seed)
    data = dataset(chosen(config, "data", overrides), initialised.model)
    if len(data) < EXAMPLES:
        raise SettingsError(f"the data set has {len(data)} samples, capture alone needs {EXAMPLES}")
    split = hold_out(len(data), settings.seed, settings.held_out)
    train_data = Subset(data, split.train)
    batches = Batches(len(train_data), settings.mini_batch, settings.seed)
    with quiet_torch():
        captured = _captured(initialised, data.read(range(EXAMPLES), data.keys), settings)
    material = Material(
        settings,
        captured,
        Subject(captured.graph, captured.loss_coupled, factor),
        train_data,
        Subset(data, split.held_out),
        batches,
        make_optimizer,
        device,
    )
    return material, initialised


def _captured(initialised: Initialised, example: dict[str, Tensor], settings: TrainSettings) -> Captured:
    meta = any(p.is_meta for p in initialised.model.parameters())
    batch = {k: v.to("meta") for k, v in example.items()} if meta else example
    captured = capture(initialised.model, batch, seed=settings.seed)
    if settings.verify and not meta:
        verify(initialised.model, example, captured)
    return captured


@contextmanager
def quiet_torch() -> Iterator[None]:
    """What torch prints about a model that it cannot export, our error says again in a line."""
    if os.environ.get(TRACEBACK) or os.environ.get("TORCH_LOGS"):
        yield
        return
    set_logs(all=logging.CRITICAL)
    with redirect_stderr(StringIO()) as said:
        yield
    sys.stderr.write(said.getvalue())  # of a model that can be: its own words


def pick_device(config: DictConfig) -> torch.device:
    """`device=`: cuda if asked for or, with auto, if there is one; each rank of a host takes its own."""
    from gpp.runtime.environment import local_rank

    wanted = choice(config, "device", ("auto", "cpu", "cuda"))
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device=cuda, but torch sees no CUDA device here: use device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = (local_rank() or 0) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def arrange(material: Material, plan: Plan, planner_seconds: float) -> Job:
    """Schedules for training and evaluation, checked."""
    traced = material.captured.traced
    plan = mode_plan(plan, traced.train)
    evaluation = mode_plan(plan, traced.evaluate)
    lowered = schedules(plan, evaluation, len(material.held_out))
    check(plan, lowered.train)
    for schedule in lowered.evaluate.values():
        check(evaluation, schedule)
    return Job(material, plan, evaluation, lowered, planner_seconds)


def programs_of(config: DictConfig, job: Job, rank: int) -> list[StageProgram]:
    """Trace and compile the stages of a rank. Not to be called from a thread."""
    return [_program(config, job, rank, stage) for stage in job.plan.residents.get(rank, ())]


def _program(config: DictConfig, job: Job, rank: int, stage: int) -> StageProgram:
    captured = job.material.captured
    sizes: set[int] = set()
    for schedule in job.lowered.evaluate.values():
        sizes |= call_sizes(schedule, rank, stage)
    trained = call_sizes(job.lowered.train, rank, stage)
    try:
        return build_stage(
            captured.traced,
            job.plan,
            job.evaluation,
            stage,
            Roots(captured.roots, captured.train.loss.weight is None),
            train_sizes=trained,
            evaluation_sizes=sizes,
            device=job.material.device,
            hooks=hooks(config),
        )
    except (RuntimeError, ZeroDivisionError) as error:
        few = sorted({*trained, *sizes})
        name = job.plan.stage_graph.stages[stage].name
        raise SettingsError(
            f"stage {name} cannot be traced for calls of {', '.join(map(str, few))} samples: "
            f"{str(error).strip().splitlines()[0]}. Batch norm, for one, needs more than one sample: use a "
            "larger train.micro_batch"
        ) from error


def state_of(
    job: Job, rank: int, programs: Sequence[StageProgram], initialised: Initialised
) -> StageState | None:
    """Initial parameters and buffers of a rank's stages, and its optimizer; None for an idle rank."""
    if not programs:
        return None
    material = job.material
    names = dict.fromkeys(name for p in programs for name in (*p.parameters, *p.buffers))
    values: dict[str, Tensor] = initialised.values(tuple(names))
    clip = material.settings.clip_norm
    return StageState(
        programs,
        job.plan.stage_graph,
        {name: value.to(material.device) for name, value in values.items()},
        material.make_optimizer,
        None if clip is None else Clipping(clip, tuple(material.captured.traced.trainable)),
        rank,
    )


def threads_of_a_rank(ranks_here: int) -> int:
    """torch threads of each rank: what OMP_NUM_THREADS says, else a fair share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)
