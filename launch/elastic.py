"""train.elastic=true: when ranks die, those who are left plan for themselves and go on from a checkpoint.

Open MPI's fault tolerance (ULFM) keeps them alive and gives them a communicator of their own. Only deaths are
survived: an exception would come again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from gpp.runtime.environment import fault_tolerance

from .problems import SettingsError
from .settings import TrainSettings, train_settings

if TYPE_CHECKING:
    from gpp.checkpoint.shelf import Shelf
    from gpp.runtime.mpi import MpiCommunicator


def check_elastic(settings: TrainSettings, mpi: "MpiCommunicator | None") -> None:
    """Raise SettingsError where the job could not go on without a rank."""
    if not settings.elastic:
        if settings.checkpoint_memory is not None:
            raise SettingsError(
                "train.checkpoint_memory makes copies that end with the job, for train.elastic=true alone: "
                "set that too, or leave it null"
            )
        return
    if settings.checkpoint_every is None:
        raise SettingsError(
            "train.elastic=true goes on from checkpoints, and none are written: set train.checkpoint_every "
            "(train.checkpoint_memory, beside it, makes copies that end with the last rank)"
        )
    if mpi is None:
        raise SettingsError("train.elastic=true is for ranks of their own: start it with launch.mpirun")
    if mpi.size > 1 and (mpi.watch is None or not fault_tolerance()):
        raise SettingsError(
            "train.elastic=true needs an MPI that lets ranks die: Open MPI 5, started with `mpirun --with-ft "
            "ulfm` (launch.mpirun does so by itself), and not GPP_WATCH=0"
        )


def shelf_for(config: DictConfig, mpi: "MpiCommunicator | None") -> "Shelf | None":
    """Where a job's copies in memory lie, if it is to have any; called by all ranks together."""
    wanted = OmegaConf.select(config, "train.checkpoint_memory") is not None
    if mpi is None or mpi.size == 1 or not wanted or config.train.elastic is not True:
        return None  # what is wrong with that is said later
    from gpp.api.memory import shelf_of
    from gpp.checkpoint.tensors import CheckpointError

    try:
        shelf = shelf_of(mpi)
        if mpi.rank == 0:
            print(f"copies in memory: {shelf.path}", flush=True)
        return shelf
    except CheckpointError as error:
        if mpi.rank == 0:
            print(f"no copies in memory, only checkpoints on disk: {error}", flush=True)
        return None


def without(config: DictConfig, lost: tuple[int, ...], mpi: "MpiCommunicator", run: Path) -> DictConfig:
    """The configuration of those who are left: as many devices as they are, a plan of their own, and from the
    newest checkpoint of this run, or before its first from where it began. `mpi` is their communicator; its
    first rank speaks for them from now on. `run` is the run's folder."""
    if mpi.rank == 0:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        ranks = f"{'rank' if len(lost) == 1 else 'ranks'} {', '.join(map(str, lost))}"
        print(f"lost {ranks}: {mpi.size} ranks go on, renumbered from 0", flush=True)
    found = config.copy()
    devices = OmegaConf.select(config, "cluster.devices")
    changes: dict[str, object] = {"plan": None}
    if mpi.broadcast_object(lambda: _has_checkpoints(config, run)):
        changes["train.resume"] = "auto"
    if isinstance(devices, int) and devices > mpi.size:
        changes["cluster.devices"] = mpi.size
    for key, value in changes.items():
        OmegaConf.update(found, key, value)
    return found


def _has_checkpoints(config: DictConfig, run: Path) -> bool:
    from gpp.checkpoint.folder import newest

    from .resume import folder_of

    return newest(folder_of(train_settings(config), run))[0] is not None


def is_wanted(overrides: Sequence[str]) -> bool:
    """Whether a command line asks for it, so that mpirun must let ranks die."""
    return any(text.lstrip("+").lower() == "train.elastic=true" for text in overrides)
