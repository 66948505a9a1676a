"""Start commands as a user does: a line, its exit code, and what it printed."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..mpirun import REPOSITORY, job_environment, run_mpi

SMALL = ("model.layers=1", "model.hidden=16", "train.steps=3", "train.mini_batch=16", "train.held_out=0.003")
MINE = ("model._target_=my_package.MyNet", "data._target_=my_package.MyData")
SLOW = ("cluster.flops=1e6", "cluster.overhead=0")  # devices so slow that small models are worth cutting
LINES = "tests.launch.lines"
PACKAGE = Path(__file__).with_name("my_package.py")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The one message of a run that was refused."""
        assert self.code == 1, self.out + self.err
        assert self.err.startswith("error: ") and self.err.count("error: ") == 1, self.err
        assert "Traceback" not in self.err, self.err
        assert "Error executing job" not in self.err, self.err
        return self.err.removeprefix("error: ").strip()

    def passed(self) -> str:
        """What a run printed that went well."""
        assert self.code == 0, self.out + self.err
        assert self.err == "", self.err
        return self.out


def foreign(folder: Path) -> Path:
    """A folder of a user, with a module of theirs and nothing of ours."""
    (folder / "my_package.py").write_text(PACKAGE.read_text())
    return folder


def run_lines(
    folder: Path,
    lines: Sequence[Sequence[str]],
    *,
    ranks: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run the lines in `folder`, in one process (`environment` beside its own) or a job of `ranks`."""
    source, target = folder / f"lines{ranks}.json", folder / f"results{ranks}.json"
    source.write_text(json.dumps(lines))
    timeout = 240
    if ranks is not None:
        done = run_mpi(ranks, LINES, str(source), str(target), timeout=timeout, cwd=folder)
    elif environment:
        arguments = (str(source), str(target))
        done = run_command(LINES, *arguments, cwd=folder, timeout=timeout, environment=environment)
    else:
        done = _forked(folder, source, target, timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", done.stderr  # nothing passes by the streams that Python knows
    results = [Result(**item) for item in json.loads(target.read_text())]
    assert len(results) == len(lines)
    return results


@cache
def _server() -> subprocess.Popen[str]:
    """A process that has loaded everything and forks, so that Python and torch start once a session."""
    return subprocess.Popen(
        [sys.executable, "-m", LINES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=job_environment(),
        start_new_session=True,
    )


def _forked(folder: Path, source: Path, target: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """The lines in a process that is as if it had been started in the folder."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps([str(folder), str(source), str(target)]), file=server.stdin, flush=True)
    if not select.select([server.stdout], [], [], timeout)[0]:
        _server.cache_clear()
        os.killpg(server.pid, signal.SIGKILL)
        raise subprocess.TimeoutExpired(str(source), timeout)
    code = int(server.stdout.readline())
    out, err = (Path(f"{target}.{name}").read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([LINES], code, out, err)


def run_command(
    module: str,
    *arguments: str,
    cwd: Path,
    timeout: float = 120,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """python -m module arguments."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**job_environment(), **(environment or {})},
    )


def read(folder: Path, name: str) -> Any:
    """A JSON file of a run's folder; a list for metrics.jsonl."""
    text = (folder / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in read(folder, "metrics.jsonl")]
