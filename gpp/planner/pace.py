"""How long a step takes, from a few numbers a stage: what the search asks thousands of times.

The same step as `gpp.simulate`'s for stages with one micro-batch size, devices of their own and static
orders, without instructions, messages or replicas: these only wait for each other. Long mini-batches are cut
short and the steady state is extrapolated, so an answer is for comparing; `estimate.estimated` has the last
word.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

STEPS = 2  # the first fills the pipeline, the second meets the end of the one before


@dataclass(frozen=True, slots=True)
class Beat:
    """A stage on the clock: seconds of a micro-batch's passes, and of the all-reduce and the update that end
    a step. One that does not train has only forwards."""

    forward: float
    input: float
    weight: float
    reduce: float
    update: float
    trains: bool = True

    @property
    def busy(self) -> float:
        """Seconds of one micro-batch."""
        return self.forward + self.input + self.weight


@dataclass(frozen=True, slots=True)
class Hop:
    """An edge on the clock: seconds of a message there and back; `back` None: nothing returns."""

    source: int
    target: int
    there: float
    back: float | None


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, and the run that took them."""

    seconds: float
    run: "_Run"

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """How many seconds each stage's work takes on the longest chain of waits of (about) a step."""
        return self.run.shares()


# what a stage does next; the last ends its step. A weight half waits for nobody: it goes with an input half
_FORWARD, _BACKWARD, _END = range(3)
_KINDS = 3
_Ways = tuple[tuple[int, int, bool], ...]  # edges: source, target, whether gradients return


def pace(
    beats: Sequence[Beat],
    hops: Sequence[Hop],
    warms: Sequence[int],
    lags: Sequence[int],
    rounds: int,
    *,
    meeting: float | None = None,
) -> Pace:
    """The step of `rounds` micro-batches. Stages in a topological order; each has `warms` micro-batches
    before its first backward, and its weight half trails by `lags` (0: the backward in one go).

    `meeting`: seconds of what all stages must agree on before they update; None: nothing. Raises ValueError
    for warm-ups that deadlock. O(tasks x edges of a stage): about a microsecond a task.
    """
    short = min(rounds, 2 * min(max(warms), rounds) + max(lags) + 4)
    ways = tuple((hop.source, hop.target, hop.back is not None) for hop in hops)
    tasks = _tasks(ways, tuple(warms), tuple(beat.trains for beat in beats), short)
    run = _Run(beats, hops, [min(lag, short) for lag in lags], meeting)
    seconds = run.timed(tasks)
    if short < rounds:
        seconds += (rounds - short) * run.period(len(tasks), short, warms)
    return Pace(seconds, run)


