"""Every case in one process: the ranks are threads."""

import pytest
import torch

from gpp.runtime.loopback import LoopbackWorld, run

from .cases import CASES, Case
from .harness import compare, prepare, run_rank


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_to_reference(case: Case) -> None:
    torch.set_num_threads(1)
    ready = prepare(case)
    programs = [ready.programs(rank) for rank in range(case.ranks)]
    outcomes = run(LoopbackWorld(case.ranks), lambda comm: run_rank(ready, comm, programs[comm.rank]))
    compare(ready, outcomes)
