"""Start a real MPI job from a test, with whichever mpirun belongs to this Python."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
INHERITED = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDI_")  # of a job that this process may be in


@cache
def mpirun() -> str | None:
    """The mpirun beside this Python (that of a wheel), else the one on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def why_no_mpi() -> str | None:
    """The reason for skipping a test that starts mpirun, or None."""
    if find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    if mpirun() is None:
        return "there is no mpirun"
    return None


@cache
def is_open_mpi() -> bool:
    """Whether mpirun is Open MPI's; MPICH's has other flags."""
    command = mpirun()
    assert command is not None
    answer = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    return "open mpi" in (answer.stdout + answer.stderr).lower()


def run_mpi(
    ranks: int,
    module_or_script: str,
    *arguments: str,
    timeout: float,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module or a script (a path ending in .py) on so many ranks; returns its code and output.

    After `timeout` seconds every process of the job is killed and the code is 124. More ranks than cores are
    fine, each with one thread.
    """
    target = [module_or_script] if module_or_script.endswith(".py") else ["-m", module_or_script]
    flags = ["--oversubscribe", "--bind-to", "none"] if is_open_mpi() else []
    command = [str(mpirun()), "-n", str(ranks), *flags, sys.executable, *target, *arguments]
    return finished(command, job_environment() | (environment or {}), cwd or REPOSITORY, timeout)


def finished(
    command: list[str], environment: dict[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command that starts a job; its code and output, see `run_mpi`."""
    # files, not pipes: a pipe stays open as long as any rank lives, and reading it would wait for that
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        job = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
        code = _wait(job, timeout)
        out.seek(0)
        err.seek(0)
        late = f"\nkilled after {timeout} s" if code == 124 else ""
        return subprocess.CompletedProcess(command, code, out.read(), err.read() + late)


def job_environment() -> dict[str, str]:
    """This process's environment, fit for starting a job in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(INHERITED)}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }


def _wait(job: subprocess.Popen[bytes], timeout: float) -> int:
    try:
        return job.wait(timeout)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if job.poll() is None:
            job.terminate()  # mpirun then ends its ranks, which may sit in process groups of their own
            try:
                job.wait(2)
            except subprocess.TimeoutExpired:
                job.kill()
        for process in _session(job.pid):
            os.kill(process, signal.SIGKILL)
        job.wait()


def _session(leader: int) -> list[int]:
    """The living processes of a session, whatever their process group."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == leader and int(entry.name) != leader:
                members.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return members
