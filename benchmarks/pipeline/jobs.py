"""Starts a module of this package on MPI ranks and brings back what its rank 0 measured."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.mpirun import Machine, assemble, find_machine

PATIENCE = 900.0  # seconds that a job may take


def measured(module: str, ranks: int, asked: Mapping[str, Any], *, machine: Machine | None = None) -> Any:
    """What `module` writes for the question `asked`, both as JSON, on so many ranks, one thread each.

    The module is started with the names of two files, of the question and for the answer, see `answer`.
    Raises RuntimeError with the job's last words if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, found = Path(folder) / "asked.json", Path(folder) / "found.json"
        question.write_text(json.dumps(asked))
        command, added = assemble(machine or find_machine(), ranks, module, [str(question), str(found)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **added}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode or not found.is_file():
            words = (done.stderr + done.stdout).strip().splitlines()[-5:]
            raise RuntimeError(f"{module} on {ranks} ranks ended with {done.returncode}: {' / '.join(words)}")
        return json.loads(found.read_text())


def question() -> Any:
    """What this rank was asked."""
    return json.loads(Path(sys.argv[1]).read_text())


def answer(found: Any) -> None:
    """Of rank 0: what it has measured."""
    Path(sys.argv[2]).write_text(json.dumps(found))
