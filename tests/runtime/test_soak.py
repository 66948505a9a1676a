"""Nothing grows while steps run: a short soak. `tests.runtime.soak` with 10000 steps is the long one."""

import json

import pytest

from tests.mpirun import run_mpi, why_no_mpi
from tests.thorough import thorough

STEPS = 1000
GROWTH = 1 << 20  # bytes of each rank's resident memory, in nine tenths of the steps

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or ""),
]


@thorough
def test_nothing_grows() -> None:
    job = run_mpi(4, "tests.runtime.soak", str(STEPS), timeout=120)
    assert job.returncode == 0, job.stdout + job.stderr
    lines = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("{")]
    assert [line["soak"] for line in lines] == ["tensors", "emulated"]
    for line in lines:
        for rank, (first, last) in enumerate(line["ranks"]):
            grown = {key: last[key] - first[key] for key in first}
            assert grown["rss"] < GROWTH, f"{line['soak']}, rank {rank}: {grown}"
            assert grown["descriptors"] == grown["requests"] == 0, f"{line['soak']}, rank {rank}: {grown}"
            assert first["requests"] > 0
