"""Real MPI jobs: one per number of ranks runs every case."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mpirun import job_environment, run_mpi, why_no_mpi
from tests.runtime.cases import CASES
from tests.thorough import thorough

PROGRAM = Path(__file__).with_name("mpi_cases.py")
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or ""),
]


@pytest.mark.parametrize(
    ("ranks", "synchronous"),
    [(4, "0"), *(pytest.param(*some, marks=thorough) for some in ((2, "0"), (3, "1")))],
)
def test_cases(ranks: int, synchronous: str) -> None:
    environment = {"GPP_SYNCHRONOUS_SENDS": synchronous}
    job = run_mpi(ranks, str(PROGRAM), "passing", timeout=120, environment=environment)
    assert job.returncode == 0, job.stdout + job.stderr
    own = re.findall(r"^def case_(\w+)", PROGRAM.read_text(), re.MULTILINE)
    assert job.stdout.splitlines() == [f"passed {name}" for name in (*CASES, *own)]


def test_one_failing_rank_ends_the_job_with_its_reason() -> None:
    start = time.monotonic()
    job = run_mpi(3, str(PROGRAM), "failing", timeout=60)
    assert job.returncode not in (0, 124)
    assert "this rank has had enough" in job.stderr
    assert time.monotonic() - start < 30


def test_processes_that_mpi_leaves_alone_are_refused() -> None:
    """What `srun` without a PMI does: several processes, each the only one of its world."""
    job = subprocess.run(
        [sys.executable, "-c", "from gpp.runtime.mpi import connect; connect()"],
        env=job_environment() | {"SLURM_STEP_NUM_TASKS": "4"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert job.returncode != 0
    assert "srun started 4 tasks, but each is alone" in job.stderr


def test_a_job_that_hangs_is_killed_whole(tmp_path: Path) -> None:
    """Of the helper itself: no rank may outlive its time, not even one that ignores mpirun's signal."""
    script = tmp_path / "hang.py"
    script.write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('process', os.getpid(), flush=True)\n"
        "time.sleep(100)\n"
    )
    job = run_mpi(2, str(script), timeout=5)
    assert job.returncode == 124 and "killed after 5" in job.stderr
    processes = [int(p) for p in re.findall(r"process (\d+)", job.stdout)]
    assert len(processes) == 2
    end = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{p}") for p in processes):
        assert time.monotonic() < end, "a rank is still there"
        time.sleep(0.05)
