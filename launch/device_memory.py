"""Whether the MPI library takes device memory: tried in a job of its own, and remembered.

No library says so reliably. One that does not may crash, hang or corrupt: in the job that tries it (see
`gpp.runtime.device_probe`) each of these is only an answer. It holds for the library, the machine and the
variables that MPI libraries read.
"""

import hashlib
import json
import os
import platform
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gpp.runtime.device_probe import WORKS

from .mpirun import assemble, find_machine

PATIENCE = 120.0  # seconds that the job may take
MANNERS = 10.0  # seconds in which a job that is told to end does so
# what a job inherits from the one that it is started in, but for what the user asks of the library
OF_A_JOB = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDI_", "MPI_LOCAL", "PALS_")
ASKED = ("OMPI_MCA_", "OMPI_ALLOW_RUN_AS_ROOT")
NOT_ASKED = ("OMPI_MCA_num_procs", "OMPI_MCA_initial_wdir", "OMPI_MCA_cpu_type", "OMPI_MCA_PREFIXES")
# what decides how a library handles device memory
READ = ("UCX_", "OMPI_MCA_", "MPICH_", "MPIR_CVAR_", "MV2_", "MVP_", "I_MPI_", "PSP_", "FI_", "PSM")
READ_TOO = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Verdict:
    """Whether it works, and if not, why: the job's own words."""

    works: bool
    reason: str = ""


def verdict(library: str, machine: str, folder: Path, command: Sequence[str] | None = None) -> Verdict:
    """The remembered verdict, else that of a job. `library` and `machine` describe MPI and GPUs; `command` is
    the job's, else mpirun's with two ranks of `gpp.runtime.device_probe`."""
    environment = asked_for(os.environ)
    file = folder / f"device-memory-{_digest(library, machine, environment)}.json"
    try:
        found = json.loads(file.read_text())
        return Verdict(bool(found["works"]), str(found["reason"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, or of another time
        pass
    answer = _tried(command, environment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as aside:
            json.dump(asdict(answer) | {"library": library, "machine": machine}, aside, indent=1)
        Path(aside.name).replace(file)
    except OSError:
        pass  # it is tried again next time
    return answer


def machine_type() -> str:
    """The kind of this machine, as far as device memory is concerned."""
    import torch

    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        driver = ""
    return f"{platform.machine()}; {', '.join(names)}; CUDA {torch.version.cuda}; {driver}"


def asked_for(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher has put there for the job that this process is in."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(OF_A_JOB) or (name.startswith(ASKED) and name not in NOT_ASKED)
    }


def _tried(command: Sequence[str] | None, environment: Mapping[str, str]) -> Verdict:
    added: Mapping[str, str] = {}
    if command is None:
        try:
            command, added = assemble(find_machine(), 2, "gpp.runtime.device_probe", ["cuda"])
        except SystemExit as error:  # no mpirun
            return Verdict(False, str(error).removeprefix("error: "))
    with tempfile.TemporaryFile("w+") as said:
        try:
            job = subprocess.Popen(
                list(command),
                env={**environment, **added, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Verdict(False, f"the job that tries it cannot be started: {error}")
        try:
            code = job.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGTERM)  # mpirun then ends its ranks
            try:
                job.wait(MANNERS)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
            return Verdict(False, f"the job that tries it was not done after {PATIENCE:.0f} s")
        said.seek(0)
        lines = [line.strip() for line in said.read().splitlines() if line.strip()]
    if code == 0 and WORKS in lines:
        return Verdict(True)
    words = next(
        (line for line in lines if "arrived with" in line or "Error" in line), (lines or ["nothing"])[-1]
    )
    return Verdict(False, f"the job that tries it ended with code {code} and said: {words}")


def _digest(library: str, machine: str, environment: Mapping[str, str]) -> str:
    read = sorted((k, v) for k, v in environment.items() if k.startswith(READ) or k in READ_TOO)
    return hashlib.sha256(repr((library, machine, read)).encode()).hexdigest()[:16]
