"""How the scalar terms of all stages reach rank 0: one small message per rank and step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpp.program.stage import StageProgram
from gpp.schedule.task import Report, Samples, Schedule

from .communicator import Communicator, PersistentRequest
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
        self._mine = _own(comm.rank, schedule, programs)
        self._sources = [s for s in comm.all_gather_object(self._mine) if s is not None]
        self._tables: dict[int, Tensor] = {}  # by rank, of those whose messages pass here
        self._requests: list[PersistentRequest] = []
        for source in self._sources:
            if source.rank != COLLECTOR and comm.rank in (source.rank, COLLECTOR):
                table = self._tables[source.rank] = torch.empty(source.count, dtype=torch.float64)
                if comm.rank == COLLECTOR:
                    self._requests.append(comm.recv_init(table, source.rank, tag))
                else:
                    self._requests.append(comm.send_init(table, COLLECTOR, tag))

    def exchange(self, outcome: StepOutcome) -> Mapping[str, list[tuple[int, int, float]]]:
        """Send this rank's terms; on rank 0 wait for everyone's and return them (elsewhere nothing)."""
        if self.comm.rank != COLLECTOR:
            self._send(outcome)
            return {}
        for request in self._requests:
            request.start()
        self.comm.wait(self._requests)
        found: dict[str, list[tuple[int, int, float]]] = {
            name: list(values) for name, values in outcome.terms.items()
        }
        for source in self._sources:
            if source.rank == COLLECTOR:
                continue
            values = iter(self._tables[source.rank].tolist())
            for name, pieces in source.terms:
                found.setdefault(name, []).extend((p.start, p.stop, next(values)) for p in pieces)
        return found

    def _send(self, outcome: StepOutcome) -> None:
        if self._mine is None:
            return
        self.flush()
        values = [value for name, _ in self._mine.terms for _, _, value in outcome.terms[name]]
        self._tables[self.comm.rank].numpy()[:] = values
        for request in self._requests:
            request.start()

    def flush(self) -> None:
        """Wait until the last message has been taken."""
        self.comm.wait(self._requests)


def _own(rank: int, schedule: Schedule, programs: Sequence[StageProgram]) -> _Source | None:
    terms = []
    for program in programs:
        if Report(program.stage) in schedule.programs[rank]:
            functions = program.evaluate if schedule.forward_only else program.train
            pieces = pieces_of(schedule, rank, program.stage)
            terms += [(name, pieces) for name in functions.terms]
    return _Source(rank, tuple(terms)) if terms else None
