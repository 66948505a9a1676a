"""Which fault strikes which rank of which job, where and when: records, and their choice from a seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

STEPS = 9
EVERY = 2  # steps between two checkpoints; the last step has one too
KEEP = 2  # checkpoints that stay
SILENCE = 3.0  # seconds after which a silent rank has failed,
SETUP_SILENCE = 10.0  # and before training, where a busy machine keeps threads from speaking
PIECES = 4  # micro-batches of a step


class Shape(StrEnum):
    """Of a job's stages."""

    CHAIN = "chain"  # three stages in a row
    DIAMOND = "diamond"  # a stem, two branches and a head, with split backwards
    REPLICAS = "replicas"  # two replicas of a stage, and a head, with split backwards


class Place(StrEnum):
    """What the rank is about to do when the fault comes, or is in the middle of."""

    SETUP = "set-up"  # it captures the model
    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT = "weight half"
    SEND = "send"
    RECEIVE = "receive"
    REDUCE = "all-reduce"
    UPDATE = "update"
    READ = "reading a sample"
    LOSSES = "losses"
    STOPPING = "stopping early"  # another rank was asked to, as by SIGTERM
    EVALUATION = "evaluation"
    COPY = "copy for a checkpoint"
    BYTES = "bytes of a tensor file"
    PART = "part of the manifest"
    MANIFEST = "manifest"
    RENAME = "before the rename"
    PRUNE = "after the rename"
    LEAVING = "before the end"
    CLOSED = "after the end"
    MOMENT = "any moment"


class Fault(StrEnum):
    """What happens there."""

    KILL = "SIGKILL"
    EXIT_0 = "os._exit(0)"
    EXIT_7 = "os._exit(7)"
    ABORT = "SIGABRT"
    RUNTIME = "RuntimeError"
    VALUE = "ValueError"
    SYS_EXIT = "sys.exit(5)"
    MEMORY = "out of memory"
    HANG = "hang"
    STOP = "SIGSTOP"


