"""After the second step nothing that carries messages is made any more."""

import pytest
import torch

from gpp.runtime.loopback import LoopbackWorld, run
from tests.equality.cases import Case
from tests.equality.harness import prepare
from tests.mpirun import run_mpi, why_no_mpi
from tests.thorough import thorough

from .steady import CASES, FREE, Census, counts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_threads(case: Case) -> None:
    torch.set_num_threads(1)
    ready = prepare(case)
    programs = [ready.programs(rank) for rank in range(case.ranks)]
    census = Census()

    def body(comm):
        census.watch_communicator(comm)
        return counts(ready, comm, programs[comm.rank], census)

    with census.watching():
        found = run(LoopbackWorld(case.ranks), body, threads=1)
    for rank, steps in enumerate(found):
        assert [dict(step) for step in steps[FREE:]] == [{}] * len(steps[FREE:]), f"rank {rank}"
    assert any(steps[0] for steps in found)  # the count itself can fail


@thorough
@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")
def test_processes() -> None:
    """With four ranks there is a case of everything."""
    ranks = 4
    job = run_mpi(ranks, "tests.runtime.steady", timeout=120)
    assert job.returncode == 0, job.stdout + job.stderr
    expected = [f"steady {case.name}" for case in CASES if case.ranks == ranks]
    assert len(expected) > 3
    assert [line for line in job.stdout.splitlines() if line.startswith("steady")] == expected
