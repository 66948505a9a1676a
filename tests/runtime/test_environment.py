"""What launchers' variables mean; the sets below are what they export."""

import pytest

from gpp.runtime.environment import launched_tasks, local_rank, lonely, synchronous_sends, under_mpi

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2", "PMIX_RANK": "2"}
MPICH = {"PMI_SIZE": "3", "PMI_RANK": "1", "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": "1"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "5"}
SRUN_PMIX = SRUN | {"PMIX_RANK": "5"}
SRUN_PMI2 = SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}
# mpirun starts its own daemons as a Slurm step, one a node, and the ranks inherit that
MPIRUN_IN_SLURM = SRUN | OPEN_MPI | {"SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
    ("variables", "mpi", "tasks", "local"),
    [
        ({}, False, None, None),
        (OPEN_MPI, True, 4, 2),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, True, 1, 2),
        (MPICH, True, 3, 1),
        (BATCH_SCRIPT, False, None, None),
        (SRUN, False, 8, 5),
        (SRUN_PMIX, True, 8, 5),
        (SRUN_PMI2, True, 8, 5),
        (MPIRUN_IN_SLURM, True, 4, 2),
        ({"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1"}, True, None, 1),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "none"}, False, None, None),
    ],
)
def test_variables(variables: dict[str, str], mpi: bool, tasks: int | None, local: int | None) -> None:
    assert under_mpi(variables) is mpi
    assert launched_tasks(variables) == tasks
    assert local_rank(variables) == local


@pytest.mark.parametrize(
    ("variables", "size", "message"),
    [
        ({}, 1, None),
        (OPEN_MPI, 4, None),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, 1, None),
        (BATCH_SCRIPT, 1, None),
        (OPEN_MPI, 1, "the launcher started 4 processes"),
        (MPICH, 1, "the launcher started 3 processes"),
        (SRUN, 1, "srun started 8 tasks"),
        (SRUN_PMI2, 1, "srun started 8 tasks"),
        (SRUN | MPICH, 1, "the launcher started 3 processes"),
        (MPIRUN_IN_SLURM, 1, "the launcher started 4 processes"),
        (SRUN_PMIX, 8, None),
    ],
)
def test_lonely_processes(variables: dict[str, str], size: int, message: str | None) -> None:
    found = lonely(variables, size)
    assert found is None if message is None else found is not None and found.startswith(message)


def test_synchronous_sends() -> None:
    assert [synchronous_sends(e) for e in ({}, {"GPP_SYNCHRONOUS_SENDS": "0"})] == [False, False]
    assert synchronous_sends({"GPP_SYNCHRONOUS_SENDS": "1"})
    with pytest.raises(ValueError, match="GPP_SYNCHRONOUS_SENDS must be 0 or 1, it is 'yes'"):
        synchronous_sends({"GPP_SYNCHRONOUS_SENDS": "yes"})
