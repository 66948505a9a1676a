"""Start commands as a user does: a line, its exit code, and what it printed."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..mpirun import job_environment, run_mpi

SMALL = ("model.layers=1", "model.hidden=16", "train.steps=3", "train.mini_batch=16", "train.held_out=0.003")
MINE = ("model._target_=my_package.MyNet", "data._target_=my_package.MyData")
SLOW = ("cluster.flops=1e6", "cluster.overhead=0")  # devices so slow that small models are worth cutting
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
    module, timeout = "tests.launch.lines", 240
    if ranks is None:
        done = subprocess.run(
            [sys.executable, "-m", module, str(source), str(target)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=folder,
            env={**job_environment(), **(environment or {})},
        )
    else:
        done = run_mpi(ranks, module, str(source), str(target), timeout=timeout, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", done.stderr  # nothing passes by the streams that Python knows
    results = [Result(**item) for item in json.loads(target.read_text())]
    assert len(results) == len(lines)
    return results


def run_command(
    module: str, *arguments: str, cwd: Path, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """python -m module arguments."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=job_environment(),
    )


def read(folder: Path, name: str) -> Any:
    """A JSON file of a run's folder; a list for metrics.jsonl."""
    text = (folder / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in read(folder, "metrics.jsonl")]
