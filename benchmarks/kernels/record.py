"""kernels.json and kernels.md: what was measured, by which versions, on which GPU.

A later run of some operators keeps the others' figures if GPU, driver and versions are the same; figures of
different ones are never put side by side.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, markdown, record
from benchmarks.section import Section

from .ceilings import Ceilings
from .clock import Spread
from .measure import Measurement, Run
from .rivals import version

FORMAT = "gpp.kernels/1"
TITLE = "The kernels, measured"
COMMAND = "python -m benchmarks.kernels"
SAME = ("gpu", "driver", "cuda", "torch", "triton", "liger-kernel")  # of runs whose figures may be compared


def where(gpu: str) -> dict[str, str]:
    """Machine, GPU, driver and versions."""
    return {
        **machine(),
        "gpu": gpu,
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        **{package: version(package) for package in ("torch", "triton", "liger-kernel")},
    }


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.partition("\n")[0].strip() or "unknown"


def content(run: Run, ceilings: Ceilings, machine: dict[str, str], seconds: float) -> dict[str, Any]:
    """As JSON."""
    return {
        "format": FORMAT,
        "machine": machine,
        "seconds": round(seconds, 1),
        "ceilings": asdict(ceilings),
        "measurements": [asdict(m) for m in run.measurements],
        "skipped": list(run.skipped),
    }


def merged(new: dict[str, Any], path: Path) -> dict[str, Any]:
    """The new measurements, and those of the file that were not made again."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    if old.get("format") != FORMAT or any(old["machine"].get(k) != new["machine"].get(k) for k in SAME):
        return new
    made = {m.key for m in measurements(new)}
    kept = [asdict(m) for m in measurements(old) if m.key not in made]
    products = {**old["ceilings"]["product"], **new["ceilings"]["product"]}
    order = sorted([*kept, *new["measurements"]], key=lambda m: str(m["kernel"]))
    return {**new, "ceilings": {**new["ceilings"], "product": products}, "measurements": order}


def measurements(content: dict[str, Any]) -> list[Measurement]:
    """Those of a file's content."""
    found = []
    for item in content["measurements"]:
        spreads = {key: None if item[key] is None else Spread(**item[key]) for key in ("gpu", "wall")}
        found.append(Measurement(**{**item, **spreads}))
    return found


def ceilings_of(content: dict[str, Any]) -> Ceilings:
    """Those of a file's content."""
    return Ceilings(**content["ceilings"])


def page(sections: Sequence[Section], content: dict[str, Any]) -> str:
    """The Markdown file."""
    records = [record(section, content["seconds"], content["machine"]) for section in sections]
    return markdown(records, TITLE, COMMAND)
