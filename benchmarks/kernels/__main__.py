"""python -m benchmarks.kernels [key=value ...]: the kernels against their rivals, on this machine's GPU.

Writes kernels.md, kernels.json and, where matplotlib is installed, figures into benchmarks/results. With
`tune=true` it looks for faster configurations first and writes kernels/tuned/<gpu>.json. Without a GPU it
says so, writes nothing and ends with code 0. `--help` lists the keys.
"""

import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from launch.start import launch

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator

NO_GPU = "benchmarks.kernels: there is no GPU here, so nothing is measured and nothing is written"
SEVERAL = {"-m", "--multirun"}  # Hydra writes a folder for several runs before the first of them begins


def benchmark(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    import torch

    from .report import tuned_and_measured
    from .settings import settings

    asked = settings(config)
    if says_no_gpu():
        return
    from .clock import CudaClock

    clock = CudaClock(asked.seconds)
    tuned_and_measured(asked, clock, torch.cuda.get_device_name(clock.device))


def says_no_gpu() -> bool:
    """Whether there is none; then it has said so."""
    import torch

    missing = not torch.cuda.is_available()
    if missing:
        print(NO_GPU, flush=True)
    return missing


if __name__ == "__main__" and not (SEVERAL & set(sys.argv[1:]) and says_no_gpu()):
    launch(benchmark, "benchmark_kernels")
