"""The program of an MPI job: all cases on this many ranks, or one way of failing.

Rank 0 prints the name of each case after all ranks have passed it.
"""

import sys
import time
import traceback

import torch
from mpi4py import MPI

from gpp.runtime.environment import launched_tasks, local_rank, synchronous_sends, under_mpi
from gpp.runtime.mpi import MpiCommunicator, _distinct, connect
from tests.runtime.cases import CASES


def case_place(comm: MpiCommunicator) -> None:
    """One host: ranks are those of the launcher, and its environment says the same as MPI."""
    assert under_mpi()
    assert launched_tasks() in (comm.size, None)
    assert comm.rank == MPI.COMM_WORLD.Get_rank() == local_rank()
    assert comm.hosts == (MPI.Get_processor_name(),) * comm.size
    assert _distinct((0, 0, 4), ("a", "a", "b")) == ("a", "a", "b")
    assert _distinct((0, 0, 4), ("a", "a", "a")) == ("a", "a", "a#4")


def case_other_messages_do_not_mix(comm: MpiCommunicator) -> None:
    """The caller's own messages, on every tag that the library puts on the wire."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    foreign = [MPI.COMM_WORLD.isend("foreign", right, tag) for tag in range(8)]
    comm.barrier()
    assert comm.all_gather_object(comm.rank) == list(range(comm.size))
    assert [MPI.COMM_WORLD.recv(source=left, tag=tag) for tag in range(8)] == ["foreign"] * 8
    MPI.Request.waitall(foreign)


def case_a_waiting_rank_sleeps(comm: MpiCommunicator) -> None:
    if comm.rank == 0:
        time.sleep(1)
        comm.wait([comm.isend(torch.zeros(1), 1, 0)])
    elif comm.rank == 1:
        before = time.process_time()
        comm.wait([comm.irecv(torch.zeros(1), 0, 0)])
        assert time.process_time() - before < 0.3


def case_synchronous_sends(comm: MpiCommunicator) -> None:
    """Where they are asked for, a send is done only when it is received, however short it is."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sends = [comm.isend(torch.zeros(1), right, 8), comm.send_init(torch.ones(1), right, 8)]
    sends[1].start()
    comm.barrier()
    if synchronous_sends():
        assert not any(send.done() for send in sends)
        comm.barrier()
    found = torch.empty(2)
    comm.wait([*sends, comm.irecv(found[:1], left, 8), comm.irecv(found[1:], left, 8)])
    assert found.tolist() == [0, 1]


MPI_CASES = {n.removeprefix("case_"): f for n, f in list(globals().items()) if n.startswith("case_")}


def passing(comm: MpiCommunicator) -> None:
    for name, case in (CASES | MPI_CASES).items():
        case(comm)
        comm.barrier()
        if comm.rank == 0:
            print("passed", name, flush=True)
    comm.close()


def failing(comm: MpiCommunicator) -> None:
    if comm.rank == 1:
        raise ValueError("this rank has had enough")
    comm.wait([comm.irecv(torch.empty(1), 1, 0)])


if __name__ == "__main__":
    communicator = connect()
    try:
        {"passing": passing, "failing": failing}[sys.argv[1]](communicator)
    except Exception:
        traceback.print_exc()
        communicator.abort(3)
