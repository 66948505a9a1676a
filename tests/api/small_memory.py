"""A pipeline that may not have the memory that it needs: python -m tests.api.small_memory room [rank].

Three layers of 36 MB; from when the pipeline is made on, this process (of an MPI job the rank's) may have
`room` MB more address space than it has then.
"""

import os
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gpp.api.start import pipeline

WIDTH = 3000


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor):
        return (self.b(torch.relu(self.a(x))).mean(1) - y).square().mean()


def limited(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Called when a rank has its weights; room is then what is left for everything else."""
    if named[0][0] != "probe" and os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) in RANKS:
        lines = Path("/proc/self/status").read_text().splitlines()
        size = next(int(line.split()[1]) for line in lines if line.startswith("VmSize")) << 10
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, hard))
    return torch.optim.AdamW(named)


if __name__ == "__main__":
    ROOM = int(sys.argv[1]) << 20
    RANKS = (None, *sys.argv[2:])
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, WIDTH), "y": torch.randn(8)}
    with pipeline(
        Wide(), batch, optimizer=limited, mini_batch=8, micro_batch=2, devices=2, verify=False, device="cpu"
    ) as pipe:
        pipe.step(batch)
        print("fits", flush=True)