RANKS = {Shape.CHAIN: 3, Shape.DIAMOND: 4, Shape.REPLICAS: 3}
READERS = {Shape.CHAIN: (0, 2), Shape.DIAMOND: (0, 3), Shape.REPLICAS: (0, 1, 2)}
SPLITTERS = {Shape.DIAMOND: (1, 2, 3), Shape.REPLICAS: (2,)}  # a first stage has no input half
DEATHS = (Fault.KILL, Fault.EXIT_0, Fault.EXIT_7, Fault.ABORT)
SILENT = (Fault.HANG, Fault.STOP)
FIRST_RANK = (Place.MANIFEST, Place.RENAME, Place.PRUNE)  # what no other rank does
WRITING = (Place.BYTES, Place.PART, *FIRST_RANK)  # by a thread of a checkpoint
ONCE = (Place.SETUP, Place.STOPPING, Place.LEAVING, Place.CLOSED, Place.MOMENT)
PIECEWISE = (Place.FORWARD, Place.BACKWARD, Place.WEIGHT, Place.SEND, Place.RECEIVE)
# Nobody can say how long set-up may take or the user's own program; when all is over nobody watches; and an
# exception comes from somewhere.
NOT = {
    Place.SETUP: (Fault.HANG,),
    Place.LEAVING: (Fault.HANG,),
    Place.CLOSED: (*SILENT, Fault.EXIT_0, Fault.SYS_EXIT),
    Place.MOMENT: (Fault.RUNTIME, Fault.VALUE, Fault.SYS_EXIT, Fault.MEMORY, Fault.HANG),
}
ELASTIC = tuple(place for place in Place if place not in ONCE)
LONGEST = 6.0  # seconds from a rank's start to a fault at any moment
WITHIN = 10.0  # seconds in which all ranks are to end, beside the silence of a silent one
GO_ON = 60.0  # seconds that survivors may take to end the training
OVERLAP = 0.4  # seconds between two faults, in which the first may be being reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fault in one job. It comes when the rank is there for the `occurrence`-th time, from 0; within what
    is being written after that `share` of the bytes, and at any moment after that share of LONGEST. `second`
    is a rank that is killed `delay` seconds later. `elastic`: the others are to go on."""

    number: int
    shape: Shape
    rank: int
    place: Place
    fault: Fault
    occurrence: int
    share: float
    elastic: bool = False
    second: int | None = None
    delay: float = 0.0

    @property
    def text(self) -> str:
        """In words, for a line of a log."""
        more = [f"and rank {self.second} {self.delay:.2f} s later"] if self.second is not None else []
        more += ["elastic"] if self.elastic else []
        return ", ".join(
            [
                f"case {self.number}: {self.shape}, rank {self.rank}, {self.place} {self.occurrence}",
                self.fault,
                *more,
            ]
        )


def kinds() -> tuple[tuple[Place, Fault], ...]:
    """Every place with every fault that it can have."""
    return tuple((place, fault) for place in Place for fault in Fault if fault not in NOT.get(place, ()))


def elastic_kinds() -> tuple[tuple[Place, Fault], ...]:
    """Those that the other ranks are to survive."""
    return tuple((place, fault) for place in ELASTIC for fault in DEATHS)


def chosen(count: int, seed: int) -> tuple[Case, ...]:
    """So many cases: places, faults and shapes as evenly as may be. One in eight is elastic, and in one in
    twelve of the others a second rank is killed too. The first n are the same however many are asked for."""
    draw = random.Random(seed)
    plain, elastic = _endlessly(kinds(), draw), _endlessly(elastic_kinds(), draw)
    shapes = _endlessly(tuple(Shape), draw)
    found = []
    for number in range(count):
        survives = number % 8 == 7
        place, fault = next(elastic if survives else plain)
        shape = _fitting(place, shapes)
        rank = draw.choice(ranks(shape, place))
        others = [other for other in range(RANKS[shape]) if other != rank]
        double = not survives and number % 12 == 5 and place is not Place.CLOSED
        found.append(
            Case(
                number=number,
                shape=shape,
                rank=rank,
                place=place,
                fault=fault,
                occurrence=draw.randrange(occurrences(place)),
                share=draw.random(),
                elastic=survives,
                second=draw.choice(others) if double else None,
                delay=draw.uniform(0.0, OVERLAP) if double else 0.0,
            )
        )
    return tuple(found)


def patience(case: Case) -> float:
    """Seconds from a case's fault in which its ranks are to end."""
    if case.elastic:
        return GO_ON
    if case.place is Place.SETUP and case.fault not in DEATHS:
        return WITHIN + SETUP_SILENCE  # what is raised in set-up is said when all ranks have got so far
    if case.fault not in SILENT:
        return WITHIN
    return WITHIN + (SETUP_SILENCE if case.place in (Place.SETUP, Place.MOMENT) else SILENCE)


def ranks(shape: Shape, place: Place) -> Sequence[int]:
    """Those that come to a place."""
    if place in FIRST_RANK:
        return (0,)
    if place is Place.PART:
        return range(1, RANKS[shape])
    if place is Place.WEIGHT:
        return SPLITTERS.get(shape, ())
    return READERS[shape] if place is Place.READ else range(RANKS[shape])


def occurrences(place: Place) -> int:
    """How often, at least, each of those ranks comes there."""
    if place in ONCE:
        return 1
    if place in PIECEWISE:
        return STEPS * PIECES
    if place is Place.COPY or place in WRITING:
        return (STEPS + EVERY - 1) // EVERY
    return 2 if place is Place.EVALUATION else STEPS


def _fitting(place: Place, shapes: Iterator[Shape]) -> Shape:
    return next(shape for shape in shapes if ranks(shape, place))


def _endlessly(items: tuple[T, ...], draw: random.Random) -> Iterator[T]:
    """All of them in a random order, again and again."""
    while True:
        yield from draw.sample(items, len(items))


def numbered(number: int, seed: int) -> Case:
    """One of the cases of a seed."""
    return next(islice(chosen(number + 1, seed), number, None))
