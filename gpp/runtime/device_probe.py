"""The program of a small MPI job that finds out whether MPI takes device memory: two ranks, real messages.

An MPI library that does not may crash, hang or deliver something else: so nobody asks it in a process that
matters. Rank 0 prints WORKS at the end.

    mpirun -n 2 python -m gpp.runtime.device_probe cuda
"""

import sys

import torch

from .environment import local_rank

SIZES = (1, 64 << 10, 16 << 20)  # bytes: what is sent at once, by rendezvous, in pieces
WORKS = "device memory travels"


def main() -> None:
    """Send patterns there and back, both held against what they should be."""
    device = torch.device(sys.argv[1])
    if device.type == "cuda":  # before MPI starts, which binds to it
        device = torch.device("cuda", (local_rank() or 0) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    from .mpi import connect

    comm = connect()
    comm.device_memory = True
    for size in SIZES:
        expected = (torch.arange(size) * 7 + size).to(torch.uint8)
        sent = expected.to(device) if comm.rank == 0 else torch.zeros(size, dtype=torch.uint8, device=device)
        _synchronize(device)
        for source in (0, 1):
            if comm.rank == source:
                comm.wait([comm.isend(sent, 1 - source, 0)])
            else:
                sent.zero_()
                _synchronize(device)
                comm.wait([comm.irecv(sent, source, 0)])
            if not torch.equal(sent.cpu(), expected):
                print(f"{size} bytes arrived with other contents", file=sys.stderr, flush=True)
                comm.abort(1)
    comm.close()
    if comm.rank == 0:
        print(WORKS, flush=True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
