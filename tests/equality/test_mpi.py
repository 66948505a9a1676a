"""The same cases as processes under a real mpirun: one job a world size runs all of its cases.

Once as they are, and once with synchronous sends: then nothing leans on room that the MPI library has, and
the buffers of the schedule, as many as it says, are enough.
"""

import pytest

from tests.mpirun import run_mpi, why_no_mpi

from .cases import CASES

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or ""),
]


@pytest.mark.parametrize("synchronous", ["0", "1"], ids=["plain", "synchronous"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_equal_to_reference(ranks: int, synchronous: str) -> None:
    expected = [f"passed {case.name}" for case in CASES if case.ranks == ranks]
    assert expected
    environment = {"GPP_SYNCHRONOUS_SENDS": synchronous}
    job = run_mpi(ranks, "tests.equality.mpi_program", timeout=280, environment=environment)
    assert job.returncode == 0, job.stdout + job.stderr
    assert [line for line in job.stdout.splitlines() if line.startswith("passed")] == expected
