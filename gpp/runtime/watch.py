"""A thread of every process that tells two of them, the first rank and a deputy, how it is: so that no rank
waits for one that is gone, and one report says why a job has ended.

The deputy is on another host where there is one. It takes over when the first rank is lost.
"""

import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import socketpair
from typing import Any

from .doing import Doing, Place
from .halt import Board, Halt
from .last_words import spoken
from .sideband import Exchange, Line, Message, selector
from .watching import Rules, Sight, Verdict, Watcher, sight_from_json, sight_of, sight_to_json

BEAT = 0.2  # seconds between two looks
MANY = 64  # ranks, beyond which they speak more seldom
NEWS = 1.0  # seconds after which a rank speaks though nothing is new
SIGNS = 4  # of life at least, within the time after which one is missed
PARDON = 1.5  # times the silence of others is allowed to who watches: else both would report it
LAST = 5.0  # seconds for the report, before a failing rank ends the job by itself
TURN, TURNS = 0.5, 4  # seconds that one rank gives each before it, and how many of these
DEEPEST = 30  # calls shown of a thread


def hubs_of(hosts: Sequence[str]) -> tuple[int, ...]:
    """Who watches: the first rank, and a deputy."""
    others = [rank for rank, host in enumerate(hosts) if host != hosts[0]]
    return (0, others[0] if others else 1) if len(hosts) > 1 else (0,)


@dataclass(frozen=True, slots=True)
class Survivors:
    """The ranks that are left, and whether MPI knows on all of them that the others are not."""

    ranks: tuple[int, ...]
    known: bool