class _Run:
    """The clocks of all stages."""

    def __init__(
        self, beats: Sequence[Beat], hops: Sequence[Hop], lags: Sequence[int], meeting: float | None
    ) -> None:
        self.beats, self.meeting = beats, meeting
        self.steps = STEPS if meeting is None else 1
        self.now = [0.0 if meeting is None else beat.update for beat in beats]
        self.lags = lags
        self.queues: list[deque[float]] = [deque() for _ in range(2 * len(hops))]
        sent: list[list[list[tuple[int, deque[float], float]]]] = [[[], []] for _ in beats]
        self.read: list[list[list[int]]] = [[[], []] for _ in beats]
        for e, hop in enumerate(hops):  # queue 2 e goes along edge e, 2 e + 1 back
            sent[hop.source][_FORWARD].append((2 * e, self.queues[2 * e], hop.there))
            self.read[hop.target][_FORWARD].append(2 * e)
            if hop.back is not None:
                sent[hop.target][_BACKWARD].append((2 * e + 1, self.queues[2 * e + 1], hop.back))
                self.read[hop.source][_BACKWARD].append(2 * e + 1)
        # by stage and kind: what it reads, its seconds, what it sends, and what it does after that
        self.acts = []
        for s, beat in enumerate(beats):
            end = beat.reduce + (beat.update if meeting is None else 0.0)
            later = beat.weight if lags[s] else 0.0
            times = (beat.forward, beat.input + beat.weight - later)
            for kind in (_FORWARD, _BACKWARD):
                queues = tuple(self.queues[q] for q in self.read[s][kind])
                self.acts.append((s, queues, times[kind], tuple(sent[s][kind]), kind * later))
            self.acts.append((s, (), lags[s] * beat.weight + end, (), 0.0))
        self.log: list[tuple[int, float, float, float]] = []  # task; when free, begun, done with it

    def timed(self, tasks: Sequence[int]) -> float:
        """Between the last two updates of the stage where it is longest."""
        now, acts, log = self.now, self.acts, self.log
        last = [0.0] * len(self.queues)
        ends: list[list[float]] = []
        for _ in range(self.steps):
            left = list(self.lags)
            for task in tasks:
                s, read, seconds, sent, later = acts[task]
                start = free = now[s]
                for queue in read:
                    arrival = queue.popleft()
                    if arrival > start:
                        start = arrival
                time = start + seconds
                for q, queue, travel in sent:
                    leaves = last[q]
                    if time > leaves:
                        leaves = time
                    last[q] = leaves = leaves + travel
                    queue.append(leaves)
                if later:
                    if left[s]:
                        left[s] -= 1
                    else:
                        time += later
                now[s] = time
                log.append((task, free, start, time))
            ends.append(list(now))
        if self.meeting is not None:  # what updates after the meeting starts that much later
            return max(now) + self.meeting
        return max(b - a for a, b in zip(ends[-2], ends[-1], strict=True))

    def period(self, tasks: int, rounds: int, warms: Sequence[int]) -> float:
        """Seconds from backward to backward of the busiest stage while forwards still come."""
        s = max(range(len(self.beats)), key=lambda s: self.beats[s].busy)
        done = [end for task, _, _, end in self.log[:tasks] if task == s * _KINDS + _BACKWARD]
        steady = min(rounds - min(warms[s], rounds), len(done))
        first, last = steady // 2, steady - 1
        rate = (done[last] - done[first]) / (last - first) if last > first else 0.0
        return max(self.beats[s].busy, rate)

    def shares(self) -> tuple[float, ...]:
        """Walk back one step from the last end through whatever each task waited for."""
        log = self.log
        latest = [-1] * len(self.beats)
        sent: list[list[int]] = [[] for _ in self.queues]  # the tasks that sent
        taken = [0] * len(self.queues)
        causes: list[int] = []
        for i, (task, free, start, _) in enumerate(log):
            s, kind = divmod(task, _KINDS)
            cause = latest[s]
            latest[s] = i
            if kind != _END:
                senders = []
                for q in self.read[s][kind]:
                    senders.append(sent[q][taken[q]])
                    taken[q] += 1
                if start > free and senders:
                    cause = max(senders, key=lambda j: log[j][3])
                for q, _, _ in self.acts[task][3]:
                    sent[q].append(i)
            causes.append(cause)
        found = [0.0] * len(self.beats)
        at = max(range(len(log)), key=lambda i: log[i][3])
        until = log[at][3] * (1 - 1 / self.steps)
        while at >= 0 and log[at][3] > until:
            task, _, start, end = log[at]
            found[task // _KINDS] += end - start
            at = causes[at]
        return tuple(found)


@lru_cache(maxsize=512)
def _tasks(ways: _Ways, warms: tuple[int, ...], trains: tuple[bool, ...], rounds: int) -> tuple[int, ...]:
    """All tasks of a step in an order in which each comes after what it waits for. Raises ValueError if there
    is none."""
    orders = [
        _order(min(warm, rounds), rounds) if learns else (_FORWARD,) * rounds + (_END,)
        for warm, learns in zip(warms, trains, strict=True)
    ]
    read: list[list[list[int]]] = [[[], [], []] for _ in warms]
    sent: list[list[list[int]]] = [[[], [], []] for _ in warms]
    for e, (source, target, returns) in enumerate(ways):
        read[target][_FORWARD].append(2 * e)
        sent[source][_FORWARD].append(2 * e)
        if returns:
            read[source][_BACKWARD].append(2 * e + 1)
            sent[target][_BACKWARD].append(2 * e + 1)
    waiting = [0] * (2 * len(ways))
    position = [0] * len(warms)
    found: list[int] = []
    moved = True
    while moved:
        moved = False
        for s in (*range(len(warms)), *reversed(range(len(warms)))):
            order, at = orders[s], position[s]
            while at < len(order):
                kind = order[at]
                if not all(waiting[q] for q in read[s][kind]):
                    break
                for q in read[s][kind]:
                    waiting[q] -= 1
                for q in sent[s][kind]:
                    waiting[q] += 1
                found.append(s * _KINDS + kind)
                at += 1
                moved = True
            position[s] = at
    if any(at < len(order) for at, order in zip(position, orders, strict=True)):
        raise ValueError("the warm-ups of these stages deadlock")
    return tuple(found)


@cache
def _order(warm: int, rounds: int) -> tuple[int, ...]:
    """`gpp.schedule.static`'s, as numbers, without the weight halves."""
    tasks = [_FORWARD] * warm
    for j in range(rounds):
        tasks.append(_BACKWARD)
        if warm + j < rounds:
            tasks.append(_FORWARD)
    return (*tasks, _END)
