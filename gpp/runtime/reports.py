"""How the scalar terms of all stages reach rank 0: one small message per rank and step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpp.program.stage import StageProgram
from gpp.schedule.task import Report, Samples, Schedule

from .communicator import Communicator, Request
from .executor import StepOutcome
from .schedules import pieces_of

COLLECTOR = 0


@dataclass(frozen=True, slots=True)
class _Source:
    """What a rank sends: for each term of its stages a value for each of its pieces."""

    rank: int
    terms: tuple[tuple[str, tuple[Samples, ...]], ...]

    @property
    def count(self) -> int:
        return sum(len(pieces) for _, pieces in self.terms)


class Reports:
    """Collects one schedule's terms. Made by all ranks together; `tag` is this schedule's own."""

    def __init__(
        self, comm: Communicator, schedule: Schedule, programs: Sequence[StageProgram], tag: int
    ) -> None:
        self.comm = comm
        self.tag = tag
        mine = _own(comm.rank, schedule, programs)
        self._sources = [s for s in comm.all_gather_object(mine) if s is not None]
        self._mine = mine
        self._under_way: Request | None = None
        self._table: Tensor | None = None

    def exchange(self, outcome: StepOutcome) -> Mapping[str, list[tuple[int, int, float]]]:
        """Send this rank's terms; on rank 0 wait for everyone's and return them (elsewhere nothing)."""
        if self.comm.rank != COLLECTOR:
            if self._mine is not None:
                self._send(outcome)
            return {}
        tables = {
            s.rank: torch.empty(s.count, dtype=torch.float64) for s in self._sources if s.rank != COLLECTOR
        }
        self.comm.wait([self.comm.irecv(table, rank, self.tag) for rank, table in tables.items()])
        found: dict[str, list[tuple[int, int, float]]] = {
            name: list(values) for name, values in outcome.terms.items()
        }
        for source in self._sources:
            if source.rank == COLLECTOR:
                continue
            values = iter(tables[source.rank].tolist())
            for name, pieces in source.terms:
                found.setdefault(name, []).extend((p.start, p.stop, next(values)) for p in pieces)
        return found

    def _send(self, outcome: StepOutcome) -> None:
        assert self._mine is not None
        self.flush()
        values = [value for name, _ in self._mine.terms for _, _, value in outcome.terms[name]]
        self._table = torch.tensor(values, dtype=torch.float64)
        self._under_way = self.comm.isend(self._table, COLLECTOR, self.tag)

    def flush(self) -> None:
        """Wait until the last message has been taken."""
        if self._under_way is not None:
            self.comm.wait([self._under_way])
            self._under_way = None


def _own(rank: int, schedule: Schedule, programs: Sequence[StageProgram]) -> _Source | None:
    terms = []
    for program in programs:
        if Report(program.stage) in schedule.programs[rank]:
            functions = program.evaluate if schedule.forward_only else program.train
            pieces = pieces_of(schedule, rank, program.stage)
            terms += [(name, pieces) for name in functions.terms]
    return _Source(rank, tuple(terms)) if terms else None
