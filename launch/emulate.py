"""`launch.train device=emulated`: ranks that only keep time, with real messages between them.

A plan for many devices runs on a few cores, and its prediction is held against a clock. There are no weights
and no data; rank 0 alone captures the model, without weights, or nobody does where `plan=` names a plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from gpp.plan import Plan, plan_from_json, plan_to_json
from gpp.plan_table import readable_bytes
from gpp.runtime.communicator import Communicator
from gpp.runtime.emulation import emulated, exact_sleep, run_steps, slower, with_messages
from gpp.runtime.loopback import LoopbackWorld, run
from gpp.runtime.memory import peak, start_of_peak
from gpp.schedule.check import check
from gpp.schedule.lower import lower

from .guard import together
from .job import asked, gather
from .log import Log, announce_plan, counted
from .plans import Request, make_plan, replay
from .problems import Collected, SettingsError
from .settings import TRANSPORTS, TrainSettings, choice, number, train_settings, whole
from .start import own_overrides, run_folder
from .validation import check_material

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


@dataclass(frozen=True, slots=True)
class Emulation:
    """The `emulation` group; and whether devices write messages themselves, `transport=device`."""

    slowdown: float
    message_bytes: int | None
    transport: str

    def of(self, plan: Plan) -> Plan:
        """The plan as it is run."""
        slow = slower(plan, self.slowdown)
        return slow if self.message_bytes is None else with_messages(slow, self.message_bytes)

    def __str__(self) -> str:
        size = self.message_bytes
        messages = "of the plan's sizes" if size is None else f"of {readable_bytes(size)}"
        return f"passes take {self.slowdown:g} times the plan's seconds, messages {messages} are real"


def emulation(config: DictConfig) -> Emulation:
    """The `emulation` group, checked."""
    size = OmegaConf.select(config, "emulation.message_bytes")
    with Collected() as read:
        found = Emulation(
            read(number, config, "emulation.slowdown", above=0.0),
            None if size is None else read(whole, config, "emulation.message_bytes", 1),
            "device" if read(choice, config, "transport.name", TRANSPORTS) == "device" else "host",
        )
    return found


def emulate(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command; called by all ranks together."""
    alone = mpi is None
    comm: Communicator = mpi if mpi is not None else LoopbackWorld(1).communicators[0]
    folder = Path(comm.broadcast_object(lambda: str(run_folder().resolve())))
    overrides = own_overrides()
    request, (wanted, settings) = asked(
        config, overrides, comm, lambda: _checked(config, overrides), alone=alone
    )

    def make() -> tuple[str, float]:
        start = perf_counter()
        plan = _plan(config, request)
        return plan_to_json(plan), perf_counter() - start

    text, seconds = together(comm, lambda: comm.broadcast_object(make))
    plan = plan_from_json(text)
    run_as = wanted.of(plan)
    together(comm, lambda: check(run_as, lower(run_as)))
    ranks = request.count if alone else comm.size
    steps = settings.steps
    if comm.rank == 0:
        announce_plan(config, plan, folder)
        print(f"nothing is trained: devices are emulated, {wanted}")
        print(f"{counted(ranks, 'rank')}, {counted(steps, 'step')}, {folder}", flush=True)
    base = start_of_peak()

    def work(own: Communicator) -> None:
        _rank(own, config, run_as, wanted.transport, folder, seconds, base)

    if mpi is not None:
        work(mpi)
    else:
        run(LoopbackWorld(ranks), work, 1)


def _checked(config: DictConfig, overrides: Sequence[str]) -> tuple[Emulation, TrainSettings]:
    with Collected() as read:
        wanted, settings = read(emulation, config), read(_settings, config)
        if OmegaConf.select(config, "plan") is None:
            read(check_material, _light(config), overrides)
    return wanted, settings


def _settings(config: DictConfig) -> TrainSettings:
    """The `train` group, in which nothing is kept."""
    settings = train_settings(config)
    if any(v is not None for v in (settings.checkpoint_every, settings.checkpoint_memory, settings.resume)):
        raise SettingsError(
            "device=emulated trains nothing that a checkpoint could keep: leave out train.checkpoint_every, "
            "train.checkpoint_memory and train.resume"
        )
    return settings


def _plan(config: DictConfig, request: Request) -> Plan:
    """The plan of `plan=`, or one for the captured model; planned on rank 0."""
    if request.plan_path is not None:
        return replay(request, request.plan_path)
    return make_plan(request, gather(_light(config), request.overrides)[0].subject)


def _light(config: DictConfig) -> DictConfig:
    """The configuration by which a model is captured without weights."""
    light = config.copy()
    light.device, light.train.init, light.train.init_from = "cpu", "recorded", None
    return light


def _rank(
    comm: Communicator,
    config: DictConfig,
    plan: Plan,
    transport: str,
    folder: Path,
    planner_seconds: float,
    base: int,
) -> None:
    """One rank's steps, and its part of the results."""
    exact_sleep()
    settings = train_settings(config)
    trainer = emulated(comm, plan, transport=transport)
    with Log(folder, settings.steps, settings.log_every, active=comm.rank == 0, trains=False) as log:
        run_steps(trainer, settings.steps, log.step, trace=True)
        trace = trainer.trace()
        memory = comm.all_gather_object(peak() - base)
        if comm.rank == 0:
            log.finish(plan, trace, trainer.measured.typical, planner_seconds, memory, {"eval": {}})
