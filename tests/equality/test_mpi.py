"""The same cases as processes under a real mpirun: one job a world size runs all of its cases."""

import pytest

from tests.mpirun import run_mpi, why_no_mpi

from .cases import CASES

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or ""),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_equal_to_reference(ranks: int) -> None:
    expected = [f"passed {case.name}" for case in CASES if case.ranks == ranks]
    assert expected
    job = run_mpi(ranks, "tests.equality.mpi_program", timeout=280)
    assert job.returncode == 0, job.stdout + job.stderr
    assert [line for line in job.stdout.splitlines() if line.startswith("passed")] == expected
