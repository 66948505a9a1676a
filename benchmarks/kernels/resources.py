"""python -m benchmarks.kernels.resources [section ...]: what compiled kernels take of a chip; needs no GPU.

Every kernel is compiled ahead of time in each of its variants: registers of a thread, bytes of stack (what
did not fit in registers), shared memory of a block, and instructions of Hopper's tensor cores. The section
`launches` counts the kernels of whole models.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import run
from benchmarks.section import Cell, Section
from kernels.ahead_of_time import SHARED_MEMORY

from .counts import launch_counts, paper_models

CHECKOUT = Path(__file__).parents[2]
COMPILER = "benchmarks.kernels.variants"  # prints a JSON object for each variant
CHIPS = {90: "H100, H200", 80: "A100"}

Row = Mapping[str, Any]


def sections() -> dict[str, Callable[[], Section]]:
    """One an architecture, and the launches."""
    compiled = {f"sm_{chip}": partial(measured, chip) for chip in CHIPS}
    return {**compiled, "launches": lambda: launch_counts(paper_models())}


def measured(chip: int) -> Section:
    """Compile for one architecture, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", COMPILER, str(chip), "all"],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{COMPILER} {chip} failed:\n{done.stderr[-4000:]}")
    return section(chip, [json.loads(line) for line in done.stdout.splitlines()])


def section(chip: int, table: Sequence[Row]) -> Section:
    """Of the variants compiled for a chip."""
    limit = SHARED_MEMORY[chip]
    spilling = sum(row["stack"] > 0 for row in table)
    too_large = sum(row["shared"] > limit for row in table)
    slow = [row["kernel"] for row in table if chip == 90 and _on_tensor_cores(row) and row["wgmma"] == 0]
    rows: list[tuple[Cell, ...]] = [
        tuple(row[key] for key in ("kernel", "case", "registers", "stack", "shared", "wgmma"))
        for row in sorted(table, key=lambda row: (row["kernel"], row["case"]))
    ]
    kernels = len({row["kernel"] for row in table})
    return Section(
        name=f"sm_{chip}",
        what=f"{kernels} kernels in {len(table)} variants, compiled for sm_{chip} ({CHIPS[chip]})",
        reach=f"no stack, at most {limit} bytes of shared memory"
        + (", wgmma in 16-bit and TF32 products" if chip == 90 else ""),
        measured=f"{spilling} with stack; at most {max(row['registers'] for row in table)} registers and "
        f"{max(row['shared'] for row in table)} bytes"
        + (f"; {len(slow)} without wgmma" if chip == 90 else ""),
        reached=spilling == 0 and too_large == 0 and not slow,
        columns=("kernel", "variant", "registers", "stack", "shared memory", "wgmma"),
        rows=tuple(rows),
        note="By Triton's own assembler; registers and bytes of stack of a thread, bytes of shared memory of "
        "a block, wgmma instructions in the code.",
    )


def _on_tensor_cores(row: Row) -> bool:
    """Products whose tiles are large enough for wgmma, of 16-bit elements or in TF32."""
    return "product_kernel" in row["kernel"] and "float32" not in row["case"]


if __name__ == "__main__":
    title = "The kernels, compiled ahead of time"
    run("kernels-resources", title, sections(), module="benchmarks.kernels.resources")
