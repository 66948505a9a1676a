"""The same cases as processes under a real mpirun: one job a world size runs all of its cases.

Once as they are, and once with synchronous sends: then nothing leans on room that the MPI library has, and
the buffers of the schedule, as many as it says, are enough. The second takes minutes: one world size has to
do, GPP_ALL_TESTS=1 in the environment runs all.
"""

import os

import pytest

from tests.mpirun import run_mpi, why_no_mpi

from .cases import CASES

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or ""),
]


RANKS = (1, 2, 3, 4, 6)
SYNCHRONOUS = RANKS if os.environ.get("GPP_ALL_TESTS") else (3,)


@pytest.mark.parametrize(
    ("ranks", "synchronous"),
    [*((ranks, "0") for ranks in RANKS), *((ranks, "1") for ranks in SYNCHRONOUS)],
)
def test_equal_to_reference(ranks: int, synchronous: str) -> None:
    expected = [f"passed {case.name}" for case in CASES if case.ranks == ranks]
    assert expected
    environment = {"GPP_SYNCHRONOUS_SENDS": synchronous}
    job = run_mpi(ranks, "tests.equality.mpi_program", timeout=280, environment=environment)
    assert job.returncode == 0, job.stdout + job.stderr
    assert [line for line in job.stdout.splitlines() if line.startswith("passed")] == expected
