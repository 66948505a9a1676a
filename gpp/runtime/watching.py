"""Whether a job still lives, and what is to be said when it does not: decisions and words, no sockets.

A `Watcher` is told what ranks say of themselves and when, and comes to a `Verdict` if the job cannot go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .doing import Doing, Place

COLLECT = (
    0.25  # seconds for ranks to say what they were at: mpirun kills survivors half a second after a death
)
MISMATCH = 5.0  # seconds in which nothing moves although a rank has left: nothing will
FAILED, DIED, SILENT = 1, 1, 1  # exit codes of the job


@dataclass(frozen=True, slots=True)
class Sight:
    """What a rank says of itself. `patience`: how many times as long as usual it may take."""

    count: int = 0
    place: Place = Place.SETUP
    waits: bool = False
    text: str = "starts"
    patience: float = 1.0


@dataclass(slots=True)
class Member:
    """A rank as the watcher knows it; seconds on the watcher's clock."""

    sight: Sight = field(default_factory=Sight)
    heard: float = 0.0  # when it spoke last
    moved: float = 0.0  # when its count grew last
    gone: bool = False  # its process has ended
    over: bool = False  # it said that it ends well
    failed: str | None = None
    shown: bool = False  # its traces are part of the text
    traces: str | None = None  # of all its threads, if it was asked


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the job ends: `headline` and one line a rank in `text`, `traces` of those that could say."""

    text: str
    traces: str
    code: int


@dataclass(frozen=True, slots=True)
class Rules:
    """`silence`: seconds after which a rank that says nothing, or a job in which nothing moves, has failed.
    `strict`: the calling program is ours too, so that time spent in it counts. `elastic`: deaths are for the
    survivors to deal with."""

    silence: float = 300.0
    strict: bool = False
    elastic: bool = False


class Watcher:
    """See the module. `hosts` are those of the ranks."""

    def __init__(self, hosts: Sequence[str], rules: Rules, now: float) -> None:
        self.rules = rules
        self.members = [Member(heard=now, moved=now) for _ in hosts]
        self.verdict: Verdict | None = None
        self.lost: tuple[int, ...] = ()
        self.stages: Sequence[str] = ()  # their names by rank, once they are known
        self._hosts = hosts
        self._headline: str | None = None
        self._code = FAILED
        self._until = 0.0
        self._culprits: tuple[int, ...] = ()
        self._dead = False  # the culprits are

    @property
    def is_asking(self) -> bool:
        """Whether ranks are to say what they are at: the job ends."""
        return self._headline is not None

    def saw(self, rank: int, sight: Sight, now: float) -> None:
        """A rank has spoken."""
        member = self.members[rank]
        member.heard = now
        before = member.sight
        if (sight.count, sight.place, sight.waits) != (before.count, before.place, before.waits):
            member.moved = now
        member.sight = sight

    def explained(self, rank: int, sight: Sight, traces: str, now: float) -> None:
        """A rank has said what it is at and where its threads are."""
        if self.members[rank].failed is None:  # else it has said what it was at, and where
            self.saw(rank, sight, now)
            self.members[rank].traces = traces

    def failed(self, rank: int, error: str, code: int, now: float, *, shown: bool = False) -> None:
        """A rank cannot go on, and says why; `shown`: what it explains is for everyone to read."""
        self.members[rank].failed, self.members[rank].shown = error, shown
        if self._headline is None:
            self._begin((rank,), f"rank {rank}: {error}", code, now)

    def ended(self, rank: int, now: float) -> None:
        """A rank's process, or the way to it, is gone."""
        member = self.members[rank]
        member.gone = True
        if member.over or member.failed is not None or member.sight.place is Place.LEFT:
            return
        if self._headline is None and self.rules.elastic:
            self.lost = (*self.lost, rank)
        elif self._headline is None:
            self._begin((rank,), self._deaths((rank,)), DIED, now)
            self._dead = True
        elif self._dead and self.verdict is None:  # a host takes all of its ranks with it
            self._culprits = (*self._culprits, rank)
            self._headline = self._deaths(self._culprits)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self._headline is None:
            self._judge(now)
        elif self.verdict is None and (now >= self._until or self._all_have_spoken()):
            self.verdict = self._conclude(now)

    def _all_have_spoken(self) -> bool:
        return all(m.traces is not None or m.failed is not None or m.gone or m.over for m in self.members)

    def _begin(self, culprits: tuple[int, ...], headline: str, code: int, now: float) -> None:
        self._culprits, self._headline, self._code = culprits, headline, code
        self._until = now + COLLECT

    def _deaths(self, ranks: Sequence[int]) -> str:
        many = len(ranks) > 1
        hosts = sorted({self._hosts[rank] for rank in ranks})
        host = "; or the host or its network is gone" if many else ""
        return (
            f"{_ranks(ranks)} on {', '.join(hosts)} ended without a word (killed from outside, out of "
            f"memory, a crash in native code, or os._exit{host}): the system's log says more (dmesg)"
        )

    def _judge(self, now: float) -> None:
        """Find who is silent, or that nothing will move any more."""
        left = [r for r, m in enumerate(self.members) if m.sight.place is Place.LEFT and not m.over]
        alive = [r for r, m in enumerate(self.members) if not (m.gone or m.over or r in left)]
        silence = self.rules.silence * max((self.members[r].sight.patience for r in alive), default=1.0)
        mute = [r for r in alive if now - self.members[r].heard > silence]
        if mute:
            self._begin(
                tuple(mute),
                f"{_ranks(mute)} on {', '.join(sorted({self._hosts[r] for r in mute}))} said nothing for "
                f"{silence:g} s (stopped, swapped out, or its host or network is gone)",
                SILENT,
                now,
            )
            return
        if not alive:
            return
        still = min(now - self.members[r].moved for r in alive)
        inside = [r for r in alive if self.members[r].sight.place is Place.INSIDE]
        outside = len(inside) < len(alive)
        busy = tuple(r for r in inside if not self.members[r].sight.waits)
        stuck = all(self.members[r].sight.waits for r in alive)  # for each other, or for those who left
        if left and stuck and still > min(MISMATCH, silence):
            self._begin(
                tuple(left),
                f"{_ranks(left)} left the pipeline while {_ranks(alive)} still {_wait(alive)} for it: "
                "every rank makes the same calls, and leaves the loop after the same step",
                FAILED,
                now,
            )
        elif any(self.members[r].sight.place is Place.SETUP for r in alive):
            return
        elif inside and still > silence and (self.rules.strict or not outside):
            others = tuple(r for r in alive if self.members[r].sight.place is Place.OUTSIDE)
            culprits = busy or others or tuple(inside)
            what = (
                f"{_ranks(culprits)} did not go on"
                if busy or others
                else f"{_ranks(inside)} wait for one another"
            )
            self._begin(culprits, f"nothing moved for {silence:g} s: {what}", SILENT, now)

    def _conclude(self, now: float) -> Verdict:
        lines = [self._line(rank, now) for rank in range(len(self.members))]
        shown = (
            lines if len(lines) <= 64 else [lines[r] for r in self._culprits] + [f"  ... {len(lines)} ranks"]
        )
        traces = [
            f"--- rank {rank}{self._of(rank)}: {m.sight.text}\n{m.traces.rstrip()}\n"
            for rank, m in enumerate(self.members)
            if m.traces
        ]
        said = [f"{m.traces}".rstrip() for m in (self.members[r] for r in self._culprits) if m.shown]
        return Verdict("\n".join([f"{self._headline}", *shown, *said]), "\n".join(traces), self._code)

    def _line(self, rank: int, now: float) -> str:
        member = self.members[rank]
        sight = member.sight
        for_so_long = f", for {now - member.moved:.1f} s" if now - member.moved >= 1.0 else ""
        if member.over:
            end = "had ended well"
        elif member.gone:
            end = f"is gone; {now - member.heard:.1f} s ago: {sight.text}"
        elif member.failed is not None:
            first = rank not in self._culprits
            why = f" ({member.failed.splitlines()[-1]})" if first and member.failed else ""
            end = f"failed{why}; {sight.text}"
        elif member.traces is None:
            end = f"does not answer; {now - member.heard:.1f} s ago: {sight.text}"
        else:
            end = f"{sight.text}{for_so_long}"
        return f"  rank {rank}{self._of(rank)}: {end}"

    def _of(self, rank: int) -> str:
        name = self.stages[rank] if rank < len(self.stages) else ""
        return f" ({name})" if name else ""


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _wait(ranks: Sequence[int]) -> str:
    return "waits" if len(ranks) == 1 else "wait"


def sight_of(doing: Doing) -> Sight:
    """A rank as it is now. Who waits for messages between two calls of the pipeline is in a part of one."""
    waits = bool(doing.waits)
    place = Place.INSIDE if waits and doing.place is Place.OUTSIDE else doing.place
    return Sight(doing.count, place, waits, doing.text(), doing.patience)


def sight_to_json(sight: Sight) -> dict[str, object]:
    """For a message."""
    return {
        "count": sight.count,
        "place": sight.place.value,
        "waits": sight.waits,
        "text": sight.text,
        "patience": sight.patience,
    }


def sight_from_json(found: Mapping[str, object]) -> Sight:
    """What `sight_to_json` made."""
    return Sight(
        int(str(found["count"])),
        Place(str(found["place"])),
        bool(found["waits"]),
        str(found["text"]),
        float(str(found["patience"])),
    )
