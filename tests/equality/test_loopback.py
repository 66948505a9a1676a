"""Every case in one process: the ranks are threads. What is given back is overwritten at once: nobody may
still read it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpp.runtime.loopback import LoopbackWorld, run
from gpp.runtime.staging import HostSlot, OnHost
from tests.thorough import thorough

from .cases import CASES, Case
from .harness import compare, prepare, run_rank

GARBAGE = 0xA5


class OverwrittenSlot(HostSlot):
    def launched(self) -> None:
        self.local.fill_(GARBAGE)


class Overwritten(OnHost):
    def slot(self, size: int, *, sending: bool) -> HostSlot:
        return OverwrittenSlot(torch.empty(size, dtype=torch.uint8))

    def landing(self, size: int, cuts: Sequence[int]) -> tuple[Tensor, Sequence[HostSlot]]:
        memory, slots = super().landing(size, cuts)
        return memory, [OverwrittenSlot(slot.wire) for slot in slots]


# low precision changes no message's way: what it shares with float32 is held there
HALF = ("bf16-encoder", "bf16-zero-bubble", "bf16-tied", "bf16-frozen")
FEWER = [c if c.precision != "bf16" or c.name in HALF else pytest.param(c, marks=thorough) for c in CASES]


@pytest.mark.parametrize("case", FEWER, ids=lambda case: case.name)
def test_equal_to_reference(case: Case) -> None:
    torch.set_num_threads(1)
    ready = prepare(case)
    programs = [ready.programs(rank) for rank in range(case.ranks)]
    world = LoopbackWorld(case.ranks)
    outcomes = run(world, lambda comm: run_rank(ready, comm, programs[comm.rank], Overwritten()))
    compare(ready, outcomes)
