"""The program of a job on two hosts, with what it is to do: `equality`, `bells`, or `pace` and a plan's file.

Rank 0 prints what has passed, or one line of JSON.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import torch

from gpp.plan import plan_from_json
from gpp.runtime.doorbell import ASLEEP
from gpp.runtime.emulation import emulated, exact_sleep, run_steps
from gpp.runtime.mpi import MpiCommunicator, connect
from tests.equality.cases import CASES
from tests.equality.mpi_program import passes

NAMES = ("diamond", "chain-zero-bubble", "replicas-1-2-1-clipped", "tied-sharded")
STEPS = 8


def equality(comm: MpiCommunicator) -> None:
    """Cases on four ranks, two a host: one of the replicas sits on the other host."""
    assert len(set(comm.hosts)) == 2 and len(set(comm.hosts[:2])) == 1, comm.hosts
    for case in CASES:
        if case.name in NAMES:
            passes(comm, case)


def bells(comm: MpiCommunicator) -> None:
    """Ranks ring for the other rank of their host, 2h and 2h + 1, and know nothing of other hosts' sleep."""
    bell, peer = comm._bell, comm.rank ^ 1
    assert comm._near == tuple(r // 2 == comm.rank // 2 for r in range(4))
    nothing = torch.zeros(1)
    if comm.rank % 2 == 0:
        bell.lie_down()
        told, looked = comm.isend(nothing, peer, 0), comm.irecv(nothing, peer, 1)
        start = time.perf_counter()
        bell.sleep(60)
        slept = time.perf_counter() - start
        while not looked.done():  # the bed is left only when the other has seen it taken, however slow it is
            time.sleep(1e-3)
        bell.get_up()
        comm.wait([told])
    else:
        comm.wait([comm.irecv(nothing, peer, 0)])
        slept = 0.0
        assert bell._asleep[peer] == ASLEEP
        assert not any(bell._asleep[r] for r in range(4) if not comm._near[r])
        bell.ring(peer)
        comm.wait([comm.isend(nothing, peer, 1)])
    everyone = comm.all_gather_object(slept)
    if comm.rank == 0:
        print(json.dumps({"hosts": comm.hosts, "slept": everyone}), flush=True)


def pace(comm: MpiCommunicator, file: str) -> None:
    """Seconds of a step of an emulated plan."""
    exact_sleep()
    trainer = emulated(comm, plan_from_json(Path(file).read_text()))
    run_steps(trainer, STEPS)
    if comm.rank == 0:
        print(json.dumps({"step": trainer.measured.typical}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    comm = connect()
    try:
        {"equality": equality, "bells": bells, "pace": pace}[sys.argv[1]](comm, *sys.argv[2:])
        comm.close()
    except BaseException:
        print(f"rank {comm.rank}:", traceback.format_exc(), file=sys.stderr, flush=True)
        comm.abort(1)


if __name__ == "__main__":
    main()
