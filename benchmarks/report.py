"""Sections as JSON and Markdown, with the machine that they were measured on."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from .section import Cell, Section

FORMAT = "gpp.benchmark/1"


def machine() -> dict[str, str]:
    """Where and when: processor, cores that may be used, versions, load, date."""
    load = os.getloadavg()[0]
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load": f"{load:.1f}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def record(section: Section, seconds: float, where: Mapping[str, str]) -> dict[str, Any]:
    """A section as JSON; `seconds` is what measuring it took."""
    return {**asdict(section), "seconds": round(seconds, 1), "machine": dict(where)}


def merged(records: Sequence[Mapping[str, Any]], old: Path, order: Sequence[str]) -> dict[str, Any]:
    """The records and, of sections that were not measured now, those of the file; in the `order` of names."""
    kept: dict[str, Any] = {}
    if old.is_file():
        before = json.loads(old.read_text())
        if before.get("format") == FORMAT:
            kept = {item["name"]: item for item in before["sections"]}
    kept |= {item["name"]: dict(item) for item in records}
    return {"format": FORMAT, "sections": [kept[name] for name in order if name in kept]}


def markdown(sections: Sequence[Mapping[str, Any]], title: str, command: str) -> str:
    """One table of all sections, then each section's rows; `command` wrote it."""
    lines = [f"# {title}", "", f"Written by `{command}`.", ""]
    head = ("what", "to reach", "measured", "reached")
    lines += _table(head, [(s["what"], s["reach"], s["measured"], _word(s["reached"])) for s in sections])
    for section in sections:
        where = section["machine"]
        lines += ["", f"## {section['what']}", ""]
        if section["note"]:
            lines += [section["note"], ""]
        if section["rows"]:
            lines += [*_table(section["columns"], section["rows"]), ""]
        lines.append(f"{section['seconds']:.0f} s on {_place(where)}")
    return "\n".join(lines) + "\n"


def _place(where: Mapping[str, str]) -> str:
    """A machine in words; of one that is measured with a GPU the GPU comes first."""
    words = f"{where['processor']}, {where['cores']} cores (load {where['load']}), Python {where['python']}, "
    words += f"numpy {where['numpy']}, {where['date']}"
    if "gpu" not in where:
        return words
    packages = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "liger-kernel"))
    return f"{where['gpu']} (driver {where['driver']}, CUDA {where['cuda']}), {packages}, {words}"


def text(section: Section) -> str:
    """A section for the terminal."""
    rows = [section.columns, *(tuple(map(cell, row)) for row in section.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(section.columns))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    reached = "" if section.reached is None else f" (reached: {_word(section.reached)})"
    verdict = f"to reach: {section.reach}\nmeasured: {section.measured}{reached}"
    return "\n".join([f"== {section.name}: {section.what}", *filter(None, lines), verdict, ""])


def cell(value: Cell) -> str:
    """A cell as text; numbers with three to four digits that count."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return _word(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _word(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    head = "| " + " | ".join(columns) + " |"
    line = "|" + "---|" * len(columns)
    return [head, line, *("| " + " | ".join(cell(c).replace("|", "\\|") for c in row) + " |" for row in rows)]
