"""A world of ranks that are threads of one process: tests, laptops, no MPI library.

Sends behave like MPI's synchronous non-blocking ones: the bytes are copied when a receive matches, and only
then is the send done, so whatever relies on buffering inside the library hangs here too. It does not hang in
silence: in a world driven by `run`, ranks that all wait for one another are told so.
"""

import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Condition, RLock, Thread
from typing import NoReturn, TypeVar, cast

import torch
from torch import Tensor

from .collectives import Collectives
from .communicator import Buffer, CommunicationError, Request, as_bytes, wrong_size
from .halt import halts
from .watch import traces, written
from .watching import Rules, Watcher, sight_of

T = TypeVar("T")

GLANCE = 0.2  # seconds between two looks at whether anything moves
LOOK = 1e-4  # seconds between two looks at what a waiting rank has to do beside messages


class LoopbackRequest:
    """A message under way inside one process."""

    def __init__(self, world: "LoopbackWorld", sending: bool, route: tuple[int, int, int], data: Tensor):
        self.world = world
        self.sending = sending
        self.route = route  # source, target, tag
        self.data = data
        self.finished = False
        self.error: CommunicationError | None = None

    def done(self) -> bool:
        """See `Request`."""
        with self.world.lock:
            self.world.check()
            if self.error is not None:
                raise self.error
            return self.finished

    def __str__(self) -> str:
        source, target, tag = self.route
        what = f"send to rank {target}" if self.sending else f"receive from rank {source}"
        return f"{what} with tag {tag} ({self.data.numel()} bytes)"


class PersistentLoopbackRequest(LoopbackRequest):
    """A message that is posted many times."""

    def __init__(self, world: "LoopbackWorld", sending: bool, route: tuple[int, int, int], data: Tensor):
        super().__init__(world, sending, route, data)
        self.finished = True

    def start(self) -> None:
        """See `PersistentRequest`."""
        if not self.finished:
            raise CommunicationError(f"a {self} is still under way: wait for it before it is started again")
        self.finished = False
        self.world.post(self)


