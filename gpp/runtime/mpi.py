"""Ranks that are MPI processes. Importing this module starts MPI: see `gpp.runtime.environment`."""

import atexit
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast
from weakref import WeakSet

from torch import Tensor

from .collectives import RESERVED_TAGS, Collectives
from .communicator import Buffer, CommunicationError, RanksLostError, Request, as_bytes
from .doorbell import LONG, Doorbell
from .environment import lonely, synchronous_sends
from .halt import Halt
from .last_words import spoken
from .watch import Watch, left
from .watch_start import OFF, begin_watch
from .watching import Rules

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # mpi4py is missing, or finds no MPI library
    raise CommunicationError(
        f"MPI cannot be loaded ({error}); install the extra `gpp[mpi]`, or mpi4py built for the site's MPI"
    ) from error

from .mpi_requests import MpiRequest, PersistentMpiRequest, failed

SPIN = 20e-3  # seconds of polling before a waiting rank sleeps
CROWD = 4  # ranks for each processor of the host; with more of them polling is what takes the time,
BRIEF = 50e-6  # so that they poll no longer than this
BUSY = 25e-6  # a yield that takes so long: somebody else wants the processor, and polling ends at once
LONGEST_SLEEP = 500e-6  # where nobody rings: other hosts, and what goes out, which MPI pushes on when polled
KNOWN_WITHIN = 2.0  # seconds that MPI may take to learn of a death; some it never does
SAID_WITHIN = 5.0  # seconds from an error of MPI to knowing who is gone
MANY = 8  # sends under way: then it is time to see which have left
PATIENCE = 0.1  # then sleep this part of the time waited so far: noticed at most so much too late


