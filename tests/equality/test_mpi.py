"""The same cases as processes under a real mpirun: one job a world size runs all of its cases.

With sends as they are, or synchronous: then nothing leans on room that the MPI library has, and the buffers
of the schedule, as many as it says, are enough. All of it takes minutes: four ranks run in one of the ways,
GPP_ALL_TESTS=1 in the environment runs every size in both.
"""

import pytest

from tests.mpirun import run_mpi, why_no_mpi
from tests.thorough import ALL

from .cases import of_processes

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or ""),
]


PLAIN, SYNCHRONOUS = "0", "1"
ONCE = ((4, SYNCHRONOUS),)
BOTH = [(ranks, way) for ranks in (1, 2, 3, 4, 6) for way in (PLAIN, SYNCHRONOUS)]


@pytest.mark.parametrize(("ranks", "synchronous"), BOTH if ALL else ONCE)
def test_equal_to_reference(ranks: int, synchronous: str) -> None:
    expected = [f"passed {case.name}" for case in of_processes(ranks)]
    assert expected
    environment = {"GPP_SYNCHRONOUS_SENDS": synchronous}
    job = run_mpi(ranks, "tests.equality.mpi_program", timeout=280, environment=environment)
    assert job.returncode == 0, job.stdout + job.stderr
    assert [line for line in job.stdout.splitlines() if line.startswith("passed")] == expected
