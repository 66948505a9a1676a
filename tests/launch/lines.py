"""Runs several command lines one after the other in this process, or in every rank of an MPI job.

python -m tests.launch.lines IN.json OUT.json: IN is a list of [command, argument, ...]; rank 0 writes to OUT
for each its exit code and what it printed. Starting Python and torch once makes many checks cheap.

Without arguments it forks a process for each [folder, IN, OUT] that it reads, until nothing more comes.
"""

import gc
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from launch.capture import capture
from launch.compare import compare
from launch.export import export
from launch.plan import plan
from launch.profile import profile
from launch.simulate import simulate
from launch.start import launch
from launch.train import train

COMMANDS: dict[str, tuple[Any, str]] = {
    "train": (train, "config"),
    "plan": (plan, "plan"),
    "capture": (capture, "capture"),
    "simulate": (simulate, "simulate"),
    "compare": (compare, "compare"),
    "export": (export, "export"),
    "profile": (profile, "profile"),
}


def run(command: str, arguments: list[str]) -> dict[str, Any]:
    sys.argv = [f"launch.{command}", *arguments]
    streams = sys.stdout, sys.stderr
    code: Any = 0
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            launch(*COMMANDS[command])
        except SystemExit as end:
            code = end.code
    sys.stdout, sys.stderr = streams  # other ranks silence themselves
    return {"code": code or 0, "out": out.getvalue(), "err": err.getvalue()}


def run_all(source: Path, target: Path) -> None:
    results = []
    first = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")) == "0"
    for command, *arguments in json.loads(source.read_text()):
        results.append(run(command, arguments))
        if first:
            target.write_text(json.dumps(results))


def in_a_fork(folder: str, source: str, target: str) -> int:
    """The exit code of a process of its own, as one that is started in the folder; it prints to files."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for descriptor, name in ((0, os.devnull), (1, f"{target}.out"), (2, f"{target}.err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(folder)
        sys.path[0] = folder
        run_all(Path(source), Path(target))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    gc.freeze()  # modules are never garbage: looking for it among them takes a third of a short run
    if len(sys.argv) > 1:
        run_all(*map(Path, sys.argv[1:]))
        return
    for line in sys.stdin:
        print(in_a_fork(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
