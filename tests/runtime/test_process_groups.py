"""Sums by torch.distributed, here with gloo: NCCL needs a GPU for each rank."""

from pathlib import Path

import pytest

from tests.mpirun import run_mpi, why_no_mpi

PROGRAM = """
import torch
from gpp.runtime.communicator import CommunicationError
from gpp.runtime.mpi import connect
from gpp.runtime.process_groups import ProcessGroups
from tests.equality import harness
from tests.equality.cases import CASES

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
groups.close()
if comm.rank == 0:
    print("passed", used)
comm.close()
"""


@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")
def test_sums_are_those_of_the_members(tmp_path: Path) -> None:
    script = tmp_path / "sums.py"
    script.write_text(PROGRAM)
    job = run_mpi(4, str(script), timeout=100)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.strip() == "passed [0, 3, 3, 0]"