class MpiCommunicator(Collectives):
    """`Communicator` over a communicator of mpi4py, which it owns.

    `job` names it among those of the machine: it is the same on all ranks. With `synchronous` every send is
    one of MPI's synchronous ones, which are done only when they are received: a program that relies on the
    library's own buffers then hangs where it would otherwise hang with longer messages. `device_memory`: the
    library takes addresses of device memory.
    """

    def __init__(self, comm: MPI.Intracomm, hosts: tuple[str, ...], job: str, *, synchronous: bool = False):
        super().__init__()
        self._comm = comm
        self._synchronous = synchronous
        self.device_memory = False
        self._job = job
        self._before: object = None  # what a communicator that lost ranks has left
        self._busy = False  # with what is polled beside messages
        self.dropped: list[MPI.Request] = []  # persistent requests that nobody has any more
        self._persistent: WeakSet[PersistentMpiRequest] = WeakSet()
        self._hosts = hosts
        self._rank = comm.Get_rank()
        self._size = comm.Get_size()
        crowded = hosts.count(hosts[self._rank]) > CROWD * (os.cpu_count() or 1)
        self._spin = BRIEF if crowded else SPIN
        self._near = tuple(host == hosts[self._rank] for host in hosts)
        node = cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED, key=self._rank))
        self._bell = Doorbell(job, self._rank, _shared_bytes(node, job, self._size))
        node.Free()
        self._nobodys_tag = int(cast(int, MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)))
        self._going: dict[MpiRequest, None] = {}  # sends that may not have left yet
        self.watch: Watch | None = None
        self.watch = begin_watch(self, _end_job)
        if self.watch is not None:
            atexit.register(self.watch.leave)
        if self._size > 1:
            self.halt = Halt(_nobody_watches, lambda _: None) if self.watch is None else self.watch.halt

    @property
    def rank(self) -> int:
        """See `Communicator`."""
        return self._rank

    @property
    def size(self) -> int:
        """See `Communicator`."""
        return self._size

    @property
    def hosts(self) -> tuple[str, ...]:
        """See `Communicator`."""
        return self._hosts

    @property
    def library(self) -> str:
        """What the MPI library says of itself."""
        return MPI.Get_library_version().strip()

    def prepare(self, tensor: Tensor) -> Buffer:
        """See `Communicator`. Messages are bytes: MPI has no bfloat16, and no sum is left to it."""
        data = as_bytes(tensor)
        if data.device.type != "cpu" and not self.device_memory:
            raise CommunicationError(f"MPI is given host memory only, this tensor is on {data.device}")
        memory = MPI.buffer.fromaddress(data.data_ptr(), data.numel())
        return Buffer(data, [memory, data.numel(), MPI.BYTE])

    def isend(self, buffer: Tensor | Buffer, target: int, tag: int) -> MpiRequest:
        """See `Communicator`."""
        message = buffer if isinstance(buffer, Buffer) else self.prepare(buffer)
        route = (self._rank, target, tag)
        send = self._comm.Issend if self._synchronous else self._comm.Isend
        try:
            request = send(message.handle, target, tag + RESERVED_TAGS)
        except MPI.Exception as error:
            raise failed(error, route) from error
        sent = MpiRequest(request, message, route, sending=True)
        self.follow(sent)
        return sent

    def irecv(self, buffer: Tensor | Buffer, source: int, tag: int) -> MpiRequest:
        """See `Communicator`. Sizes are to be agreed on before: Open MPI is known to crash when a long
        message does not fit."""
        message = buffer if isinstance(buffer, Buffer) else self.prepare(buffer)
        route = (source, self._rank, tag)
        try:
            request = self._comm.Irecv(message.handle, source, tag + RESERVED_TAGS)
        except MPI.Exception as error:
            raise failed(error, route) from error
        return MpiRequest(request, message, route, sending=False)

    def send_init(self, buffer: Tensor | Buffer, target: int, tag: int) -> PersistentMpiRequest:
        """See `Communicator`."""
        message = buffer if isinstance(buffer, Buffer) else self.prepare(buffer)
        route = (self._rank, target, tag)
        make = self._comm.Ssend_init if self._synchronous else self._comm.Send_init
        try:
            request = make(message.handle, target, tag + RESERVED_TAGS)
        except MPI.Exception as error:
            raise failed(error, route) from error
        return self._kept(PersistentMpiRequest(self, request, message, route, sending=True))

    def recv_init(self, buffer: Tensor | Buffer, source: int, tag: int) -> PersistentMpiRequest:
        """See `Communicator`; and `irecv` about sizes."""
        message = buffer if isinstance(buffer, Buffer) else self.prepare(buffer)
        route = (source, self._rank, tag)
        try:
            request = self._comm.Recv_init(message.handle, source, tag + RESERVED_TAGS)
        except MPI.Exception as error:
            raise failed(error, route) from error
        return self._kept(PersistentMpiRequest(self, request, message, route, sending=False))

    def _kept(self, made: PersistentMpiRequest) -> PersistentMpiRequest:
        self._free_dropped()
        self._persistent.add(made)
        return made

    def _free_dropped(self) -> None:
        while self.dropped:
            self.dropped.pop().Free()

    def follow(self, sent: MpiRequest) -> None:
        """What comes after the start of a send: look after it until it has left, and wake who waits for
        it."""
        self._going[sent] = None
        if len(self._going) > MANY:
            self._forget_gone()
        target = sent.route[1]
        if self._near[target]:
            self._bell.ring(target)

    def _forget_gone(self) -> None:
        while self._going and (first := next(iter(self._going))).done():
            del self._going[first]

    def cancel(self, request: Request) -> bool:
        """See `Communicator`."""
        found = cast(MpiRequest, request)
        if found.sending:
            raise CommunicationError("only receives can be cancelled, not a send")
        if found.finished:
            return False
        found.request.Cancel()
        found.request.Wait(found.status)
        found.finished = True
        return bool(found.status.Is_cancelled())

    def wait(self, requests: Sequence[Request]) -> None:
        """See `Communicator`. Polls, since MPI has no other way to wait; goes to sleep when it takes long or
        the processor is wanted: there may be more ranks than cores."""
        pending = self._unfinished(requests)
        start = now = time.perf_counter()
        while pending and now - start < self._spin:
            os.sched_yield()
            pending = self._unfinished(pending)
            before, now = now, time.perf_counter()
            if now - before > BUSY:
                break
        if pending:
            self._sleep_until(pending, start)

    def _sleep_until(self, pending: list[Request], start: float) -> None:
        self._bell.lie_down()
        while pending := self._unfinished(pending):
            waited = time.perf_counter() - start
            self.doing.waits = pending
            self._bell.sleep(LONG if self._is_rung_for(pending) else min(PATIENCE * waited, LONGEST_SLEEP))
        self.doing.waits = ()
        self._bell.get_up()

    def rest(self, seconds: float) -> None:
        """See `Communicator`. MPI gets on with messages only while it is called: whoever sends one rings."""
        end = time.perf_counter() + seconds
        self._bell.lie_down()
        while (left := end - time.perf_counter()) > LONGEST_SLEEP:
            self._comm.Iprobe(MPI.ANY_SOURCE, self._nobodys_tag)  # if it found something, it would do no more
            self._forget_gone()
            left -= LONGEST_SLEEP / 2
            self._bell.sleep(LONGEST_SLEEP if self._going else min(LONG / 2, left))  # exact below LONG
        self._bell.get_up()
        time.sleep(max(0.0, end - time.perf_counter()))

    def _unfinished(self, requests: Sequence[Request]) -> list[Request]:
        if self._polls:
            self._busy = self.poll()
        self.check()
        return [r for r in requests if not r.done()]

    def _is_rung_for(self, pending: Sequence[Request]) -> bool:
        """Whether all that is awaited rings, and nothing else needs to be pushed on."""
        self._forget_gone()
        others = self._going or (self._polls and self._busy)
        return not others and all(
            not r.sending and self._near[r.route[0]] for r in cast(Sequence[MpiRequest], pending)
        )

    def neighbor_exchange(
        self, sources: Sequence[int], targets: Sequence[int], objects: Sequence[Any]
    ) -> list[Any]:
        """See `Communicator`. Over a distributed graph topology whose edges are those of this call."""
        graph = self._comm.Create_dist_graph_adjacent(list(sources), list(targets), reorder=False)
        try:
            return list(graph.neighbor_alltoall(list(objects)))
        finally:
            graph.Free()

    def check(self) -> None:
        """See `Communicator`."""
        if self.watch is not None and self.watch.lost:
            raise RanksLostError(self.watch.lost)

    def lost_behind(self, error: Exception) -> tuple[int, ...]:
        """The ranks whose death an error comes from, none if it has another cause or deaths end the job. MPI
        may fail before who watches has said why."""
        if self.watch is None or not self.watch.rules.elastic:
            return ()
        patience = SAID_WITHIN if isinstance(error, CommunicationError | MPI.Exception) else 0.0
        end = time.monotonic() + patience
        while not self.watch.lost and time.monotonic() < end:
            time.sleep(LONG)
        return self.watch.lost

    def survivors(self) -> "MpiCommunicator":
        """A communicator of those who are left, in their order; called by all of them, when each has seen
        that ranks are lost. This one is not to be used any more.

        Those who watch say who is left, if any of them is, and whether MPI knows it on all: its own `Shrink`
        waits for ever for a rank that ended with a code other than 0, which Open MPI takes neither for dead
        nor for alive; and `Create_group` fails if MPI learns of a death meanwhile.
        """
        assert self.watch is not None  # nobody else has said that ranks are lost
        self.doing.now("waits until all who are left know it")
        found = self.watch.survivors(known=self._knows(self.watch.lost))
        self.doing.now("makes a communicator of those who are left")
        if found is None or found.known:
            left_ones = cast(MPI.Intracomm, self._comm.Shrink())
        else:
            left_ones = self._comm.Create_group(self._comm.Get_group().Incl(found.ranks))
        ranks = tuple(left_ones.allgather(self._rank))
        hosts = tuple(self._hosts[rank] for rank in ranks)
        made = MpiCommunicator(left_ones, hosts, f"{self._job}+{self._size}", synchronous=self._synchronous)
        made.device_memory = self.device_memory
        made._before = (
            self,
            list(self._persistent),
            list(self._going),
        )  # MPI may still write to their memory
        atexit.unregister(self.watch.leave)
        self.watch.close()
        return made

    def _knows(self, lost: Sequence[int]) -> bool:
        """Whether MPI knows too, by now or soon, that these ranks are lost."""
        group, end = self._comm.Get_group(), time.monotonic() + KNOWN_WITHIN
        while time.monotonic() < end:
            failed = self._comm.Get_failed()
            known = group.Translate_ranks(list(lost), failed) if failed.size else []
            if known and MPI.UNDEFINED not in known:
                return True
            time.sleep(LONG)
        return False

    def watch_by(self, rules: Rules, folder: Path | None = None) -> None:
        """See `Communicator`."""
        if self.watch is not None:
            self.watch.configure(rules, folder)

    def fail(self, error: str, details: str, code: int, *, shown: bool) -> NoReturn:
        """This rank cannot go on: one report about all ranks, and the end of them. `details` says where in
        the code it came from, for everyone to read if `shown`."""
        if self.watch is not None:
            self.watch.fail(error, details, code, shown=shown)
        text = f"error: rank {self.rank}: {error}" + (f"\n{details}" if shown else "")
        print(text, file=sys.__stderr__, flush=True)
        self.abort(code)

    def abort(self, code: int) -> NoReturn:
        """See `Communicator`."""
        spoken()
        _end_job(code)
        os._exit(code)  # in case the library lets the call return

    def close(self) -> None:
        """Give the communicator back, once nothing is under way; called by all ranks."""
        self._part()
        self._bell.close()
        for request in self._persistent:
            request.request.Free()
        self._free_dropped()
        self._comm.Free()

    @property
    def has_lost(self) -> bool:
        """Whether these are the survivors of a job that has lost ranks."""
        return self._before is not None

    def end(self, code: int) -> NoReturn:
        """The end of this process, of survivors; called by all of them. MPI's own end may wait for ever for
        ranks that are gone, so it is left out: an mpirun that lets ranks die takes the code."""
        self._part()
        spoken()
        os._exit(code)

    def _part(self) -> None:
        with self.doing.inside("waits for all ranks to close"):
            self.barrier()
        left(self.doing)
        if self.watch is not None:
            atexit.unregister(self.watch.leave)
            self.watch.close()


