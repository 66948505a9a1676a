"""The Python API under a real mpirun."""

import pytest

from tests.mpirun import run_mpi, why_no_mpi
from tests.thorough import thorough

from . import scenes

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or ""),
]
MORE = {3: ("refusals", "unequal", "left-out"), 4: ("predictions",)}


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=thorough)])
def test_on_ranks(ranks: int) -> None:
    job = run_mpi(ranks, "tests.api.mpi_program", timeout=200)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.split() == [*scenes.ON_PROCESSES[ranks], *MORE.get(ranks, ())]
