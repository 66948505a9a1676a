"""Runs plans on emulated devices, one after the other, on the ranks of one MPI job."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from gpp.plan import Plan, plan_from_json, plan_to_json
from gpp.runtime.communicator import Communicator
from gpp.runtime.emulation import emulated, exact_sleep, run_steps, with_links
from gpp.runtime.mpi import connect
from gpp.topology import Link

from .jobs import answer, measured, question

SMALL, LARGE = 1 << 10, 32 << 20  # bytes: beyond what caches hold
TURNS = 20


def timed(plans: Mapping[str, Plan], steps: int, transport: str = "host", *, links: bool = False) -> "Timed":
    """Seconds of a step of every plan, measured by as many ranks as the largest needs. `transport`: see
    `gpp.runtime.emulation.emulated`. `links`: plans are lowered, and their gradients summed, for the
    link that is measured."""
    ranks = max(len(plan.topology.devices) for plan in plans.values())
    texts = {name: plan_to_json(plan) for name, plan in plans.items()}
    asked = {"plans": texts, "steps": steps, "transport": transport, "links": links}
    return Timed(measured("benchmarks.pipeline.emulate", ranks, asked))


class Timed:
    """What a job has measured: `seconds` of a step and `cpu` seconds of all ranks for it, by plan; the
    `latency` and `bandwidth` of messages between two of its ranks."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.seconds: Mapping[str, float] = found["seconds"]
        self.cpu: Mapping[str, Sequence[float]] = found["cpu"]
        self.latency: float = found["latency"]
        self.bandwidth: float = found["bandwidth"]


def link_seconds(comm: Communicator, size: int) -> float:
    """Of a message from rank 0 to rank 1: half a round trip, the median of some; other ranks wait."""
    buffer = comm.prepare(torch.zeros(size, dtype=torch.uint8))
    found = []
    comm.barrier()
    if comm.rank < 2:
        for _ in range(TURNS):
            start = time.perf_counter()
            if comm.rank == 0:
                comm.wait([comm.isend(buffer, 1, 0)])
                comm.wait([comm.irecv(buffer, 1, 0)])
            else:
                comm.wait([comm.irecv(buffer, 0, 0)])
                comm.wait([comm.isend(buffer, 0, 0)])
            found.append((time.perf_counter() - start) / 2)
    comm.barrier()
    return median(found) if found else 0.0


def main() -> None:
    """The program of a rank."""
    asked = question()
    exact_sleep()
    comm = connect()
    small, large = link_seconds(comm, SMALL), link_seconds(comm, LARGE)
    latency, bandwidth = max(small, 1e-9), (LARGE - SMALL) / max(large - small, 1e-9)
    link = comm.broadcast_object(lambda: Link(latency, bandwidth))
    seconds: dict[str, float] = {}
    cpu: dict[str, list[float]] = {}
    for name, text in asked["plans"].items():
        plan = plan_from_json(text)
        plan = with_links(plan, link) if asked["links"] else plan
        trainer = emulated(comm, plan, transport=asked["transport"])
        run_steps(trainer, 1)
        before = time.process_time()
        run_steps(trainer, int(asked["steps"]))
        cpu[name] = comm.all_gather_object((time.process_time() - before) / int(asked["steps"]))
        if comm.rank == 0:
            seconds[name] = median(trainer.measured.step_seconds[2:])
        comm.barrier()
    if comm.rank == 0:
        answer({"seconds": seconds, "cpu": cpu, "latency": link.latency, "bandwidth": link.bandwidth})


if __name__ == "__main__":
    main()
