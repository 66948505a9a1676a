"""python -m launch.mpirun -n 4 launch.train [overrides]: assembles an mpirun command, shows it, runs it.

For one machine, or for hosts given by --hostfile or --host. Whoever owns the flags calls mpirun themselves.
"""

import argparse
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from .elastic import is_wanted

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CHECKOUT = Path(__file__).parents[1]
SYSTEM = Path("/sys/devices/system/cpu")
COMMANDS = (
    *("launch.train", "launch.plan", "launch.compare", "launch.profile", "launch.capture", "launch.simulate"),
)


@dataclass(frozen=True)
class Machine:
    """What the command depends on besides its arguments; `cores` are physical ones that we may use."""

    mpirun: str
    open_mpi: bool
    cores: int
    root: bool
    environment: Mapping[str, str]


def assemble(
    machine: Machine, ranks: int, module: str, overrides: Sequence[str], hosts: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The command, and the variables that it needs beyond the environment.

    On one machine each rank has cores // ranks threads on cores of its own; more ranks than cores share them:
    Open MPI wants to be told, and one thread a rank is then enough. On `hosts` (mpirun's flags that name
    them) their slots say how many ranks there are, and each rank finds its threads when it starts.
    """
    threads = machine.cores // ranks
    path = [p for p in machine.environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    added = {"PYTHONPATH": os.pathsep.join(dict.fromkeys([str(CHECKOUT), *path]))}
    if "OMP_NUM_THREADS" not in machine.environment and not hosts:
        added["OMP_NUM_THREADS"] = str(max(1, threads))
    flags: list[str] = []
    if machine.open_mpi:
        if machine.root:
            added |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if hosts:
            flags += ["--bind-to", "none"]
        elif threads:
            flags += ["--map-by", f"slot:PE={threads}", "--bind-to", "core:if-supported"]
        else:
            flags += ["--oversubscribe", "--bind-to", "none"]
        flags += ["--with-ft", "ulfm"] if is_wanted(overrides) else []
        for name in ("PYTHONPATH", "OMP_NUM_THREADS"):  # to other hosts too
            flags += ["-x", name] if name in {*added, *machine.environment} else []
    return (
        [machine.mpirun, "-n", str(ranks), *flags, *hosts, sys.executable, "-m", module, *overrides],
        added,
    )


def find_machine() -> Machine:
    """This machine; the mpirun beside this Python (that of a wheel) comes before the one on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    command = str(beside) if beside.exists() else shutil.which("mpirun")
    if command is None:
        raise SystemExit(
            'error: there is no mpirun: pip install "gpp[mpi]" brings one, or load your site\'s MPI module. '
            "python -m launch.train runs without MPI"
        )
    answer = subprocess.run([command, "--version"], capture_output=True, text=True)
    return Machine(
        mpirun=command,
        open_mpi="open mpi" in (answer.stdout + answer.stderr).lower(),
        cores=physical_cores(),
        root=os.geteuid() == 0,
        environment=os.environ,
    )


def physical_cores(usable: Collection[int] | None = None, system: Path = SYSTEM) -> int:
    """The cores among the processors that this process may use: two threads of one core count once, as Open
    MPI counts them when it binds."""
    processors = os.sched_getaffinity(0) if usable is None else usable
    cores = set()
    for number in processors:
        try:
            cores.add((system / f"cpu{number}" / "topology" / "thread_siblings_list").read_text())
        except OSError:  # a system that does not say
            cores.add(str(number))
    return len(cores)


def check_module(module: str) -> None:
    """Raise SystemExit if there is no such module: better once here than once a rank."""
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise SystemExit(f"error: there is no module {module}; the commands are {', '.join(COMMANDS)}")


def attended(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command to its end; its exit code. mpirun ends a job at once on SIGTERM, but hands SIGUSR1 on:
    so the first request to end becomes that, and the job leaves with its work kept; a second one is meant as
    it is. If this process is killed, mpirun ends."""
    asked = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        job.send_signal(number if asked else signal.SIGUSR1)
        asked = True

    job = subprocess.Popen(command, env=environment, preexec_fn=_ends_with(os.getpid()))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()  # it sends Ctrl-C to mpirun too
    signal.signal(signal.SIGINT, signal.SIG_IGN if at_terminal else lambda *_: job.send_signal(signal.SIGINT))
    code = job.wait()
    return code if code >= 0 else 128 - code


def _ends_with(parent: int) -> Callable[[], None]:
    """What a child does so as not to outlive its parent."""
    library = ctypes.CDLL(None)

    def prepare() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died before that
            os._exit(1)

    return prepare


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, show, exec."""
    parser = argparse.ArgumentParser(prog="python -m launch.mpirun", description=__doc__)
    parser.add_argument("-n", type=int, required=True, metavar="RANKS", help="how many ranks to start")
    parser.add_argument("--hostfile", help="file with a host and its slots on each line")
    parser.add_argument("--host", help="hosts and slots: a:4,b:4")
    parser.add_argument("--dry-run", action="store_true", help="show the command only")
    parser.add_argument("module", help="the command to start on every rank, e.g. launch.train")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="its own arguments")
    given = parser.parse_args(arguments)
    if given.n < 1:
        parser.error(f"-n must be at least 1, it is {given.n}")
    check_module(given.module)
    hosts = [*(["--hostfile", given.hostfile] if given.hostfile else [])]
    hosts += ["--host", given.host] if given.host else []
    if given.hostfile and not Path(given.hostfile).is_file():
        parser.error(f"there is no hostfile {given.hostfile}")
    machine = find_machine()
    command, added = assemble(machine, given.n, given.module, given.overrides, hosts)
    shown = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
    print(" ".join([*shown, shlex.join(command)]), flush=True)
    if not given.dry_run:
        sys.exit(attended(command, {**os.environ, **added}))


if __name__ == "__main__":
    main()
