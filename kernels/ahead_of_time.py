"""Compiles kernels for a GPU that is not there, and says what they take of it.

Launch functions are run on meta tensors with a launcher that compiles, so what is compiled are the variants
that launches ask for. It changes this process for good: use one of its own, without TRITON_INTERPRET.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import launch

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]  # name, launch function, its arguments
SHARED_MEMORY = {90: 232448, 80: 166912}  # bytes that one block may use, by architecture
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A variant of a kernel: registers and bytes of stack (spills) of a thread, bytes of shared memory of a
    block, and instructions of Hopper's tensor cores."""

    kernel: str
    case: str
    registers: int
    stack: int
    shared: int
    wgmma: int


class NoDevice:
    """Enough of a driver for Triton to compile and never run."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """Some number."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Some number."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors without data are."""
        return torch.device("meta")

    def is_active(self) -> bool:
        """Whether it can be asked."""
        return True


def compiled(cases: Iterable[Case], architecture: int) -> Iterator[Compiled]:
    """Every kernel that the cases launch, compiled for an architecture, 90 for sm_90."""
    if launch.INTERPRETED:
        raise RuntimeError("kernels are interpreted here: compile where TRITON_INTERPRET is not set")
    triton.runtime.driver.set_active(NoDevice(architecture))
    found: list[tuple[Any, Any]] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        found.append((kernel, kernel.warmup(*arguments, grid=grid, **options)))

    real = launch.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels.") and getattr(module, "launch", None) is real:
            setattr(module, "launch", compile_only)  # noqa: B010
    for case, function, arguments in cases:
        function(*arguments)
        for kernel, made in found:
            registers, stack = usage(made.asm["cubin"])
            wgmma = made.asm["ptx"].count("wgmma.mma_async")
            yield Compiled(kernel.__name__, case, registers, stack, made.metadata.shared, wgmma)
        found.clear()


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a compiled kernel, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = _RESOURCES.search(done.stdout)
    if found is None:
        raise RuntimeError(f"{tool} does not say what a kernel takes: {done.stdout!r}")
    return int(found[1]), int(found[2])
