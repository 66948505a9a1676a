"""Sums by torch.distributed, here with gloo: NCCL needs a GPU for each rank."""

from pathlib import Path

import pytest

from tests.mpirun import run_mpi, why_no_mpi
from tests.thorough import thorough

SUMS = """
import torch
from gpp.runtime.communicator import CommunicationError
from gpp.runtime.mpi import connect
from gpp.runtime.process_groups import ProcessGroups

torch.set_num_threads(1)
comm = connect()
groups = ProcessGroups(comm, [(0, 1), (1, 2), (0, 1, 2, 3)], "gloo")
flat = torch.zeros(1000, dtype=torch.float64)
for group in ((0, 1, 2, 3), (1, 2), (0, 1)):
    if comm.rank in group:
        made = groups.make_sum(comm, group, flat)
        for round_ in range(3):
            flat.copy_(torch.arange(1000) * (1.0 + comm.rank + round_))
            made.run()
            factor = sum(1.0 + rank + round_ for rank in group)
            assert torch.equal(flat, torch.arange(1000, dtype=torch.float64) * factor)
try:
    groups.make_sum(comm, (0, 2), flat)
    raise AssertionError("a group that was not made")
except CommunicationError as error:
    assert "no process group of the ranks (0, 2)" in str(error)

"""
TRAINING = """
from tests.equality import harness
from tests.equality.cases import CASES


class Summed(harness.Watched):
    used = 0

    def reduce(self, comm, group, stage, shared):
        self.make_sum = groups.make_sum
        Summed.used += 1
        super().reduce(comm, group, stage, shared)


harness.Watched = Summed
ready = harness.prepare(next(c for c in CASES if c.name == "replicas-1-2-1-clipped"))
harness.compare(ready, [harness.run_rank(ready, comm, ready.programs(comm.rank))])
used = comm.all_gather_object(Summed.used)
if comm.rank == 0:
    print("trained", used)
"""
END = """
groups.close()
if comm.rank == 0:
    print("passed")
comm.close()
"""


def said(tmp_path: Path, *parts: str) -> list[str]:
    script = tmp_path / "sums.py"
    script.write_text("".join(parts))
    job = run_mpi(4, str(script), timeout=100)
    assert job.returncode == 0, job.stdout + job.stderr
    return job.stdout.splitlines()


@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")
def test_sums_are_those_of_the_members(tmp_path: Path) -> None:
    assert said(tmp_path, SUMS, END) == ["passed"]


@thorough
@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")
def test_training_with_them_is_the_reference(tmp_path: Path) -> None:
    assert said(tmp_path, SUMS, TRAINING, END) == ["trained [0, 3, 3, 0]", "passed"]
