"""What a launcher tells its processes, read from environment variables alone.

Importing mpi4py.MPI starts MPI, binds a device and fails where no MPI library is installed, so whether to do
it, and which device this process should choose before, has to be known earlier.
"""

import os
from collections.abc import Mapping

TRACEBACK = "GPP_TRACEBACK"  # set: show the traceback of every error

# The variables of each launcher, in the order of trust: mpirun inside a Slurm step inherits the step's too.
TASKS = (
    "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_SIZE",  # MPICH, Intel MPI, Slurm's pmi2, Flux
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "MVP_COMM_WORLD_SIZE",  # MVAPICH
    "FLUX_JOB_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
MPI_SIGNS = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "PMI_RANK",
    "PMIX_RANK",
    "MPI_LOCALNRANKS",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_SIZE",
    "MVP_COMM_WORLD_SIZE",
    "PALS_RANKID",  # Cray
)
LOCAL_RANK = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MVP_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "FLUX_TASK_LOCAL_ID",
)


def under_mpi(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher with an MPI process manager started this process; `mpirun -n 1` counts.

    Slurm's own variables do not: a batch script and a shell of `salloc` have them too.
    """
    return any(name in environment for name in MPI_SIGNS)


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's number among those of its host, None if no launcher says so."""
    slurm = ("SLURM_LOCALID",) if "SLURM_STEP_NUM_TASKS" in environment else ()
    names = (*LOCAL_RANK, *slurm)
    return next((number for name in names if (number := _number(environment, name)) is not None), None)


def launched_tasks(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes the launcher started, None if it does not say so."""
    return next((number for name in TASKS if (number := _number(environment, name)) is not None), None)


def lonely(environment: Mapping[str, str] = os.environ, size: int = 1) -> str | None:
    """An error text if the launcher started several processes and each finds itself alone, else None.

    `size` is that of the MPI world, or 1 where no MPI is used: without this check every process would train
    the whole model on its own.
    """
    tasks = launched_tasks(environment)
    if size > 1 or tasks is None or tasks == 1:
        return None
    by_mpirun = "OMPI_COMM_WORLD_SIZE" in environment or "MPI_LOCALNRANKS" in environment
    if "SLURM_STEP_NUM_TASKS" in environment and not by_mpirun:
        return (
            f"srun started {tasks} tasks, but each is alone: srun and the MPI library do not speak the same "
            "PMI; use `srun --mpi=pmix` for Open MPI or `srun --mpi=pmi2` for MPICH (`srun --mpi=list` shows "
            "what there is)"
        )
    return (
        f"the launcher started {tasks} processes, but each is alone: mpirun and the MPI library that mpi4py "
        "loads are not of the same installation; use the mpirun that belongs to that library"
    )


def fault_tolerance(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Open MPI lets ranks die: `mpirun --with-ft ulfm`."""
    return environment.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "t", "true")


def synchronous_sends(environment: Mapping[str, str] = os.environ) -> bool:
    """GPP_SYNCHRONOUS_SENDS=1, an aid to debugging: every send is done only when it has been received,
    whatever room the MPI library has. Raises ValueError for other values than 0 and 1."""
    value = environment.get("GPP_SYNCHRONOUS_SENDS", "0")
    if value not in ("0", "1"):
        raise ValueError(f"GPP_SYNCHRONOUS_SENDS must be 0 or 1, it is {value!r}")
    return value == "1"


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else None
