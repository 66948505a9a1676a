"""From a configuration to everything that ranks need to train: capture, plan, schedules, programs.

Every rank captures by itself (what it gets is compared); rank 0 plans and broadcasts. Without MPI one process
does it once and is all ranks.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gpp.api.capture import capture
from gpp.api.crew import Crew
from gpp.api.job import Job as Arranged
from gpp.api.job import Training, arrange
from gpp.api.optimizer import optimizer_factor
from gpp.api.pipeline import Pipeline
from gpp.api.start import pick_device as device_named
from gpp.api.start import state_names
from gpp.capture.capture import Captured
from gpp.capture.export import EXAMPLES
from gpp.capture.names import freeze
from gpp.capture.pretrained import Source, pretrained
from gpp.capture.weights import Build, Initialised, build_plain, build_recorded
from gpp.plan import Plan, plan_from_json, plan_to_json
from gpp.program.autocast import Autocast
from gpp.runtime.agreement import same
from gpp.runtime.communicator import Communicator
from gpp.runtime.data import Batches, Dataset, Subset, evaluation_batches, hold_out
from gpp.runtime.reduce import MakeSum
from gpp.runtime.staging import Staging
from gpp.runtime.state import MakeOptimizer, MakeScheduler

from .guard import together
from .kernels import hooks
from .objects import chosen, data_object, dataset, model_builder
from .optimizers import optimizer_maker, scheduler_maker
from .plans import Request, Subject, make_plan, request_of
from .problems import Collected, SettingsError
from .settings import (
    TrainSettings,
    choice,
    configuration_digest,
    own_path,
    precision_name,
    train_settings,
)

if TYPE_CHECKING:
    from kernels.fuse import FuseReport

T = TypeVar("T")


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
    make_scheduler: MakeScheduler | None
    device: torch.device


@dataclass(frozen=True)
class Job:
    """What all ranks of a process share."""

    material: Material
    arranged: Arranged
    planner_seconds: float

    @property
    def plan(self) -> Plan:
        """The plan of a training step."""
        return self.arranged.plan


def prepare(
    request: Request,
    comm: Communicator,
    *,
    alone: bool,
    room: Callable[[nn.Module, float], None] | None = None,
) -> tuple[Job, int, Initialised]:
    """The job, the number of ranks, and the initial weights; called by all ranks together. On rank 0 `room`
    is shown the model before it is captured, see `gather`.

    `alone`: one process is all ranks. The weights are the whole model's where it is built on the host: let go
    of them once each stage has its own.
    """
    gc.freeze()  # modules are never garbage: looking for it among them takes 0.1 s, also between steps
    look = room if comm.rank == 0 else None
    material, initialised = together(comm, lambda: gather(request.config, request.overrides, look))
    together(comm, lambda: same(comm, "captured model", material.subject.graph.fingerprint()))

    def make() -> tuple[str, float]:
        start = perf_counter()
        plan = make_plan(request, material.subject)
        return plan_to_json(plan), perf_counter() - start

    text, seconds = together(comm, lambda: comm.broadcast_object(make))
    sizes = {len(batch) for batch in evaluation_batches(len(material.held_out), material.settings.samples)}
    arranged = together(comm, lambda: arrange(material.captured, plan_from_json(text), sizes))
    return Job(material, arranged, seconds), request.count if alone else comm.size, initialised


def asked(
    config: DictConfig,
    overrides: Sequence[str],
    comm: Communicator,
    also: Callable[[], T],
    *,
    alone: bool,
) -> tuple[Request, T]:
    """What is asked for, the same on all ranks, checked as far as it can be without a model, and what `also`
    returns, which checks the rest. All problems of a rank are said in one message; called by all ranks."""
    together(comm, lambda: same(comm, "configuration", configuration_digest(config)))

    def ask() -> tuple[Request, T]:
        world, hosts = (None, None) if alone else (comm.size, comm.hosts)
        with Collected() as read:
            request = read(request_of, config, overrides, world, hosts, reads=comm.rank == 0)
            read(_no_profile, config)
            found = read(also)
        return request, found

    return together(comm, ask)


def _no_profile(config: DictConfig) -> None:
    if OmegaConf.select(config, "profile") is not None:
        raise SettingsError("profile= is for launch.plan: training needs the model itself")


def gather(
    config: DictConfig,
    overrides: Sequence[str],
    look: Callable[[nn.Module, float], None] | None = None,
) -> tuple[Material, Initialised]:
    """Read settings, build model and data, capture, verify. `look` is shown the model and the bytes that its
    optimizer keeps for each that is trained, before capture; it may raise."""
    settings = train_settings(config)
    device = pick_device(config)
    make_optimizer = optimizer_maker(chosen(config, "optimizer", overrides))
    factor = optimizer_factor(make_optimizer)
    make_scheduler = scheduler_maker(config, overrides, make_optimizer)
    autocast = autocast_of(config, device)
    with Collected() as read:
        initialised = read(_initialised, model_builder(chosen(config, "model", overrides)), settings)
        made = read(data_object, chosen(config, "data", overrides))
    if look is not None:
        look(initialised.model, factor)
    make_optimizer = make_optimizer.for_model(initialised.model)
    data = dataset(made, chosen(config, "data", overrides), initialised.model)
    if len(data) < EXAMPLES:
        raise SettingsError(f"the data set has {len(data)} samples, capture alone needs {EXAMPLES}")
    split = hold_out(len(data), settings.seed, settings.held_out)
    train_data = Subset(data, split.train)
    batches = Batches(len(train_data), settings.samples, settings.seed)
    captured = capture(
        initialised.model,
        data.read(range(EXAMPLES), data.keys),
        autocast=autocast,
        seed=settings.seed,
        verify=settings.verify,
    )
    material = Material(
        settings,
        captured,
        Subject(captured.graph, captured.loss_coupled, factor),
        train_data,
        Subset(data, split.held_out),
        batches,
        make_optimizer,
        make_scheduler,
        device,
    )
    return material, initialised


def _initialised(build: Build, settings: TrainSettings) -> Initialised:
    """The model as it begins: its own initial weights or a file's, some of them frozen."""
    made = (build_plain if settings.init == "plain" else build_recorded)(build, settings.seed)
    if settings.freeze:
        freeze(made.model, settings.freeze)
    if not settings.init_from:
        return made
    sources = [Source(own_path(s.file), s.prefix, s.strip) for s in settings.init_from]
    return pretrained(made, sources, strict=settings.init_strict)


