"""What `python -m benchmarks.NAME [section ...]` does: measure, print, and write JSON and Markdown.

Sections that are not named keep what the file has of an earlier run.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

from .report import machine, markdown, merged, record, text
from .section import Section

RESULTS = Path(__file__).parent / "results"


def run(
    name: str,
    title: str,
    known: Mapping[str, Callable[[], Section]],
    arguments: Sequence[str] | None = None,
    *,
    module: str | None = None,
) -> None:
    """Measure the sections asked for, into NAME.json and NAME.md; after each, so that a run that is stopped
    keeps what it has. `module` is what is run, benchmarks.NAME if it is not said."""
    command = f"python -m {module or f'benchmarks.{name}'}"
    parser = argparse.ArgumentParser(prog=command, description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {name}.json and {name}.md")
    asked = parser.parse_args(arguments)
    unknown = [section for section in asked.sections if section not in known]
    if unknown:
        parser.error(f"there is no section {unknown[0]}; there are {', '.join(known)}")
    target = asked.out / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    for which in asked.sections or known:
        start = perf_counter()
        section = known[which]()
        print(text(section), flush=True)
        found = merged([record(section, perf_counter() - start, machine())], target, list(known))
        target.write_text(json.dumps(found, indent=1) + "\n")
        target.with_suffix(".md").write_text(markdown(found["sections"], title, command))
