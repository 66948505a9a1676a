"""`transport=`: how messages get from one stage's device to another's."""

import os
from typing import TYPE_CHECKING, cast

import torch
from omegaconf import DictConfig

from gpp.runtime.agreement import same
from gpp.runtime.cache import user_folder
from gpp.runtime.communicator import Communicator
from gpp.runtime.process_groups import ProcessGroups
from gpp.runtime.staging import OnDevice, OnHost, Staging, host_staging
from gpp.schedule.task import Reduce, Reduction, Schedule

from .device_memory import Verdict, machine_type, verdict
from .job import pick_device
from .problems import SettingsError
from .settings import REDUCERS, TRANSPORTS, choice

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator

SLOW = "expandable_segments:True"  # in PYTORCH_CUDA_ALLOC_CONF: such memory cannot be shared by processes
_NCCL = "transport.reduce=nccl sums on GPUs, one for each MPI rank"
_NO_NCCL = "use transport.reduce=mpi"


def staging_of(config: DictConfig, comm: Communicator, *, alone: bool) -> Staging:
    """What `transport=` and `device=` say together; called by all ranks together. `alone`: there is no MPI.

    With `auto` device memory goes to MPI where that has been tried and works, see `device_memory`. Raises
    SettingsError where `device`, or `transport.reduce=nccl`, is asked for and cannot be.
    """
    wanted = choice(config, "transport.name", TRANSPORTS)
    reducer = choice(config, "transport.reduce", REDUCERS)
    device = pick_device(config)
    same(comm, "transport", f"{wanted}, reduce {reducer}, on {device.type}")
    check_transport(config, alone=alone)
    if reducer == "nccl":
        _check_places(comm, device)
    if device.type == "cpu":
        return OnHost()
    if alone or wanted == "host":
        return host_staging(device)
    mpi = cast("MpiCommunicator", comm)
    found: Verdict = comm.broadcast_object(lambda: verdict(mpi.library, machine_type(), user_folder()))
    if found.works:
        mpi.device_memory = True
        _say(comm, "messages go from device to device: MPI takes device memory")
        if SLOW in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
            _say(comm, f"PYTORCH_CUDA_ALLOC_CONF={SLOW} makes that slow, or not work at all: leave it out")
        return OnDevice(device)
    if wanted == "device":
        raise SettingsError(
            f"transport=device: MPI does not take device memory here ({found.reason}); use transport=host, "
            "or an MPI library built with CUDA and an mpi4py built for it. What was found is remembered in "
            f"{user_folder()}: delete device-memory-*.json there to have it tried again"
        )
    _say(comm, f"messages go through pinned host memory: MPI does not take device memory ({found.reason})")
    return host_staging(device)


def process_groups(config: DictConfig, comm: Communicator, schedule: Schedule) -> ProcessGroups | None:
    """What sums gradients with `transport.reduce=nccl`; None: the messages do it. Called by all ranks
    together, once `staging_of` has let it pass."""
    if choice(config, "transport.reduce", REDUCERS) != "nccl":
        return None
    instructions = [i for program in schedule.programs for i in program if isinstance(i, Reduce)]
    groups = {i.group for i in instructions if i.what is Reduction.GRADIENTS}
    return ProcessGroups(comm, groups, "nccl")


def check_transport(config: DictConfig, *, alone: bool) -> None:
    """What this rank can say by itself of `transport=`. Raises SettingsError."""
    on_cpu = pick_device(config).type == "cpu"
    if choice(config, "transport.reduce", REDUCERS) == "nccl" and (on_cpu or alone):
        why = "stages run on the CPU here" if on_cpu else "there is no MPI in one process"
        raise SettingsError(f"{_NCCL}, but {why}: {_NO_NCCL}")
    if choice(config, "transport.name", TRANSPORTS) != "device":
        return
    if on_cpu:
        raise SettingsError(
            "transport=device hands device memory to MPI, but stages run on the CPU here: use transport=auto "
            "or transport=host"
        )
    if alone:
        raise SettingsError(
            "transport=device hands device memory to MPI, but there is no MPI in one process: start it with "
            "mpirun, or use transport=host"
        )


def _check_places(comm: Communicator, device: torch.device) -> None:
    places = comm.all_gather_object((comm.hosts[comm.rank], device.index))
    if len(set(places)) < len(places):
        raise SettingsError(f"{_NCCL}, but {len(places)} ranks share {len(set(places))}: {_NO_NCCL}")


def _say(comm: Communicator, text: str) -> None:
    if comm.rank == 0:
        print(text, flush=True)
