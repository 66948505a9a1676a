"""python -m launch.mpirun -n 4 launch.train [overrides]: assembles an mpirun command, shows it, becomes it.

For one machine, or for hosts given by --hostfile or --host. Whoever owns the flags calls mpirun themselves.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Machine:
    """What the command depends on besides its arguments."""

    mpirun: str
    open_mpi: bool
    cores: int
    root: bool
    environment: Mapping[str, str]


def assemble(
    machine: Machine, ranks: int, module: str, overrides: Sequence[str], extra: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The command, and the variables that it needs beyond the environment.

    More ranks than cores share them: Open MPI wants to be told, and one thread a rank is then enough. Else
    each rank has cores // ranks threads on cores of its own.
    """
    shared = ranks > machine.cores
    threads = max(1, machine.cores // ranks)
    path = machine.environment.get("PYTHONPATH")
    added = {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), *([path] if path else [])])}
    if "OMP_NUM_THREADS" not in machine.environment:
        added["OMP_NUM_THREADS"] = str(threads)
    flags: list[str] = []
    if machine.open_mpi:
        if machine.root:
            added |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        flags += ["--oversubscribe", "--bind-to", "none"] if shared or extra else []
        flags += [] if shared or extra else ["--map-by", f"slot:PE={threads}", "--bind-to", "core"]
        for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
            flags += ["-x", name]  # to other hosts too
    return (
        [machine.mpirun, "-n", str(ranks), *flags, *extra, sys.executable, "-m", module, *overrides],
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
        cores=len(os.sched_getaffinity(0)),
        root=os.geteuid() == 0,
        environment=os.environ,
    )


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
    extra = [*(["--hostfile", given.hostfile] if given.hostfile else [])]
    extra += ["--host", given.host] if given.host else []
    machine = find_machine()
    command, added = assemble(machine, given.n, given.module, given.overrides, extra)
    shown = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
    print(" ".join([*shown, shlex.join(command)]), flush=True)
    if not given.dry_run:
        os.execvpe(command[0], command, {**os.environ, **added})


if __name__ == "__main__":
    main()
