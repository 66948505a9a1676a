"""Of all that the ranks have seen in a step that was not finite, where it began; in a sentence."""

from collections.abc import Callable, Iterable, Sequence

from gpp.plan import StageGraph
from gpp.program.nonfinite import Given, Made, Passed, Place, Source
from gpp.schedule.task import Samples

from .inspection import Found, Name

_Key = tuple[bool, bool, int, int, int]


class Culprits:
    """Follows the sources of what was not finite in the loss and in the gradients, over ranks, to where all
    was still finite. What is infinite on purpose is passed over, unless nothing else is left."""

    def __init__(self, found: Sequence[Found]) -> None:
        self._sent: dict[Name, list[tuple[Samples, tuple[Source, ...]]]] = {}
        for part in found:
            for name, values in part.sent.items():
                self._sent.setdefault(name, []).extend(values)
        self._known: dict[Source, frozenset[Source]] = {}
        self._ends = list(dict.fromkeys(end for part in found for end in part.ends))

    def first(self) -> Source | None:
        """The first: forward before backward, by the order of stages, by samples, in the order of the graph.
        None where nobody has seen anything."""
        roots = self._roots(self._ends)
        return min(roots, key=_order, default=None)

    def became(self, root: Source) -> Made | None:
        """The first operator that made what is no number of what was infinite because of `root`."""
        made = [s for s in self._known if isinstance(s, Made) and s.of and root in self._roots(s.of)]
        return min(made, key=_order, default=None)

    def infinite(self, root: Made) -> Source | None:
        """What was infinite, on purpose, when `root` made no number of it."""
        return min(self._roots(root.of), key=_order, default=None)

    def _roots(self, sources: Iterable[Source]) -> frozenset[Source]:
        return frozenset(root for source in sources for root in self._root(source))

    def _root(self, source: Source) -> frozenset[Source]:
        if source not in self._known:
            self._known[source] = frozenset((source,))  # for a source of itself, which there is none
            match source:
                case Passed():
                    before = [
                        s
                        for samples, sources in self._sent.get((source.gradient, source.name), ())
                        if samples.intersection(source.samples) is not None
                        for s in sources
                    ]
                    self._known[source] = self._roots(before) or frozenset((source,))
                case Made() if source.of:
                    blamed = frozenset(root for root in self._roots(source.of) if not _meant(root))
                    self._known[source] = blamed or frozenset((source,))
                case _:
                    pass
        return self._known[source]


def _meant(source: Source) -> bool:
    match source:
        case Made():
            return source.meant
        case Given():
            return source.what in ("buffer", "constant") and not source.nan
        case _:
            return False


def _order(source: Source) -> _Key:
    match source:
        case Passed():
            return (True, True, 0, source.samples.start, 0)
        case Given():
            return (_meant(source), False, source.place.stage, source.samples.start, -1)
        case Made():
            back = source.place.backward
            stage = -source.place.stage if back else source.place.stage
            return (_meant(source), back, stage, source.place.samples.start, source.order)


def described(culprits: Culprits, graph: StageGraph) -> str | None:
    """The first culprit in a sentence; None where there is none."""
    root = culprits.first()

    def where(place: Place) -> str:
        return f"stage {place.stage} ({graph.stages[place.stage].name}) on rank {place.rank}"

    match root:
        case None | Passed():
            return None
        case Given():
            text = _given(root, where)
        case Made():
            text = _made(root, where)
            before = culprits.infinite(root)
            if isinstance(before, Made):
                text += f", put there by {before.target} of {before.owner}"
            elif isinstance(before, Given):
                text += f", of the {before.what} {before.name}"
    if (later := culprits.became(root)) is not None:
        text += f"; it became NaN in {_operator(later)}, {where(later.place)}"
    return text


def _given(root: Given, where: Callable[[Place], str]) -> str:
    kind = "NaN" if root.nan else "infinity"
    if root.what == "key":
        return (
            f"key {root.name!r} of the batch holds {kind} in {_samples(root.samples)} ({where(root.place)})"
        )
    return f"{root.what} {root.name} of {where(root.place)} held {kind} before this step"


def _made(root: Made, where: Callable[[Place], str]) -> str:
    way = "backward" if root.place.backward else "forward"
    of = "infinite values" if root.of else "finite values"
    kind = "NaN" if root.nan else "infinity"
    return (
        f"{_operator(root)} was the first to make {kind}, in the {way} of {where(root.place)}, "
        f"{_samples(root.place.samples)}, of {of}"
    )


def _operator(made: Made) -> str:
    return f"{made.owner}: {made.target}" if made.owner else made.target


def _samples(samples: Samples) -> str:
    if len(samples) == 1:
        return f"sample {samples.start} of the mini-batch"
    return f"samples {samples.start} to {samples.stop - 1} of the mini-batch"
