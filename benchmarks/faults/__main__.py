"""python -m benchmarks.faults [count=200] [seed=0] [jobs=2] [case=17 ...]: injects faults, see `cases`.

With case= only that one is run and what it said is shown; nothing is written.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import RESULTS
from benchmarks.report import machine, markdown, merged, record, text

from .cases import Case, chosen, numbered
from .suite import Suite
from .table import by_fault, by_job, by_place
from .verdict import Verdict

COUNT, SEED, JOBS = 200, 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="count, seed, jobs, case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of faults.json and faults.md")
    given = parser.parse_args(arguments)
    settings = {"count": COUNT, "seed": SEED, "jobs": JOBS, "case": -1}
    for setting in given.settings:
        key, _, value = setting.partition("=")
        if key not in settings or not value.isdecimal():
            parser.error(f"{setting!r} is not one of count=, seed=, jobs=, case= with a whole number")
        settings[key] = int(value)
    if settings["case"] >= 0:
        return _alone(numbered(settings["case"], settings["seed"]))
    return _all(settings["count"], settings["seed"], settings["jobs"], given.out)


def _alone(case: Case) -> int:
    verdict, ended = Suite().run(case)
    print(ended.out, ended.err, sep="\n")
    _tell(case, verdict)
    return bool(verdict.wrong)


def _all(count: int, seed: int, jobs: int, folder: Path) -> int:
    begun = time.perf_counter()
    judged = Suite().run_all(chosen(count, seed), jobs, _tell)
    seconds = time.perf_counter() - begun
    sections = [make(judged) for make in (by_fault, by_place, by_job)]
    print(*map(text, sections), sep="\n")
    target = folder / "faults.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    records = [record(section, seconds, machine()) for section in sections]
    found = merged(records, target, [section.name for section in sections])
    target.write_text(json.dumps(found, indent=1) + "\n")
    command = f"python -m benchmarks.faults count={count} seed={seed}"
    target.with_suffix(".md").write_text(markdown(found["sections"], "Faults, injected", command))
    wrong = [case.number for case, verdict in judged.items() if verdict.wrong]
    print(
        f"{len(wrong)} of {len(judged)} cases went wrong: {', '.join(f'case={n}' for n in wrong) or 'none'}"
    )
    return bool(wrong)


def _tell(case: Case, verdict: Verdict) -> None:
    took = "" if verdict.seconds is None else f" {verdict.seconds:.2f} s"
    print(f"{case.text}:{took} {'WRONG: ' + '; '.join(verdict.wrong) if verdict.wrong else 'ok'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
