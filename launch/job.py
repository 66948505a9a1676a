"""From a configuration to everything that ranks need to train: capture, plan, schedules, programs.

Every rank captures by itself (what it gets is compared); rank 0 plans and broadcasts. Without MPI one process
does it once and is all ranks.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from gpp.capture.capture import Captured, capture
from gpp.capture.export import EXAMPLES
from gpp.capture.verify import verify
from gpp.capture.weights import Initialised, build_plain, build_recorded
from gpp.plan import Plan, PlanError, check_plan, plan_from_json, plan_to_json
from gpp.planner import graphpipe
from gpp.planner.options import Options
from gpp.program.build import Roots, build_stage, mode_plan
from gpp.program.stage import StageProgram
from gpp.runtime.agreement import same
from gpp.runtime.communicator import Communicator
from gpp.runtime.data import Batches, Dataset, Subset, hold_out
from gpp.runtime.results import ModeResults
from gpp.runtime.schedules import Schedules, call_sizes, schedules
from gpp.runtime.state import Clipping, MakeOptimizer, StageState
from gpp.schedule.check import check

from .guard import together
from .kernels import hooks
from .objects import chosen, dataset, model_builder, optimizer_factor, optimizer_maker
from .settings import (
    SettingsError,
    TrainSettings,
    choice,
    configuration_digest,
    costs,
    device_count,
    policy,
    topology,
    train_settings,
)
from .simulate import read_plan


@dataclass(frozen=True)
class Material:
    """What a process has before there is a plan."""

    settings: TrainSettings
    initialised: Initialised
    captured: Captured
    train_data: Dataset
    held_out: Dataset
    make_optimizer: MakeOptimizer
    device: torch.device


@dataclass(frozen=True)
class Job:
    """What all ranks of a process share."""

    material: Material
    plan: Plan
    evaluation: Plan
    lowered: Schedules
    batches: Batches
    planner_seconds: float

    @property
    def train_results(self) -> ModeResults:
        """Loss and metrics of training."""
        return ModeResults(self.material.captured.train.loss, self.material.captured.train.metrics)

    @property
    def evaluate_results(self) -> ModeResults:
        """Loss and metrics of evaluation."""
        return ModeResults(self.material.captured.evaluate.loss, self.material.captured.evaluate.metrics)

    def stage_of(self, rank: int) -> int | None:
        """The stage that a rank works on, None for an idle one."""
        return next((i for i, s in enumerate(self.plan.stage_graph.stages) if rank in s.devices), None)


def prepare(
    config: DictConfig, overrides: Sequence[str], comm: Communicator, *, alone: bool
) -> tuple[Job, int]:
    """The job, and the number of ranks; called by all ranks together. `alone`: one process is all ranks."""
    together(comm, lambda: same(comm, "configuration", configuration_digest(config)))
    count = together(comm, lambda: device_count(config, None if alone else comm.size))
    material = together(comm, lambda: gather(config, overrides))
    graph = material.captured.graph
    together(comm, lambda: same(comm, "captured model", graph.fingerprint()))
    hosts = None if alone else comm.hosts

    def make() -> tuple[str, float]:
        start = perf_counter()
        plan = make_plan(config, material, count, hosts)
        return plan_to_json(plan), perf_counter() - start

    text, seconds = together(comm, lambda: comm.broadcast_object(make))
    return together(comm, lambda: arrange(config, material, plan_from_json(text), seconds)), (
        count if alone else comm.size
    )


def gather(config: DictConfig, overrides: Sequence[str]) -> Material:
    """Read settings, build model and data, capture, verify."""
    settings = train_settings(config)
    device = pick_device(config)
    choice(config, "transport.name", ("auto", "host"))
    build = model_builder(chosen(config, "model", overrides))
    initialised = (build_plain if settings.init == "plain" else build_recorded)(build, settings.seed)
    data = dataset(chosen(config, "data", overrides), initialised.model)
    if len(data) < EXAMPLES:
        raise SettingsError(f"the data set has {len(data)} samples, capture alone needs {EXAMPLES}")
    split = hold_out(len(data), settings.seed, settings.held_out)
    make_optimizer = optimizer_maker(config.optimizer)
    example = data.read(range(EXAMPLES), data.keys)
    meta = any(p.is_meta for p in initialised.model.parameters())
    captured = capture(
        initialised.model,
        {k: v.to("meta") for k, v in example.items()} if meta else example,
        seed=settings.seed,
    )
    if settings.verify and not meta:
        verify(initialised.model, example, captured)
    return Material(
        settings,
        initialised,
        captured,
        Subset(data, split.train),
        Subset(data, split.held_out),
        make_optimizer,
        device,
    )


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


def make_plan(config: DictConfig, material: Material, count: int, hosts: Sequence[str] | None) -> Plan:
    """Plan, or read the plan that `plan=` names."""
    settings, captured = material.settings, material.captured
    clipped = settings.clip_norm is not None
    path = OmegaConf.select(config, "plan")
    if path is not None:
        return replace(_replayed(str(path), captured, count, settings), global_norm=clipped)
    choice(config, "planner.name", ("graphpipe",))
    options = Options(
        mini_batch=settings.mini_batch,
        micro_batch=_micro_batch(settings, captured),
        policy=policy(config),
        optimizer_factor=optimizer_factor(material.make_optimizer),
        global_norm=clipped,
        max_replicas=OmegaConf.select(config, "planner.max_replicas"),
    )
    plan = graphpipe.plan(captured.graph, topology(config, count, hosts), costs(config), options)
    check_plan(plan, captured.graph)
    return plan


def _micro_batch(settings: TrainSettings, captured: Captured) -> int | Literal["auto"]:
    """A loss that mixes samples is only the user's own loss if it sees the whole mini-batch."""
    if not captured.loss_coupled:
        return settings.micro_batch
    if settings.micro_batch in ("auto", settings.mini_batch):
        return settings.mini_batch
    raise SettingsError(
        "the loss of a mini-batch is not the mean of its micro-batches' losses: it mixes samples (a "
        "contrastive loss), or divides by something else than their number (ignore_index). Return "
        "(sum, weight) from forward in the second case, else set train.micro_batch to the whole mini-batch, "
        f"{settings.mini_batch}"
    )


