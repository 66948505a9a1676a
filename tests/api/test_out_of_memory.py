"""A stage that does not fit ends the run with the plan's memory, the stage, and what to change."""

import subprocess
import sys
import time

import pytest
import torch

from gpp.runtime.out_of_memory import DeviceMemoryError, advice, explained, is_out_of_memory
from tests.mpirun import REPOSITORY, job_environment, run_mpi, why_no_mpi
from tests.thorough import thorough

from .models import in_stages, ranked

needs_mpi = [pytest.mark.mpi, pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))]
needs_limits = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
HEAD = ["stage", "devices", "parameters", "gradients", "optimizer", "buffers", "stash", "messages"]


def check_message(text: str, rank: str) -> None:
    assert f"the device of rank {rank}" in text and "has no memory left for" in text, text
    assert any(line.split()[: len(HEAD)] == HEAD for line in text.splitlines()), text
    for knob in ("train.micro_batch (it is", "planner.recompute=true", "more devices", "cluster.memory"):
        assert knob in text, text


def alone(room: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.api.small_memory", str(room)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=job_environment(), cwd=REPOSITORY
    )


@thorough
@needs_limits
def test_with_little_address_space() -> None:
    done = alone(16)  # less than the state of AdamW for one stage
    assert done.returncode != 0 and "fits" not in done.stdout
    check_message(done.stderr, "")
    assert "DeviceMemoryError" in done.stderr


@thorough
@needs_limits
def test_with_enough_of_it() -> None:
    done = alone(4000)
    assert done.returncode == 0 and "fits" in done.stdout, done.stderr


@needs_limits
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=needs_mpi)])
def test_one_rank_ends_all(ranks: int) -> None:
    start = time.perf_counter()
    done = run_mpi(ranks, "tests.api.small_memory", "16", "1", timeout=100)
    assert done.returncode not in (0, 124) and "fits" not in done.stdout, done.stdout + done.stderr
    check_message(done.stderr, "1")
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
    ],
)
def test_what_is_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_other_errors_pass() -> None:
    with in_stages(ranked(), ("a",), ("b",), ("",), replicas=(1, 2, 1)) as pipe:
        plan = pipe.plan
    with pytest.raises(RuntimeError, match=r"^something else$"), explained(plan, 0):
        raise RuntimeError("something else")
    with pytest.raises(DeviceMemoryError, match="rank 1 has no memory left for b"), explained(plan, 1):
        raise MemoryError
    assert "planner.shard_optimizer=true" in advice(plan, 1, MemoryError())
    assert "planner.shard_optimizer" not in advice(plan, 0, MemoryError())
