"""The program of an MPI job: the cases that need exactly this many ranks, each held against the reference.

Rank 0 collects what the ranks ended with, compares it, and prints the name of a case that has passed.
"""

import gc
import sys
import traceback

import torch
from mpi4py import MPI

from gpp.runtime.mpi import MpiCommunicator, connect
from gpp.runtime.neighbors import check_neighbors

from .cases import Case, of_processes
from .harness import compare, prepare, run_rank


def passes(comm: MpiCommunicator, case: Case) -> None:
    """Run a case on all ranks and say so."""
    ready = prepare(case)
    programs = ready.programs(comm.rank)
    check_neighbors(comm, ready.plan.stage_graph, ready.lowered.train, [p.train for p in programs])
    outcomes = MPI.COMM_WORLD.gather(run_rank(ready, comm, programs))
    if outcomes is not None:
        compare(ready, outcomes)
        print("passed", case.name, flush=True)


def main() -> None:
    gc.freeze()
    torch.set_num_threads(1)
    comm = connect()
    try:
        for case in of_processes(comm.size):
            passes(comm, case)
    except BaseException:
        print(f"rank {comm.rank}:", traceback.format_exc(), file=sys.stderr, flush=True)
        comm.abort(1)
    comm.close()


if __name__ == "__main__":
    main()