def _replayed(path: str, captured: Captured, count: int, settings: TrainSettings) -> Plan:
    plan = read_plan(path)
    have = len(plan.topology.devices)
    if have != count:
        raise PlanError(
            f"{path} is a plan for {have} devices, this run has {count}: start {have} ranks, or plan anew"
        )
    if plan.fingerprints.graph != captured.graph.fingerprint():
        raise PlanError(
            f"{path} was made for another model: its graph is {plan.fingerprints.graph}, this one's "
            f"{captured.graph.fingerprint()}; plan anew"
        )
    if plan.mini_batch != settings.mini_batch:
        raise PlanError(
            f"{path} is a plan for mini-batches of {plan.mini_batch}, train.mini_batch is "
            f"{settings.mini_batch}"
        )
    check_plan(plan, captured.graph)
    return plan


def arrange(config: DictConfig, material: Material, plan: Plan, planner_seconds: float) -> Job:
    """Schedules for training and evaluation, checked."""
    settings, traced = material.settings, material.captured.traced
    plan = mode_plan(plan, traced.train)
    evaluation = mode_plan(plan, traced.evaluate)
    lowered = schedules(plan, evaluation, len(material.held_out))
    check(plan, lowered.train)
    for schedule in lowered.evaluate.values():
        check(evaluation, schedule)
    batches = Batches(len(material.train_data), settings.mini_batch, settings.seed)
    return Job(material, plan, evaluation, lowered, batches, planner_seconds)


def program_of(config: DictConfig, job: Job, rank: int) -> StageProgram | None:
    """Trace and compile the stage of a rank. Not to be called from a thread."""
    stage = job.stage_of(rank)
    if stage is None:
        return None
    captured = job.material.captured
    sizes: set[int] = set()
    for schedule in job.lowered.evaluate.values():
        sizes |= call_sizes(schedule, rank)
    return build_stage(
        captured.traced,
        job.plan,
        job.evaluation,
        stage,
        Roots(captured.roots, captured.train.loss.weight is None),
        train_sizes=call_sizes(job.lowered.train, rank),
        evaluation_sizes=sizes,
        device=job.material.device,
        hooks=hooks(config),
    )


def state_of(job: Job, program: StageProgram | None) -> StageState | None:
    """Initial parameters and buffers of a rank's stage, and its optimizer."""
    if program is None:
        return None
    material = job.material
    values: dict[str, Tensor] = material.initialised.values((*program.parameters, *program.buffers))
    clip = material.settings.clip_norm
    return StageState(
        program,
        job.plan.stage_graph,
        {name: value.to(material.device) for name, value in values.items()},
        material.make_optimizer,
        None if clip is None else Clipping(clip, tuple(material.captured.traced.trainable)),
    )


def threads_of_a_rank(ranks_here: int) -> int:
    """torch threads of each rank: what OMP_NUM_THREADS says, else a fair share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)