class LoopbackWorld:
    """`size` communicators that reach one another; a world that has failed stays so."""

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"a world needs at least 1 rank, size is {size}")
        self.size = size
        self.lock = RLock()
        self.failure: tuple[int, BaseException | str] | None = None
        self.halts = halts(size)
        self.rules = Rules()
        self.folder: Path | None = None
        self.communicators = tuple(LoopbackCommunicator(self, rank) for rank in range(size))
        self._changed = [Condition(self.lock) for _ in range(size)]
        self._sends: dict[tuple[int, int, int], deque[LoopbackRequest]] = defaultdict(deque)
        self._receives: dict[tuple[int, int, int], deque[LoopbackRequest]] = defaultdict(deque)
        self._running: set[int] = set()  # ranks that `run` has started and that have not returned
        self._waiting: dict[int, Sequence[LoopbackRequest]] = {}

    def fail(self, rank: int, error: BaseException | str) -> None:
        """Every other rank's communication raises CommunicationError from now on; the first reason stays."""
        with self.lock:
            if self.failure is None:
                self.failure = (rank, error)
            for changed in self._changed:
                changed.notify_all()

    def check(self) -> None:
        """Raise CommunicationError if a rank has failed."""
        if self.failure is not None:
            rank, error = self.failure
            cause = error if isinstance(error, BaseException) else None
            text = error if cause is None else f"{type(cause).__name__}: {cause}"
            raise CommunicationError(f"rank {rank} failed: {text}") from cause

    def begin(self, ranks: Sequence[int]) -> None:
        """These ranks run now: as soon as each of them waits for another, that is a deadlock."""
        with self.lock:
            self._running.update(ranks)

    def end(self, rank: int) -> None:
        """This rank has returned and will send no more."""
        with self.lock:
            self._running.discard(rank)
            self._check_deadlock()

    def post(self, request: LoopbackRequest) -> None:
        """Match the request with the oldest fitting one, or queue it."""
        source, target, _ = request.route
        for rank in (source, target):
            if not 0 <= rank < self.size:
                raise CommunicationError(f"there is no rank {rank} in a world of {self.size}")
        mine, theirs = (self._sends, self._receives) if request.sending else (self._receives, self._sends)
        with self.lock:
            self.check()
            if not theirs[request.route]:
                mine[request.route].append(request)
                return
            other = theirs[request.route].popleft()
        send, receive = (request, other) if request.sending else (other, request)
        if send.data.numel() == receive.data.numel():
            receive.data.copy_(send.data)  # outside the lock: other ranks copy at the same time
        else:
            receive.error = wrong_size(receive.route, send.data.numel(), receive.data.numel())
        with self.lock:
            send.finished = receive.finished = True
            self._changed[source].notify_all()
            self._changed[target].notify_all()

    def take_back(self, request: LoopbackRequest) -> bool:
        """See `Communicator.cancel`."""
        with self.lock:
            queue = self._receives[request.route]
            if request in queue:
                queue.remove(request)
                request.finished = True
                return True
            while not request.finished:  # another thread is copying into it at this moment
                self.check()
                self._changed[request.route[1]].wait()
            return False

    def wait(self, rank: int, requests: Sequence[LoopbackRequest], poll: Callable[[], bool]) -> None:
        """See `Communicator.wait`."""
        with self.lock:
            try:
                while not all([r.done() for r in requests]):  # a list: an error behind a slow one counts too
                    if poll():
                        self._changed[rank].wait(LOOK)
                        continue
                    self._waiting[rank] = self.communicators[rank].doing.waits = requests
                    self._check_deadlock()
                    self._changed[rank].wait()
            finally:
                self._waiting.pop(rank, None)
                self.communicators[rank].doing.waits = ()

    def _check_deadlock(self) -> None:
        stuck = {r: [q for q in self._waiting.get(r, ()) if not q.finished] for r in sorted(self._running)}
        if stuck and all(stuck.values()) and self.failure is None:
            report = "; ".join(f"rank {r} waits for: {', '.join(map(str, q))}" for r, q in stuck.items())
            returned = [r for r in range(self.size) if r not in stuck]
            gone = f"; returned: {returned}" if returned else ""
            self.fail(min(stuck), f"deadlock, no message can arrive any more: {report}{gone}")
            self.check()


class LoopbackCommunicator(Collectives):
    """One rank of a `LoopbackWorld`."""

    def __init__(self, world: LoopbackWorld, rank: int):
        super().__init__()
        self._world = world
        self._rank = rank
        self.halt = world.halts[rank]

    @property
    def rank(self) -> int:
        """See `Communicator`."""
        return self._rank

    @property
    def size(self) -> int:
        """See `Communicator`."""
        return self._world.size

    @property
    def hosts(self) -> tuple[str, ...]:
        """See `Communicator`."""
        return (socket.gethostname(),) * self.size

    def prepare(self, tensor: Tensor) -> Buffer:
        """See `Communicator`."""
        return Buffer(as_bytes(tensor))

    def isend(self, buffer: Tensor | Buffer, target: int, tag: int) -> LoopbackRequest:
        """See `Communicator`."""
        return self._post(True, (self.rank, target, tag), buffer)

    def irecv(self, buffer: Tensor | Buffer, source: int, tag: int) -> LoopbackRequest:
        """See `Communicator`."""
        return self._post(False, (source, self.rank, tag), buffer)

    def send_init(self, buffer: Tensor | Buffer, target: int, tag: int) -> PersistentLoopbackRequest:
        """See `Communicator`."""
        return PersistentLoopbackRequest(self._world, True, (self.rank, target, tag), _bytes(buffer))

    def recv_init(self, buffer: Tensor | Buffer, source: int, tag: int) -> PersistentLoopbackRequest:
        """See `Communicator`."""
        return PersistentLoopbackRequest(self._world, False, (source, self.rank, tag), _bytes(buffer))

    def cancel(self, request: Request) -> bool:
        """See `Communicator`."""
        found = cast(LoopbackRequest, request)
        if found.sending:
            raise CommunicationError(f"only receives can be cancelled, not a {found}")
        return not found.finished and self._world.take_back(found)

    def wait(self, requests: Sequence[Request]) -> None:
        """See `Communicator`."""
        self._world.wait(self.rank, cast(Sequence[LoopbackRequest], requests), self.poll)

    def watch_by(self, rules: Rules, folder: Path | None = None) -> None:
        """See `Communicator`."""
        self._world.rules, self._world.folder = rules, folder

    def check(self) -> None:
        """See `Communicator`."""
        self._world.check()

    def rest(self, seconds: float) -> None:
        """See `Communicator`. Messages need nobody's help here."""
        time.sleep(seconds)
        self.check()

    def abort(self, code: int) -> NoReturn:
        """See `Communicator`."""
        self._world.fail(self.rank, f"it ended the job with code {code}")
        raise CommunicationError(f"rank {self.rank} ended the job with code {code}")

    def _post(self, sending: bool, route: tuple[int, int, int], buffer: Tensor | Buffer) -> LoopbackRequest:
        request = LoopbackRequest(self._world, sending, route, _bytes(buffer))
        self._world.post(request)
        return request