class Watch:
    """One rank's. `lines` lead to those who watch, `exchange` is where they come together if that is here.
    `abort(code)` ends the job; it is called in the watch's own thread."""

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        doing: Doing,
        abort: Callable[[int], None],
        exchange: Exchange | None,
    ) -> None:
        self.rank = rank
        self.lost: tuple[int, ...] = ()  # ranks that are gone, if it is for the others to go on
        self.rules = Rules()
        self.folder: Path | None = None  # of the report's file
        self.halt = Halt(
            lambda reason: self._say({"kind": "stop", "reason": reason}),
            lambda steps: self._say({"kind": "begun", "steps": steps}),
        )
        self._hosts, self._doing, self._abort, self._exchange = hosts, doing, abort, exchange
        self._hubs = hubs_of(hosts)
        self._lines: dict[int, Line] = {}  # to those who watch, by rank
        self._own: dict[int, Line] = {}  # of those who are watched here, by rank
        self._watcher = Watcher(hosts, self.rules, time.monotonic()) if exchange is not None else None
        self._board = Board(len(hosts), self._pause, self._until)
        self._asked = False
        self._ready: dict[int, bool] = {}  # ranks that have seen that others are lost; whether MPI has too
        self._survivors: Survivors | None = None
        self._announced: tuple[int, ...] = ()
        self._said: tuple[Sight, float] = (Sight(count=-1), 0.0)
        self._queue: SimpleQueue[Message] = SimpleQueue()
        self._bell, self._ear = socketpair()
        self._bell.setblocking(False)
        self._closing = threading.Event()
        self._interval = BEAT * max(1.0, len(hosts) / MANY)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin; lines may be added afterwards."""
        self._thread.start()

    def add(self, hub: int, line: Line) -> None:
        """The way to one who watches."""
        line.partner = hub
        self._say({"kind": "line", "hub": hub, "line": line})

    def configure(self, rules: Rules, folder: Path | None = None) -> None:
        """How patient the watch is, on every rank alike, and where the report's file goes."""
        self.rules, self.folder = rules, folder
        if self._watcher is not None:
            self._watcher.rules = rules

    def fail(self, error: str, details: str, code: int, *, shown: bool) -> None:
        """This rank cannot go on: the report, and the end of the job. Returns only if nobody made them."""
        self._say({"kind": "failed", "error": error, "details": details, "code": code, "shown": shown})
        self._thread.join(LAST)

    def survivors(self, *, known: bool) -> "Survivors | None":
        """Who is left, the same on all of them, once each has asked; None where all who watch are among the
        lost. `known`: here MPI knows of those. Waits: if a rank never asks, the watch ends the job."""
        self._say({"kind": "ready", "known": known})
        while self._survivors is None and (self._lines or not self._queue.empty()):
            time.sleep(self._interval / 4)
        return self._survivors

    def leave(self) -> None:
        """This process ends, and MPI lets it wait for the others. Who watches does so until they come too, or
        will not."""
        left(self._doing)
        self._say({"kind": "sight"})
        while self._thread.is_alive() and self._has_to_stay():
            time.sleep(self._interval / 4)

    def _has_to_stay(self) -> bool:
        if not self._queue.empty() or self._said[0].place is not Place.LEFT:
            return not self._closing.is_set()
        if self._watcher is None or self._hubs[0] != self.rank:
            return False
        return not all(m.over or m.gone or m.sight.place is Place.LEFT for m in self._watcher.members)

    def close(self) -> None:
        """The job ends well for this rank: called by all ranks, after the last message."""
        self._say({"kind": "over"})
        self._closing.set()
        self._thread.join(LAST)

    # What follows runs in the watch's own thread, but for `_say`.

    def _say(self, message: Message) -> None:
        self._queue.put(message)
        try:
            self._bell.send(b"!")
        except OSError:  # full: it is awake; or closed
            pass

    def _run(self) -> None:
        with selector() as ready:
            ready.register(self._ear, 1)
            if self._exchange is not None:
                ready.register(self._exchange, 1)
            while not (self._closing.is_set() and self._queue.empty()):
                for key, _ in ready.select(min(self._interval, self.rules.silence / SIGNS)):
                    self._take(key.fileobj, ready)
                while True:
                    try:
                        self._deal(self._queue.get_nowait(), ready)
                    except Empty:
                        break
                self._beat()
                self._look()
        for line in (*self._lines.values(), *self._own.values()):
            line.close()
        if self._exchange is not None:
            self._exchange.close()
        self._bell.close()
        self._ear.close()

    def _take(self, source: Any, ready: Any) -> None:
        if source is self._ear:
            self._ear.recv(4096)
        elif isinstance(source, Exchange):
            line = source.accept()
            if line is not None:
                self._own[line.partner] = line
                ready.register(line, 1)
        elif isinstance(source, Line):
            for message in source.read():
                if self._own.get(source.partner) is source:
                    self._hear(source.partner, message)
                else:
                    self._obey(source, message)
            if not source.open:
                self._broken(source, ready)

    def _broken(self, line: Line, ready: Any) -> None:
        for key in list(ready.get_map().values()):
            if key.fileobj is line:
                ready.unregister(line)
        if self._own.get(line.partner) is line:
            del self._own[line.partner]
            if self._watcher is not None:
                self._watcher.ended(line.partner, time.monotonic())
            return
        hub = next((hub for hub, known in self._lines.items() if known is line), None)
        if hub is not None:
            del self._lines[hub]
            if not self._lines and not self._closing.is_set():
                self._alone()

    def _alone(self) -> None:
        """Those who watch are gone. The first of the others says so, and ends the job: a later one only if
        nobody has."""
        if self.rules.elastic:
            self.lost = self._hubs
            return
        earlier = self.rank - sum(hub < self.rank for hub in self._hubs)
        time.sleep(TURN * min(earlier, TURNS))
        print(
            f"error: ranks {' and '.join(map(str, self._hubs))}, which watch over the job, are gone: rank "
            f"{self.rank} ends it",
            file=sys.__stderr__,
            flush=True,
        )
        self._end(1)

    def _deal(self, message: Message, ready: Any) -> None:
        """What this process's other threads say."""
        match message["kind"]:
            case "line":
                self._lines[message["hub"]] = message["line"]
                ready.register(message["line"], 1)
            case "over":
                for line in self._lines.values():
                    line.send(message)
                for line in self._own.values():
                    line.send({"kind": "closing"})
            case "ready":  # whoever acts by now: the one who did may be among the lost
                for line in self._lines.values():
                    line.send(message)
            case "sight":
                pass  # it woke up, and says it anyway
            case "failed":
                self._tell({**message, "sight": sight_to_json(self._sight())})
            case _:
                self._tell(message)

    def _tell(self, message: Message) -> None:
        """Say something to the first who watches and is there."""
        hub = next((hub for hub in self._hubs if hub in self._lines), None)
        if hub is not None:
            self._lines[hub].send(message)

    def _beat(self) -> None:
        sight, now = self._sight(), time.monotonic()
        if sight != self._said[0] or now - self._said[1] >= min(NEWS, self.rules.silence / SIGNS):
            self._said = sight, now
            for line in self._lines.values():
                line.send({"kind": "sight", "sight": sight_to_json(sight)})

    def _sight(self) -> Sight:
        return sight_of(self._doing)

    def _obey(self, line: Line, message: Message) -> None:
        """What one who watches says."""
        match message.get("kind"):
            case "explain":
                line.send({"kind": "explained", "sight": sight_to_json(self._sight()), "traces": traces()})
            case "lost":
                self.lost = tuple(message["ranks"])
            case "survivors":
                self._survivors = Survivors(tuple(message["ranks"]), message["known"])
            case "pause":
                self.halt.paused(message["reason"])
            case "until":
                self.halt.until(message["steps"])
            case "end":
                self._end(message["code"])
            case "closing":
                self._closing.set()  # before it hangs up: it is not lost
            case _:
                pass

    def _hear(self, rank: int, message: Message) -> None:
        """What one who is watched says."""
        watcher, now = self._watcher, time.monotonic()
        assert watcher is not None
        match message.get("kind"):
            case "sight":
                watcher.saw(rank, sight_from_json(message["sight"]), now)
            case "explained":
                watcher.explained(rank, sight_from_json(message["sight"]), message["traces"], now)
            case "failed":
                watcher.explained(rank, sight_from_json(message["sight"]), message["details"], now)
                watcher.failed(rank, message["error"], message["code"], now, shown=message["shown"])
            case "ready":
                self._ready[rank] = bool(message["known"])
            case "over":
                watcher.members[rank].over = True
            case "stop":
                self._board.ask(message["reason"])
            case "begun":
                self._board.begun(rank, message["steps"])
            case _:
                pass

    def _look(self) -> None:
        """What whoever watches does with what it knows, if nobody before it is there to do so."""
        watcher = self._watcher
        if watcher is None or self._closing.is_set() or not self._acts(watcher):
            return
        watcher.stages = self._doing.stages
        watcher.tick(time.monotonic())
        if watcher.lost != self._announced:
            self._announced = watcher.lost
            self._to_all({"kind": "lost", "ranks": watcher.lost})
        left_ones = [rank for rank, member in enumerate(watcher.members) if not member.gone]
        if self._survivors is None and self._ready and set(self._ready).issuperset(left_ones):
            known = all(self._ready[rank] for rank in left_ones)
            self._to_all({"kind": "survivors", "ranks": left_ones, "known": known})
        if watcher.is_asking and not self._asked:
            self._asked = True
            self._to_all({"kind": "explain"})
        if watcher.verdict is not None:
            self._report(watcher.verdict)
            self._to_all({"kind": "end", "code": watcher.verdict.code})
            self._end(watcher.verdict.code)

    def _acts(self, watcher: Watcher) -> bool:
        """Whether those who watch before this rank are gone, or have been silent for longer than they would
        let others be."""
        silence = PARDON * self.rules.silence * max(member.sight.patience for member in watcher.members)
        now = time.monotonic()
        before = [watcher.members[hub] for hub in self._hubs[: self._hubs.index(self.rank)]]
        return all(member.gone or now - member.heard > silence for member in before)

    def _pause(self, reason: str) -> None:
        self._to_all({"kind": "pause", "reason": reason})

    def _until(self, steps: int) -> None:
        self._to_all({"kind": "until", "steps": steps})

    def _to_all(self, message: Message) -> None:
        for line in list(self._own.values()):
            line.send(message)

    def _report(self, verdict: Verdict) -> None:
        print(f"error: {written(verdict, self.folder)}", file=sys.__stderr__, flush=True)

    def _end(self, code: int) -> None:
        """End this process, and the job if this is who watches."""
        watches = self._watcher is not None and self._acts(self._watcher)
        spoken()
        if watches:
            threading.Timer(1.0, os._exit, (code,)).start()  # in case the library does not return
            self._abort(code)
        os._exit(code)


def written(verdict: Verdict, folder: Path | None) -> str:
    """The verdict's text; its traces are in a file that the text names, or at its end."""
    if not verdict.traces:
        return verdict.text
    place = Path(tempfile.gettempdir()) if folder is None else folder
    file = place / ("failure.txt" if folder is not None else f"failure-{os.getpid()}.txt")
    try:
        file.write_text(f"{verdict.text}\n\n{verdict.traces}")
    except OSError:
        return f"{verdict.text}\n\n{verdict.traces}"
    return f"{verdict.text}\nwhere each rank was in the code: {file}"


def traces(only: int | None = None) -> str:
    """Where the threads of this process are in the code, or one of them."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own, parts = threading.get_ident(), []
    for ident, frame in sys._current_frames().items():
        if ident != own and only in (None, ident):
            where = "".join(traceback.format_stack(frame)[-DEEPEST:])
            parts.append(f"thread {names.get(ident, ident)}:\n{where}")
    return "".join(parts)


def left(doing: Doing) -> None:
    """This process will send no more messages."""
    doing.place = Place.LEFT
    doing.now("has left the pipeline")
