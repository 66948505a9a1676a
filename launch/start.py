"""How every command starts: under MPI or not, one output folder however many ranks, one voice.

Whether there is an MPI is decided from the environment, before mpi4py is imported. Rank 0 broadcasts the time
stamp that names the run's folder; the other ranks keep quiet (their output would come once per rank), and
write no `.hydra` folder.
"""

import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from gpp.runtime.environment import lonely, under_mpi

from .guard import explain_composition, guarded, leave_if, refuse

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator

CONF = Path(__file__).parents[1] / "conf"
_QUIET = ("hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")

Task = Callable[[DictConfig, "MpiCommunicator | None"], None]


def launch(task: Task, config: str) -> None:
    """Compose `config` with the command line and run `task(config, communicator)`.

    The communicator is None without MPI. Ends the process with a code other than 0 if anything fails.
    """
    communicator = _connect() if under_mpi() else None
    if communicator is None and (reason := lonely()) is not None:
        refuse(reason)
    stamp = _stamp()
    if communicator is not None:
        stamp = communicator.broadcast_object(_stamp)
        if communicator.rank > 0:
            _keep_quiet()
    OmegaConf.register_new_resolver("gpp.stamp", lambda: stamp, replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it then leaves the wording of its errors to us

    def run(configuration: DictConfig) -> None:
        _composed(communicator, None)
        guarded(communicator, lambda: task(configuration, communicator))

    run.__module__ = "__main__"
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(run)()
    except Exception as problem:  # Hydra's own: a task ends the process when it fails
        _composed(communicator, explain_composition(problem))


def run_folder() -> Path:
    """The folder of this run; made by now."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def own_overrides() -> list[str]:
    """The overrides of the command line, without Hydra's own."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def _composed(communicator: "MpiCommunicator | None", error: str | None) -> None:
    """What every rank says before anything else: whether it has its configuration."""
    if communicator is not None:
        leave_if(communicator, error)
    elif error is not None:
        refuse(error)


def _stamp() -> str:
    """To the millisecond: two runs of one second do not share a folder."""
    return datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")[:-3]


def _connect() -> Any:
    from gpp.runtime.communicator import CommunicationError

    try:
        from gpp.runtime.mpi import connect

        return connect()
    except CommunicationError as error:
        refuse(str(error))


def _keep_quiet() -> None:
    """Other ranks than 0 print nothing: what Hydra says, it would say once a rank."""
    sys.argv += [] if any(flag in sys.argv for flag in ("--help", "-h", "--hydra-help")) else _QUIET
    silence = open(os.devnull, "w")
    sys.stdout = silence
    sys.stderr = silence