def _nobody_watches(reason: str) -> None:
    raise CommunicationError(
        f"{reason}: the ranks cannot agree on where to stop while nobody watches; leave {OFF}=0 away"
    )


def _end_job(code: int) -> None:
    MPI.COMM_WORLD.Abort(code)


def connect() -> MpiCommunicator:
    """A communicator of all processes, ranks ordered by host and then by local rank; called by all of them.

    It is a duplicate: messages never mix with those of the caller's own use of MPI. Raises CommunicationError
    in a process that the launcher has started with others and that MPI knows nothing of.
    """
    world = MPI.COMM_WORLD
    error = lonely(size=world.Get_size())
    if error is not None:
        raise CommunicationError(error)
    try:
        synchronous = synchronous_sends()
    except ValueError as problem:
        raise CommunicationError(str(problem)) from problem
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    first = node.bcast(world.Get_rank())  # names a host better than its name: containers may share that
    place = (first, node.Get_rank())
    node.Free()
    places = world.allgather((*place, MPI.Get_processor_name()))
    hosts = tuple(name for _, _, name in sorted(places))
    comm = cast(MPI.Intracomm, world.Split(0, key=sorted(p[:2] for p in places).index(place)))
    job = comm.bcast(f"{os.getpid()}-{time.time_ns()}")
    hosts = _distinct(tuple(first for first, _, _ in sorted(places)), hosts)
    return MpiCommunicator(comm, hosts, job, synchronous=synchronous)


def _shared_bytes(node: MPI.Intracomm, job: str, count: int) -> mmap.mmap:
    """Bytes, 0 at first, that the ranks of a host share; their file's name is gone before anybody can fail.

    Hosts that are containers may see one another's files: each has a name of its own.
    """
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    file = folder / f"gpp-{job}-{node.bcast(os.urandom(8).hex())}"
    if node.Get_rank() == 0:
        file.write_bytes(bytes(count))
    node.Barrier()
    with file.open("r+b") as opened:
        memory = mmap.mmap(opened.fileno(), count)
    node.Barrier()
    if node.Get_rank() == 0:
        file.unlink()
    return memory


def _distinct(nodes: tuple[int, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that differ exactly where the nodes do."""
    owner: dict[str, int] = {}
    for node, name in zip(nodes, names, strict=True):
        owner.setdefault(name, node)
    return tuple(
        name if owner[name] == node else f"{name}#{node}" for node, name in zip(nodes, names, strict=True)
    )
