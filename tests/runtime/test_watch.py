"""The watch over sockets: threads of this process stand for ranks."""

import io
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gpp.runtime.communicator import CommunicationError
from gpp.runtime.doing import Place
from gpp.runtime.loopback import LoopbackCommunicator, LoopbackWorld, run
from gpp.runtime.sideband import Exchange, Line, call, own_addresses
from gpp.runtime.watch import Watch, hubs_of, left
from gpp.runtime.watch_start import OFF, begin_watch
from gpp.runtime.watching import Rules

WITHIN = 20.0


class EndedError(Exception):
    """In place of the end of the process."""


@contextmanager
def watches(size: int, ends: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watch]]:
    """Those of a job of so many ranks; `ends` gets (rank, code) of those that end."""

    def end(self: Watch, code: int) -> None:
        ends.append((self.rank, code))
        self._closing.set()

    monkeypatch.setattr(Watch, "_end", end)
    world = LoopbackWorld(size)
    found = run(world, lambda comm: begin_watch(comm, lambda code: None))
    made = [watch for watch in found if watch is not None]
    assert len(made) == size
    until(lambda: all(set(watch._lines) == set(watch._hubs) for watch in made))
    until(lambda: all(len(watch._own) == size for watch in made if watch.rank in watch._hubs))
    try:
        yield made
    finally:
        for watch in made:
            watch._closing.set()
            watch._say({"kind": "sight"})
            watch._thread.join(WITHIN)
            assert not watch._thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def cut(lines: list[Line]) -> None:
    """What the kernel does when a process is killed."""
    for line in lines:
        with suppress(OSError):  # the other end has hung up already
            line.socket.shutdown(socket.SHUT_RDWR)


def test_who_watches() -> None:
    assert hubs_of(["a"]) == (0,)
    assert hubs_of(["a", "a", "a"]) == (0, 1)
    assert hubs_of(["a", "a", "b", "b"]) == (0, 2)  # a host that is lost does not take both


def test_a_failure_is_reported_once_and_ends_all(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ends: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "__stderr__", errors := io.StringIO())
    with watches(4, ends, monkeypatch) as ranks:
        for watch in ranks:
            watch.configure(Rules(silence=60), tmp_path)
            watch._doing.stages = ("first", "second", "third", "")
        ranks[2]._doing.now("at work")
        ranks[2].fail("no space left", "Traceback of it", 3, shown=False)
        until(lambda: len(ends) == 4)
    assert sorted(ends) == [(rank, 3) for rank in range(4)]
    text = errors.getvalue()
    assert text.startswith("error: rank 2: no space left\n") and text.count("error: ") == 1
    assert "  rank 2 (third): failed; at work\n" in text
    assert "  rank 3: starts" in text
    report = (tmp_path / "failure.txt").read_text()
    assert "--- rank 2 (third): at work\nTraceback of it" in report
    assert "test_watch.py" in report  # where others were


def test_the_deputy_tells_of_the_first_rank_and_stalls_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "__stderr__", errors := io.StringIO())
    with watches(3, ends, monkeypatch) as ranks:
        cut([*ranks[0]._lines.values(), *ranks[0]._own.values()])
        until(lambda: {rank for rank, _ in ends} >= {1, 2})
    assert "rank 0 on " in errors.getvalue() and "ended without a word" in errors.getvalue()
    ends.clear()
    with watches(2, ends, monkeypatch) as ranks:
        for watch in ranks:
            watch.configure(Rules(silence=0.5), None)
            watch._doing.place = Place.INSIDE
        until(lambda: len(ends) == 2)
    assert "nothing moved for 0.5 s: ranks 0, 1 did not go on" in errors.getvalue()


def test_one_of_the_others_tells_that_those_who_watch_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "__stderr__", errors := io.StringIO())
    with watches(4, ends, monkeypatch) as ranks:
        for watch in ranks[:2]:
            watch._closing.set()
            watch._say({"kind": "sight"})
        until(lambda: bool(ends))
        said = errors.getvalue()
    assert ends[0] in ((2, 1), (3, 1))  # the first of the two, unless the machine is slow
    assert said == (f"error: ranks 0 and 1, which watch over the job, are gone: rank {ends[0][0]} ends it\n")


def test_deaths_are_announced_to_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[int, int]] = []
    with watches(4, ends, monkeypatch) as ranks:
        for watch in ranks:
            watch.configure(Rules(elastic=True))
        cut(list(ranks[3]._lines.values()))
        until(lambda: all(watch.lost == (3,) for watch in ranks[:3]))
    assert not ends


def test_who_leaves_well_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[int, int]] = []
    with watches(3, ends, monkeypatch) as ranks:
        for watch in reversed(ranks):
            left(watch._doing)
        ranks[2].leave()  # does not wait: MPI does
        for watch in (ranks[2], ranks[0], ranks[1]):
            watch.close()
            time.sleep(0.3)
    assert not ends


def test_a_request_to_stop_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with watches(3, [], monkeypatch) as ranks:
        for number, watch in enumerate(ranks):
            assert watch.halt.may_begin(number)
        ranks[2].halt.ask("SIGTERM")
        until(lambda: all(watch.halt.reason == "SIGTERM" for watch in ranks))
        assert [watch.halt.last(0, time.sleep) for watch in ranks] == [3, 3, 3]


def test_nobody_watches_if_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF, "0")
    assert run(LoopbackWorld(2), lambda comm: begin_watch(comm, lambda code: None)) == [None, None]


def test_ranks_that_cannot_be_reached_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpp.runtime.watch_start.call", lambda *_: None)

    def begin(comm: LoopbackCommunicator) -> str:
        with pytest.raises(CommunicationError, match="open the ports between") as caught:
            begin_watch(comm, lambda code: None)
        return str(caught.value)

    said = set(run(LoopbackWorld(2), begin))
    assert len(said) == 1 and "rank 0 on" in said.pop()


def test_strangers_get_no_line() -> None:
    exchange = Exchange("secret")
    try:
        with socket.create_connection(("127.0.0.1", exchange.port)) as other:
            other.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert exchange.accept() is None
            with pytest.raises(ConnectionError):
                other.sendall(b"more")
                assert not other.recv(100), "it was let in"
                raise ConnectionError
    finally:
        exchange.close()
    assert call([("127.0.0.1", exchange.port)], "secret", 0) is None  # nobody is there any more
    assert own_addresses()[-1].startswith("127.")


def test_what_a_line_carries() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    line, other = Line(here, 0), Line(there, 1)
    other.send({"kind": "a", "text": "ü" * 10})
    there.sendall(b'not json\n[1]\n{"kind": "b"}\n{"kind": "cu')
    time.sleep(0.1)
    assert [message["kind"] for message in line.read()] == ["a", "b"]
    assert line.open
    other.close()
    other.send({"kind": "nobody reads"})
    time.sleep(0.1)
    assert line.read() == [] and not line.open


def test_a_process_that_dies_breaks_its_line() -> None:
    exchange = Exchange("s" * 32)
    child = os.fork()
    if child == 0:
        try:
            line = call([("127.0.0.1", exchange.port)], "s" * 32, 5)
            assert line is not None
            time.sleep(WITHIN)
        finally:
            os._exit(0)
    line = exchange.accept()
    exchange.close()
    assert line is not None and line.partner == 5
    os.kill(child, 9)
    os.waitpid(child, 0)
    until(lambda: not line.open or (line.read() == [] and not line.open))
