"""Many steps on MPI ranks: memory, requests and file descriptors of every rank, before and after.

    mpirun -n 4 python -m tests.runtime.soak 10000

trains a small model on four ranks (two of them replicas; the norm is clipped) and then runs a plan of four
emulated devices that take no time, so many steps each, in ten stretches. Rank 0 prints one line of JSON for
each of the two: what every rank had after the first stretch and after the last, and the seconds of a step.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.pipeline.stage_graphs import diamond, paced
from gpp.runtime.communicator import Communicator
from gpp.runtime.data import Batches
from gpp.runtime.emulation import emulated, run_steps, slower, with_messages
from gpp.runtime.mpi import MpiCommunicator, connect
from gpp.runtime.state import StageState
from gpp.runtime.trainer import Trainer
from tests.equality.cases import CASES
from tests.equality.harness import CPU, prepare

STRETCHES = 10
CASE = "replicas-1-2-1-clipped"


class Samples:
    """A data set of tensors in memory."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.keys = tuple(values)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        return {key: self.values[key][list(indices)] for key in keys}


def counts(comm: MpiCommunicator) -> dict[str, int]:
    """What this process holds now."""
    pages = int(open("/proc/self/statm").read().split()[1])
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "requests": len(comm._persistent) + len(comm.dropped),
    }


def soak(comm: MpiCommunicator, name: str, steps: int, run: Callable[[int], None]) -> None:
    found = []
    each = steps // STRETCHES
    start = time.perf_counter()
    for _ in range(STRETCHES):
        run(each)
        comm.barrier()
        found.append(counts(comm))
    seconds = (time.perf_counter() - start) / (each * STRETCHES)
    everyone = comm.all_gather_object((found[0], found[-1]))
    if comm.rank == 0:
        line = {"soak": name, "steps": each * STRETCHES, "seconds": seconds, "ranks": everyone}
        print(json.dumps(line), flush=True)


def tensors(comm: Communicator) -> Trainer:
    """A trainer of the small model."""
    ready = prepare(next(case for case in CASES if case.name == CASE))
    programs = ready.programs(comm.rank)
    state = None
    if programs:
        owned = {n: ready.values[n].clone() for p in programs for n in (*p.parameters, *p.buffers)}
        graph = ready.plan.stage_graph
        state = StageState(programs, graph, owned, ready.make_optimizer, ready.clipping, comm.rank)
    results = (ready.captured.train, ready.captured.evaluate)
    trainer = Trainer(comm, ready.plan, ready.evaluation, ready.lowered, programs, state, *results, CPU)
    trainer.samples = Samples(ready.batches[0])  # type: ignore[attr-defined]
    return trainer


def main() -> None:
    torch.set_num_threads(1)
    steps = int(sys.argv[1])
    comm = connect()
    try:
        real = tensors(comm)
        data = real.samples  # type: ignore[attr-defined]
        size = real.plan.mini_batch
        batches = Batches(len(data), size, 0)
        soak(
            comm,
            "tensors",
            steps,
            lambda count: real.fit(data, batches, 0, count, lambda _: None, trace=False),
        )
        plan = with_messages(slower(paced(diamond([1, 1], 1), 4), 0.0), 1024)
        empty = emulated(comm, plan)
        soak(comm, "emulated", steps, lambda count: run_steps(empty, count))
        comm.close()
    except BaseException:
        print(f"rank {comm.rank}:", traceback.format_exc(), file=sys.stderr, flush=True)
        comm.abort(1)


if __name__ == "__main__":
    main()
