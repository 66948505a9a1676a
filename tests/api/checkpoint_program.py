"""The program of MPI jobs that keep and resume: checkpoint_program.py FOLDER."""

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from gpp.api.checkpoints import Checkpoints
from gpp.api.crew import RefusedError
from gpp.checkpoint.tensors import CheckpointError
from gpp.runtime.data import Batches
from gpp.runtime.mpi import connect
from tests.equality.harness import captured_model

from .resumed import SAMPLES, TOWERS, Rows, in_one, made

ON_TWO = replace(TOWERS, stages=(("a",), ("",)))
STEPS = 4
EVERY = 2


def run(ranks: int, folder: Path) -> list[float]:
    """Losses of STEPS steps: begun on three ranks with checkpoints, resumed at EVERY elsewhere."""
    case = {3: TOWERS, 2: ON_TWO, 1: in_one(TOWERS)}[ranks]
    losses: list[float] = []
    data = Rows(captured_model(case.model, case.dtype, case.precision, case.freeze)[0].model, case.dtype)
    batches = Batches(SAMPLES, case.samples, 5)
    with made(case, other_weights=ranks != 3) as pipe:
        if ranks == 3:
            kept = Checkpoints(folder=folder, every=EVERY)
            pipe.fit(data, batches, STEPS, lambda record: losses.append(record.loss), checkpoints=kept)
        else:
            pipe.load(folder / f"step-{EVERY:08d}")
            pipe.fit(data, batches, STEPS - EVERY, lambda record: losses.append(record.loss))
        for value in pipe.state_dict().values():
            losses.append(float(value.double().sum()))
        if ranks != 3:
            (wrong,) = pipe.load(folder)  # of two ranks the second reads the damaged file
            assert "is damaged" in wrong and wrong.startswith("rank 1: ") == (ranks == 2), wrong
            assert pipe.steps == EVERY
        if ranks == 3:  # what one rank finds, all are told
            for call in (
                lambda: pipe.load(folder / "nowhere"),
                lambda: pipe.save(Checkpoints(folder=folder / "file")),
            ):
                try:
                    call()
                except (CheckpointError, RefusedError) as error:
                    assert ("rank 0: " in str(error)) != pipe.is_first, error
                else:
                    raise AssertionError("it was not refused")
    return losses


def main() -> None:
    torch.set_num_threads(1)
    comm = connect()
    folder = Path(sys.argv[1])
    try:
        if comm.rank == 0:
            folder.mkdir(exist_ok=True)
            (folder / "file").touch()
        comm.barrier()
        found = run(comm.size, folder)
    except BaseException:
        print(f"rank {comm.rank}:", traceback.format_exc(), file=sys.stderr, flush=True)
        comm.abort(1)
    comm.barrier()
    if comm.rank == 0:
        print(json.dumps(found), flush=True)
    comm.close()


if __name__ == "__main__":
    main()
