"""Counts what the message layer makes while steps run. As a program of MPI: every case of CASES on its ranks.

A case is trained for some steps; from the third on no request may be made, no buffer wrapped and no tensor
made by the modules that carry messages, and no method of MPI's communicator be called at all.
"""

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpp.program.stage import StageProgram
from gpp.runtime.communicator import Communicator
from gpp.runtime.executor import Executor
from gpp.runtime.reports import Reports
from gpp.runtime.state import StageState
from tests.equality.cases import CASES as EQUALITY_CASES
from tests.equality.harness import CPU, Ready, prepare, rows

STEPS = 5
FREE = 2  # steps in which anything may be made

# replicas, tied weights, clipping, loss weights, several stages on a device, shared out optimizers, reports
CASES = tuple(
    case
    for case in EQUALITY_CASES
    if case.name
    in (
        "tied-replicas",
        "tied-sharded",
        "replicas-1-2-1-clipped",
        "padded-clipped",
        "padded-replicas",
        "clipped-on-one-device",
        "two-heads-clipped",
        "diamond-sharded-clipped",
        "accumulated-tied-replicas",
        "data-parallel-sharded",
    )
)

_CARRIERS = tuple(
    f"gpp.runtime.{name}"
    for name in (
        *("buffers", "channels", "collectives", "communicator", "exchange", "loopback", "mpi"),
        *("reduce", "reports", "sharding", "staging"),
    )
)
# not cat: what joins several messages makes an input of a stage
_MAKERS = ("empty", "zeros", "ones", "full", "tensor", "frombuffer", "from_numpy", "empty_like")
_METHODS = ("isend", "irecv", "send_init", "recv_init", "prepare")


class Census:
    """What has been made, by thread."""

    def __init__(self) -> None:
        self._counts: dict[int, Counter[str]] = {}

    def note(self, what: str) -> None:
        self._counts.setdefault(threading.get_ident(), Counter())[what] += 1

    def take(self) -> Counter[str]:
        """This thread's since the last time."""
        return self._counts.pop(threading.get_ident(), Counter())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes what the modules that carry messages make with torch."""
        kept: list[tuple[Any, str, Any]] = []

        def watch(owner: Any, name: str) -> None:
            original = getattr(owner, name)
            kept.append((owner, name, original))

            def watched(*arguments: Any, **named: Any) -> Any:
                if sys._getframe(1).f_globals.get("__name__") in _CARRIERS:
                    self.note(f"torch.{name}")
                return original(*arguments, **named)

            setattr(owner, name, watched)

        for name in _MAKERS:
            watch(torch, name)
        for name in ("new_empty", "new_zeros", "clone", "contiguous", "cpu"):
            watch(torch.Tensor, name)
        try:
            yield
        finally:
            for owner, name, original in kept:
                setattr(owner, name, original)

    def watch_communicator(self, comm: Any) -> None:
        """Notes the calls that make a request or wrap a buffer; all those of MPI's own communicator."""
        for name in _METHODS:
            setattr(comm, name, self._noted(name, getattr(comm, name)))
        if hasattr(comm, "_comm"):
            comm._comm = _Noted(comm._comm, self)

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            self.note(name)
            return call(*arguments)

        return noted


class _Noted:
    """MPI's communicator, whose calls are noted."""

    def __init__(self, comm: Any, census: Census) -> None:
        self._comm, self._census = comm, census

    def __getattr__(self, name: str) -> Any:
        self._census.note(f"MPI {name}")
        return getattr(self._comm, name)


def counts(
    ready: Ready, comm: Communicator, programs: list[StageProgram], census: Census
) -> list[Counter[str]]:
    """What a rank makes in each step."""
    state = None
    if programs:
        owned = {n: ready.values[n].clone() for p in programs for n in (*p.parameters, *p.buffers)}
        graph = ready.plan.stage_graph
        state = StageState(programs, graph, owned, ready.make_optimizer, ready.clipping, comm.rank)
    executor = Executor(
        comm, ready.plan, ready.lowered.train, programs, state, ready.captured.train.loss, CPU
    )
    reports = Reports(comm, ready.lowered.train, programs, 100)
    executor.channels.open(STEPS)
    census.take()
    found = []
    for step in range(STEPS):
        reports.exchange(executor.run(step, rows(executor, ready.batches[step % len(ready.batches)])))
        found.append(census.take())
    executor.channels.close()
    reports.flush()
    return found


def main() -> None:
    from gpp.runtime.mpi import connect

    torch.set_num_threads(1)
    comm = connect()
    census = Census()
    census.watch_communicator(comm)
    try:
        for case in CASES:
            if case.ranks == comm.size:
                ready = prepare(case)
                programs = ready.programs(comm.rank)
                with census.watching():
                    found = counts(ready, comm, programs, census)
                late = [dict(step) for step in found[FREE:] if step]
                everyone = comm.all_gather_object((late, sum(found[0].values())))
                if comm.rank == 0:
                    for rank, (made, _) in enumerate(everyone):
                        assert not made, f"{case.name}, rank {rank}: {made}"
                    # the count itself can fail: sums and gathers are made in the first step
                    assert any(first for _, first in everyone)
                    print("steady", case.name, flush=True)
        comm.barrier()
        comm.close()
    except BaseException:
        print(f"rank {comm.rank}:", traceback.format_exc(), file=sys.stderr, flush=True)
        comm.abort(1)


if __name__ == "__main__":
    main()
