"""Peak memory against the plan's estimate, trained for real: resident bytes of a rank above what it had."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.section import Cell, Section
from gpp.plan import device_memory, plan_from_json
from launch.mpirun import assemble, find_machine

LEAST = 200e6  # bytes of a stage: below, an interpreter's own ups and downs count too much
WITHIN = 0.10
# ranks and the command line of launch.train
RUNS: Mapping[str, tuple[int, Sequence[str]]] = {
    "two towers": (
        2,
        (
            *("model._target_=benchmarks.pipeline.towers.TwoTowers", "+model.width=2048"),
            *("data._target_=benchmarks.pipeline.towers.Vectors", "+data.width=2048"),
            *("train.mini_batch=1024", "train.micro_batch=128"),
        ),
    ),
    "transformer of four branches": (
        4,
        (
            *("model.hidden=512", "model.ffn=2048", "model.heads=8", "model.layers=6"),
            *("train.mini_batch=32", "train.micro_batch=4"),
        ),
    ),
    "the same as 1F1B in a row, recomputing nothing, with SGD": (
        4,
        (
            *("model.hidden=512", "model.ffn=2048", "model.heads=8", "model.layers=6"),
            *("train.mini_batch=32", "train.micro_batch=4"),
            *("planner=sequential", "optimizer=sgd"),
        ),
    ),
}
# recorded: no rank holds weights before its own are made
COMMON = ("train.steps=3", "train.held_out=0", "train.verify=false", "train.init=recorded")


def peak_memory(runs: Mapping[str, tuple[int, Sequence[str]]] = RUNS) -> Section:
    """Each rank of each run with at least LEAST bytes."""
    rows: list[tuple[Cell, ...]] = []
    off: list[float] = []
    for name, (ranks, overrides) in runs.items():
        expected, found = _trained(ranks, overrides)
        for rank, (need, peak) in enumerate(zip(expected, found, strict=True)):
            if need >= LEAST:
                off.append(peak / need - 1)
                rows.append((name, rank, need / 2**20, peak / 2**20, f"{off[-1]:+.1%}"))
    worst = max(map(abs, off))
    return Section(
        name="peaks",
        what=f"peak memory of a rank against the plan's estimate, stages of at least {LEAST / 1e6:.0f} MB, "
        "trained for real",
        reach="within 10%",
        measured=f"within {worst:.1%}",
        reached=worst <= WITHIN,
        columns=("run", "rank", "estimate (MiB)", "peak (MiB)", "off by"),
        rows=tuple(rows),
        note="Resident memory of the rank's process above what it had before weights were made.",
    )


def _trained(ranks: int, overrides: Sequence[str]) -> tuple[Sequence[float], Sequence[float]]:
    """What the plan says that each device needs, and what each rank's process took."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [*overrides, *COMMON, f"hydra.run.dir={folder}"]
        command, added = assemble(find_machine(), ranks, "launch.train", asked)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **added}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"launch.train ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        plan = plan_from_json((Path(folder) / "plan.json").read_text())
        result = json.loads((Path(folder) / "result.json").read_text())
        return device_memory(plan), result["peak_memory_bytes"]
