"""What a rank of a job runs, under mpirun: `python -m benchmarks.faults.program FOLDER`.

It trains a small model from `scene` until the fault of the case in that folder strikes.
"""

import os
import sys
from pathlib import Path

from .cases import EVERY, KEEP, SETUP_SILENCE, STEPS, Case, Place
from .notes import Phase, read_case, write_process

ENDLESS = 100_000  # steps of a job that a fault is to strike at any moment


def main() -> None:
    """The whole life of a rank."""
    folder, rank = Path(sys.argv[1]), int(os.environ["OMPI_COMM_WORLD_RANK"])
    write_process(folder, rank)
    _train(read_case(folder), rank, folder)


def _train(case: Case, rank: int, folder: Path) -> None:
    import torch

    from gpp.api.checkpoints import Checkpoints
    from gpp.api.start import pipeline
    from gpp.runtime.data import Batches

    from .inject import Injector
    from .scene import MINI_BATCH, Branched, Samples, plan_of

    torch.manual_seed(0)
    torch.set_num_threads(1)
    data, kept = Samples(), Checkpoints(folder=folder / "kept", every=EVERY, keep=KEEP)
    injector = Injector(case, rank, folder, kept.folder)
    with pipeline(
        Branched(),
        data.read(range(4), data.keys),
        optimizer=lambda named: torch.optim.AdamW(named, lr=1e-3),
        mini_batch=MINI_BATCH,
        plan=plan_of(case.shape),
        clip_norm=1.0,
        device="cpu",
        verify=False,
        silence=SETUP_SILENCE,
    ) as pipe:
        steps = ENDLESS if case.place is Place.MOMENT else STEPS
        pipe.fit(data, Batches(len(data), MINI_BATCH, 0), steps, checkpoints=kept)
        pipe.evaluate_dataset(Samples(2 * MINI_BATCH + 1))
        injector.at(Place.LEAVING)
    injector.phase = Phase.CLOSED
    injector.at(Place.CLOSED)


if __name__ == "__main__":
    main()