def _bytes(buffer: Tensor | Buffer) -> Tensor:
    return buffer.bytes if isinstance(buffer, Buffer) else as_bytes(buffer)


def run(
    world: LoopbackWorld, function: Callable[[LoopbackCommunicator], T], threads: int | None = None
) -> list[T]:
    """Call `function` once a rank, each in a thread of its own, and return the results by rank.

    `threads` is torch's number of threads inside each rank. A thread inherits the caller's grad mode, which
    torch keeps per thread. If ranks fail, the exception that came first is raised, after all have ended; the
    others' CommunicationErrors only follow from it.
    """
    results: dict[int, T] = {}
    grad_mode = torch.is_grad_enabled()

    def body(communicator: LoopbackCommunicator) -> None:
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            with torch.set_grad_enabled(grad_mode):
                results[communicator.rank] = function(communicator)
            world.end(communicator.rank)
        except BaseException as error:  # SystemExit too: the others must not wait for ever
            world.fail(communicator.rank, error)

    world.begin(range(world.size))
    workers = [
        Thread(target=body, args=(c,), name=f"rank {c.rank}", daemon=True) for c in world.communicators
    ]
    for worker in workers:
        worker.start()
    try:
        _watched(world, workers)
    except StalledError:
        raise  # threads that hang are left to the end of the process
    except BaseException as error:  # Ctrl-C reaches this thread alone
        world.fail(-1, error)
        for worker in workers:
            worker.join()
        raise
    return _results(world, results)


class StalledError(CommunicationError):
    """Nothing moves any more; the text says what each rank was at, and where."""


def _watched(world: LoopbackWorld, workers: Sequence[Thread]) -> None:
    """Wait for all, as long as something moves."""
    watcher = Watcher([socket.gethostname()] * world.size, world.rules, time.monotonic())
    for worker in workers:
        while worker.is_alive():
            worker.join(GLANCE)
            now = time.monotonic()
            for other, communicator in zip(workers, world.communicators, strict=True):
                watcher.saw(communicator.rank, sight_of(communicator.doing), now)
                watcher.members[communicator.rank].over = not other.is_alive()
                watcher.stages = communicator.doing.stages
            watcher.tick(now)
            if watcher.is_asking and world.failure is None:
                for other, communicator in zip(workers, world.communicators, strict=True):
                    sight = sight_of(communicator.doing)
                    watcher.explained(communicator.rank, sight, traces(only=other.ident), now)
                watcher.tick(now)
                if watcher.verdict is not None:
                    error = StalledError(written(watcher.verdict, world.folder))
                    world.fail(-1, error)
                    raise error


def _results(world: LoopbackWorld, results: Mapping[int, T]) -> list[T]:
    if world.failure is not None:
        rank, error = world.failure
        if isinstance(error, BaseException):
            doing = world.communicators[rank].doing
            stages = f" ({doing.stages[rank]})" if rank < len(doing.stages) else ""
            error.add_note(f"raised by rank {rank} of {world.size}{stages}: {doing.text()}")
            raise error
        world.check()
    return [results[rank] for rank in range(world.size)]
