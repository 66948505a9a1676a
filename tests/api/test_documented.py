"""The example of docs/usage.md runs as it stands, in one process and on ranks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpirun import REPOSITORY, job_environment, run_mpi, why_no_mpi
from tests.thorough import thorough


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "usage.md").read_text(), re.DOTALL)
    path = tmp_path / "script.py"
    path.write_text(code)
    return path


def check(out: str, said: str) -> None:
    found = re.fullmatch(r"loss (\S+), held out (\S+), AUC (\S+)\n", out)
    assert found, out + said
    loss, held_out, area = map(float, found.groups())
    assert loss < 0.5 and held_out < 0.5 and 0.9 < area <= 1


def test_alone(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=job_environment()
    )
    assert done.returncode == 0, done.stderr
    check(done.stdout, done.stderr)


@thorough
@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
def test_on_ranks(script: Path) -> None:
    done = run_mpi(3, str(script), timeout=120)
    assert done.returncode == 0, done.stderr
    check(done.stdout, done.stderr)
