"""One chain of stages that sleep, run by three runtimes in the same processes, in turns.

gpp; torch.distributed.pipelining (Schedule1F1B over gloo), which is what a user would take otherwise; and a
loop of bare mpi4py calls, which is what MPI gives without a runtime. A stage sleeps f seconds forward and 2 f
backward, and its message has so many bytes. All sleep with the same function.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from gpp.plan import Plan
from gpp.runtime.emulation import emulated, exact_sleep, run_steps, wait, with_messages
from gpp.runtime.mpi import MpiCommunicator, connect

from .jobs import answer, question
from .stage_graphs import chain, paced

ROUNDS = 3  # in each, every side runs once


@dataclass(frozen=True)
class Chain:
    """So many ranks, micro-batches, seconds of a forward, bytes of a message."""

    ranks: int
    micro_batches: int
    forward: float
    bytes: int

    def plan(self) -> Plan:
        """For gpp."""
        return with_messages(paced(chain(self.ranks), self.micro_batches, unit=self.forward), self.bytes)


class _Sleep(torch.autograd.Function):
    """Takes time forward, and twice that backward."""

    @staticmethod
    def forward(context: Any, value: Tensor, seconds: float) -> Tensor:
        context.seconds = seconds
        wait(seconds)
        return value.clone()

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        wait(2 * context.seconds)
        return gradients[0].clone(), None


class _Stage(nn.Module):
    """A stage for torch."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, value: Tensor) -> Tensor:
        """Sleep."""
        found: Tensor = _Sleep.apply(value, self.seconds)  # type: ignore[no-untyped-call]
        return found


def gpp_steps(comm: MpiCommunicator, case: Chain, steps: int) -> list[float]:
    """Seconds of every step."""
    trainer = emulated(comm, case.plan())
    run_steps(trainer, steps)
    return trainer.measured.step_seconds


def torch_steps(case: Chain, steps: int) -> list[float]:
    """Seconds of every step of torch.distributed.pipelining."""
    rank = dist.get_rank()
    shape = (1, max(1, case.bytes // 4))
    stage = PipelineStage(_Stage(case.forward), rank, case.ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, case.micro_batches, loss_fn=lambda output, target: output.sum())
    whole = torch.ones((case.micro_batches, *shape[1:]), requires_grad=True)
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        if rank == 0:
            schedule.step(whole)
        elif rank == case.ranks - 1:
            schedule.step(target=whole, losses=[])
        else:
            schedule.step()
        found.append(time.perf_counter() - start)
    return found


def bare_steps(comm: MPI.Intracomm, case: Chain, steps: int) -> list[float]:
    """Seconds of every step of a loop over MPI calls."""
    return [_bare_step(comm, case) for _ in range(steps)]


def _bare_step(comm: MPI.Intracomm, case: Chain) -> float:
    """1F1B: receives posted ahead, blocking waits."""
    rank, last = comm.Get_rank(), case.ranks - 1
    down, up = ([np.zeros(case.bytes, dtype=np.uint8) for _ in range(case.micro_batches)] for _ in range(2))
    made = np.ones(case.bytes, dtype=np.uint8)
    warm = min(case.ranks - rank, case.micro_batches)
    start = time.perf_counter()
    activations = [comm.Irecv(b, rank - 1, 0) for b in down] if rank else []
    gradients = [comm.Irecv(b, rank + 1, 1) for b in up] if rank < last else []
    sends: list[MPI.Request] = []

    def forward(i: int) -> None:
        if rank:
            activations[i].Wait()
        wait(case.forward)
        if rank < last:
            sends.append(comm.Isend(made, rank + 1, 0))

    def backward(i: int) -> None:
        if rank < last:
            gradients[i].Wait()
        wait(2 * case.forward)
        if rank:
            sends.append(comm.Isend(made, rank - 1, 1))

    for i in range(warm):
        forward(i)
    for i in range(case.micro_batches):
        backward(i)
        if i + warm < case.micro_batches:
            forward(i + warm)
    MPI.Request.Waitall(sends)
    return time.perf_counter() - start


def main() -> None:
    """One chain; the answer is each side's seconds of a step, the median of all rounds."""
    asked = question()
    case, steps = Chain(**asked["case"]), int(asked["steps"])
    exact_sleep()
    comm = connect()
    port = MPI.COMM_WORLD.bcast(20000 + os.getpid() % 20000)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size
    )
    own = MPI.COMM_WORLD.Dup()
    sides: dict[str, Callable[[], list[float]]] = {
        "gpp": lambda: gpp_steps(comm, case, steps),
        "torch": lambda: torch_steps(case, steps),
        "bare": lambda: bare_steps(own, case, steps),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            comm.barrier()
            found[name] += run()[1:]
    if comm.rank == 0:
        answer({name: median(seconds) for name, seconds in found.items()})
    comm.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
