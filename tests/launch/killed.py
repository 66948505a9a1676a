"""Starts a training that keeps checkpoints, kills it again and again, and lets it go on.

python -m tests.launch.killed SEED KILLS writes runs into the folder that it is started in: `whole` is never
killed, `killed` as often as said, each time while a checkpoint is written or soon after. Each run is a
process of its own, forked here, so that Python and torch are loaded once.
"""

import gc
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.launch.commands import MINE, SLOW
from tests.launch.lines import run

MORE = 4  # steps after the last kill
ENDLESS = 1_000_000
LINE = (*MINE, *SLOW, "data._target_=my_package.Slow", "train.mini_batch=16", "train.micro_batch=4")
LINE += ("cluster.devices=2", "train.checkpoint_every=1", "train.resume=auto")
LINE += ("train.ema=0.9", "train.verify=false", "planner=sequential")
PATIENCE = 60  # seconds


def started(folder: str, steps: int) -> int:
    """A run of so many steps in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            result = run("train", [*LINE, f"train.steps={steps}", f"hydra.run.dir={folder}"])
            code = result["code"]
            Path(f"{folder}.txt").write_text(result["out"] + result["err"])
        finally:
            os._exit(code)
    return child


def newest(folder: Path) -> int:
    """The last step that has a checkpoint, whole or just begun."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name[5:13]) for name in names if name.startswith("step-")), default=0)


def kill_later(child: int, folder: Path, chance: random.Random) -> None:
    """A few steps later than the run was, at any moment."""
    target, end = newest(folder) + chance.randint(1, 4), time.monotonic() + PATIENCE
    while newest(folder) < target:
        assert time.monotonic() < end, "the run does not go on"
        said = Path(f"{folder.parent}.txt")
        assert os.waitpid(child, os.WNOHANG) == (0, 0), said.read_text() if said.exists() else "it ended"
        time.sleep(0.001)
    time.sleep(chance.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run ended before it was killed"


def main() -> None:
    seed, kills = map(int, sys.argv[1:])
    gc.freeze()
    chance = random.Random(seed)
    for _ in range(kills):
        kill_later(started("killed", ENDLESS), Path("killed/checkpoints"), chance)
    steps = newest(Path("killed/checkpoints")) + MORE
    for folder in ("killed", "whole"):
        _, status = os.waitpid(started(folder, steps), 0)
        assert status == 0, Path(f"{folder}.txt").read_text()


if __name__ == "__main__":
    main()
