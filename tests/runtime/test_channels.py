"""Where the messages of several replicas lie: one after the other, if they can."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpp.runtime.loopback import LoopbackWorld, run
from gpp.runtime.staging import HostSlot, OnHost
from tests.equality import models
from tests.equality.cases import Case
from tests.equality.harness import compare, prepare, run_rank


class Counting(OnHost):
    def __init__(self) -> None:
        self.landings: list[list[int]] = []
        self.copies = 0

    def landing(self, size: int, cuts: Sequence[int]) -> tuple[Tensor, Sequence[HostSlot]]:
        self.landings.append(list(cuts))
        return super().landing(size, cuts)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        self.copies += 1
        return super().joined(parts)


TWO = (("a", "b"), ("",))
ONE_VALUE = {
    "three to one": Case("", models.Chain, TWO, (3, 1), 3, 9, exact=False),
    "four to two": Case("", models.Chain, TWO, (4, 2), 4, exact=False),
    "two and a half to one": Case("", models.Chain, TWO, (3, 2), 6, 12, exact=False),
    "one to four": Case("", models.Chain, TWO, (1, 4), 4, exact=False),
    "of a diamond": Case(
        "", models.Diamond, (("a",), ("b",), ("c",), ("",)), (1, 2, 1, 2), exact=False
    ),
    "with halves": Case("", models.Chain, TWO, (4, 2), 4, exact=False, policy="zero-bubble", lags=(1, 1)),
    "run again": Case("", models.Chain, TWO, (1, 4), 4, exact=False, recompute=(0, 1)),
}  # fmt: skip


def counted(case: Case) -> list[Counting]:
    """What each rank has made for the messages of a case, which is right."""
    torch.set_num_threads(1)
    ready = prepare(case)
    programs = [ready.programs(rank) for rank in range(case.ranks)]
    made = [Counting() for _ in range(case.ranks)]
    world = LoopbackWorld(case.ranks)
    compare(ready, run(world, lambda comm: run_rank(ready, comm, programs[comm.rank], made[comm.rank])))
    return made


@pytest.mark.parametrize("name", ONE_VALUE)
def test_one_value_of_several_replicas_is_not_copied(name: str) -> None:
    made = counted(ONE_VALUE[name])
    assert sum(len(of_rank.landings) for of_rank in made) > 0
    assert (
        sum(of_rank.copies for of_rank in made) <= 1
    )  # of an evaluation's ragged rest, which is cut unevenly
    for of_rank in made:
        assert all(cuts == sorted(cuts) and cuts[0] == 0 for cuts in of_rank.landings)


def test_several_values_are_copied_into_one_piece() -> None:
    case = Case("", models.Skip, (("a",), ("b",), ("",)), (2, 1, 1), exact=False)
    made = counted(case)
    assert sum(of_rank.copies for of_rank in made) > 0
