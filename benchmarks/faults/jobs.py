"""Runs the job of one case: starts it, watches its processes from outside, and ends what is left of it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.mpirun import Machine, assemble

from . import elastic
from .cases import RANKS, Case, patience
from .notes import TRACES, Struck, read_note, read_processes, write_case

POLL = 0.02  # seconds between two looks at the processes
START = 120.0  # seconds that a job may take until its fault, on a busy machine
FORGIVEN = 2.0  # seconds for a launcher to leave after its last rank
MARK = "GPP_FAULTS_JOB"  # in the environment of all processes of a job


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a job has ended. `code` None: it had to be killed. Seconds after the fault: `last_rank` is gone,
    `launcher` is gone. `orphans`: processes that outlived the launcher, as command lines."""

    code: int | None
    out: str
    err: str
    struck: Struck | None
    last_rank: float | None
    launcher: float | None
    orphans: tuple[str, ...]


def run_job(case: Case, folder: Path, machine: Machine, plan: Path | None = None) -> Ended:
    """Run a case in an empty folder. An elastic one needs the file of its `plan`."""
    write_case(folder, case)
    (folder / "tmp").mkdir()
    if case.elastic:
        assert plan is not None
        module, arguments = "benchmarks.faults.elastic", elastic.overrides(case, folder, plan)
    else:
        module, arguments = "benchmarks.faults.program", [str(folder)]
    command, added = assemble(machine, RANKS[case.shape], module, arguments)
    environment = {
        **machine.environment,
        **added,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "tmp"),
        MARK: str(folder),
        elastic.FOLDER: str(folder),
    }
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        job = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        try:
            return _watched(job, case, folder)
        finally:
            _kill([job.pid, *_marked(folder)])
            job.wait()


def _watched(job: "subprocess.Popen[bytes]", case: Case, folder: Path) -> Ended:
    begun = time.monotonic()
    last_rank: float | None = None
    launcher: float | None = None
    struck: Struck | None = None
    while True:
        now = time.monotonic()
        struck = struck or read_note(folder)
        ranks = read_processes(folder)
        if last_rank is None and len(ranks) == RANKS[case.shape] and not any(map(_lives, ranks.values())):
            last_rank = now
        if launcher is None and job.poll() is not None:
            launcher = now
        until = begun + START if struck is None else struck.at + patience(case)
        if launcher is not None and (not any(map(_lives, ranks.values())) or now > launcher + FORGIVEN):
            break
        if now > until:
            break
        time.sleep(POLL)
    err = (folder / "err").read_text(errors="replace")
    if any(map(_lives, ranks.values())):
        err += _traces(folder, ranks)
    orphans = tuple(map(_command, _marked(folder))) if launcher is not None else ()
    zero = begun if struck is None else struck.at
    return Ended(
        code=job.poll(),
        out=(folder / "out").read_text(errors="replace"),
        err=err,
        struck=struck,
        last_rank=None if last_rank is None else last_rank - zero,
        launcher=None if launcher is None else launcher - zero,
        orphans=orphans,
    )


def _traces(folder: Path, ranks: Mapping[int, int]) -> str:
    """Where in the code those ranks are that are still there."""
    living = {rank: process for rank, process in ranks.items() if _lives(process)}
    for process in living.values():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR2)
    time.sleep(FORGIVEN)
    files = {rank: folder / f"{TRACES}-{rank}" for rank in living}
    return "".join(f"\n--- rank {rank} is still there\n{file.read_text()}" for rank, file in files.items())


def _lives(process: int) -> bool:
    """Whether there is such a process, and not only its exit code."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def _marked(folder: Path) -> list[int]:
    """The living processes of a job, whoever is their parent now."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and _lives(int(entry.name)):
                found.append(int(entry.name))
        except OSError:  # another's, or it has ended meanwhile
            continue
    return found


def _command(process: int) -> str:
    try:
        return (
            Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
        )
    except OSError:
        return f"process {process}"


def _kill(processes: Iterable[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