def autocast_of(config: DictConfig, device: torch.device) -> Autocast | None:
    """`precision=bf16`: autocast by the rules of the device, or of the one that precision.autocast names."""
    if precision_name(config) == "float32":
        return None
    wanted = choice(config, "precision.autocast", ("auto", "cpu", "cuda"))
    kind = device.type if wanted == "auto" else wanted
    if kind == "cuda" and torch.version.cuda is None:
        raise SettingsError(
            "precision.autocast=cuda needs a torch that is built for CUDA (a GPU need not be there), and "
            "this one is not: use precision.autocast=cpu"
        )
    return Autocast(kind)


def pick_device(config: DictConfig) -> torch.device:
    """`device=`, see `gpp.api.start.pick_device`."""
    return device_named(choice(config, "device", ("auto", "cpu", "cuda")))


def pipeline_of(
    config: DictConfig,
    job: Job,
    initialised: Initialised,
    crew: Crew,
    staging: Staging | None = None,
    make_sum: MakeSum | None = None,
    report: Callable[["FuseReport"], None] | None = None,
) -> Pipeline:
    """The pipeline of a job; called by all ranks together. `report`: see `kernels.hooks`."""
    material = job.material
    settings = material.settings
    return Pipeline(
        crew,
        job.arranged,
        Training(
            make_optimizer=material.make_optimizer,
            make_scheduler=material.make_scheduler,
            clip_norm=settings.clip_norm,
            log_norm=settings.log_norm,
            ema=settings.ema,
            on_nonfinite=settings.on_nonfinite,
            max_skips=settings.max_skips,
        ),
        initialised.values,
        device=material.device,
        names=state_names(initialised.model),
        hooks=hooks(config, material.device, report),
        staging=staging,
        make_sum=make_sum,
        seed=settings.seed,
    )


class GuardedCrew(Crew):
    """Ranks of a command: what fails before training ends all of them, with one message."""

    def together(self, make: Callable[[], T]) -> T:
        """See `Crew`, and `guard.together`."""
        return together(self.comm, make) if not self.alone else super().together(make)
