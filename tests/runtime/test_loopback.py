"""The message layer of threads: every case, and what is its own."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from gpp.runtime.communicator import CommunicationError, Communicator
from gpp.runtime.loopback import LoopbackWorld, run
from gpp.runtime.reduce import Slots
from tests.runtime.cases import CASES


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, size: int) -> None:
    run(LoopbackWorld(size), CASES[name], threads=1)


@pytest.mark.parametrize("size", [1, 5, 6, 7])
@pytest.mark.parametrize("name", ["objects", "barrier", "exchanges_of_groups"])
def test_collectives_of_any_size(name: str, size: int) -> None:
    run(LoopbackWorld(size), CASES[name] if size > 1 else alone, threads=1)


def alone(comm: Communicator) -> None:
    comm.barrier()
    assert comm.all_gather_object("x") == ["x"]
    assert comm.broadcast_object(lambda: 3) == 3
    assert comm.neighbor_exchange([], [], []) == []
    assert Slots().gather(comm, (0,), [1.0, 2.0]) == [[1.0, 2.0]]


def test_results_come_by_rank() -> None:
    assert run(LoopbackWorld(3), lambda comm: comm.rank**2) == [0, 1, 4]


def test_a_send_is_done_only_when_it_is_received() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 0:
            message = torch.ones(1)
            request = comm.isend(message, 1, 0)
            comm.barrier()
            assert not request.done()
            message.fill_(2)  # forbidden, and what a copy at the match would show
            comm.barrier()
            comm.wait([request])
        else:
            received = torch.zeros(1)
            comm.barrier()
            comm.barrier()
            comm.wait([comm.irecv(received, 0, 0)])
            assert received.item() == 2

    run(LoopbackWorld(2), body)


def test_the_root_cause_is_raised_and_ends_the_others() -> None:
    seen: list[str] = []

    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            time.sleep(0.05)
            raise ValueError("bad stage")
        try:
            comm.wait([comm.irecv(torch.empty(1), 1, 0)])
        except CommunicationError as error:
            seen.append(str(error))
            raise

    start = time.monotonic()
    with pytest.raises(ValueError, match="bad stage") as caught:
        run(LoopbackWorld(4), body)
    assert time.monotonic() - start < 5
    assert seen == ["rank 1 failed: ValueError: bad stage"] * 3
    assert caught.value.__notes__ == ["raised by rank 1 of 4: starts"]


def test_failure_reaches_ranks_that_only_poll_or_post() -> None:
    world = LoopbackWorld(2)
    first, second = world.communicators
    request = first.irecv(torch.empty(1), 1, 0)
    world.fail(1, "out of memory")
    for action in (
        request.done,
        lambda: first.wait([request]),
        lambda: first.isend(torch.empty(1), 1, 0),
        second.barrier,
    ):
        with pytest.raises(CommunicationError, match="rank 1 failed: out of memory"):
            action()


def test_abort_ends_all() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 2:
            comm.abort(3)
        comm.barrier()

    with pytest.raises(CommunicationError, match="rank 2 failed: it ended the job with code 3"):
        run(LoopbackWorld(3), body)


def test_a_deadlock_is_reported_with_who_waits_for_what() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank < 2:  # synchronous sends in the wrong order: each waits for the other's receive
            comm.wait([comm.isend(torch.zeros(4), 1 - comm.rank, 9)])
            comm.wait([comm.irecv(torch.zeros(4), 1 - comm.rank, 9)])

    with pytest.raises(CommunicationError) as caught:
        run(LoopbackWorld(3), body)
    text = str(caught.value)
    assert "rank 0 waits for: send to rank 1 with tag 9 (16 bytes)" in text
    assert "rank 1 waits for: send to rank 0 with tag 9 (16 bytes)" in text
    assert text.endswith("returned: [2]")


def test_waiting_for_a_rank_that_returns_later_is_a_deadlock_too() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.wait([comm.irecv(torch.zeros(1), 1, 0)])
        time.sleep(0.05)

    with pytest.raises(CommunicationError, match=r"deadlock.*rank 0 waits for: receive from rank 1"):
        run(LoopbackWorld(2), body)


def test_a_waiting_rank_gives_the_processor_away() -> None:
    def body(comm: Communicator) -> float:
        if comm.rank == 0:
            time.sleep(0.5)
            comm.wait([comm.isend(torch.zeros(1), 1, 0)])
            return 0.0
        before = time.thread_time()
        comm.wait([comm.irecv(torch.zeros(1), 0, 0)])
        return time.thread_time() - before

    assert run(LoopbackWorld(2), body)[1] < 0.1


def test_grad_mode_and_threads_are_set_in_every_rank() -> None:
    def body(comm: Communicator) -> tuple[bool, int]:
        return torch.is_grad_enabled(), torch.get_num_threads()

    before = torch.get_num_threads()
    with torch.no_grad():
        assert run(LoopbackWorld(2), body, threads=2) == [(False, 2)] * 2
    assert run(LoopbackWorld(2), body, threads=1) == [(True, 1)] * 2
    assert torch.get_num_threads() == before


def test_all_threads_have_ended_after_a_failure() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 0:
            raise SystemExit(2)
        time.sleep(0.2)

    with pytest.raises(SystemExit):
        run(LoopbackWorld(3), body)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(CommunicationError, match="no rank 2 in a world of 2"):
        LoopbackWorld(2).communicators[0].isend(torch.zeros(1), 2, 0)
    with pytest.raises(ValueError, match="at least 1 rank"):
        LoopbackWorld(0)


IMPORTS = "import sys; import {}; print(any(m.split('.')[0] == 'mpi4py' for m in sys.modules))"


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ("gpp.runtime.loopback, gpp.runtime.environment, gpp.runtime.buffers, gpp.runtime.reduce", False),
        ("gpp.runtime.agreement, gpp.runtime.neighbors", False),
        ("mpi4py", True),  # the check itself can fail
    ],
)
def test_mpi4py_is_not_imported(modules: str, found: bool) -> None:
    if found:
        pytest.importorskip("mpi4py")
    answer = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(modules)], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == str(found)


def test_without_mpi4py_the_reason_is_said() -> None:
    program = "import sys; sys.modules['mpi4py'] = None; import gpp.runtime.mpi"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "CommunicationError: MPI cannot be loaded" in answer.stderr and "gpp[mpi]" in answer.stderr
