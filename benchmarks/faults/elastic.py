"""What a rank of an elastic job runs, under launch.mpirun: launch.train, with the fault of a case.

The folder of the job is in the environment.
"""

import os
from pathlib import Path

from launch.start import launch
from launch.train import train

from .cases import EVERY, GO_ON, KEEP, RANKS, STEPS, Case
from .notes import read_case, write_process

FOLDER = "GPP_FAULTS_FOLDER"


def overrides(case: Case, folder: Path, plan: Path) -> list[str]:
    """The command line."""
    return [
        "model._target_=benchmarks.faults.scene.Branched",
        "data._target_=benchmarks.faults.scene.Samples",
        f"plan={plan}",
        f"cluster.devices={RANKS[case.shape]}",
        "cluster.flops=1e6",
        "cluster.overhead=0",
        f"train.steps={STEPS}",
        "train.mini_batch=16",
        "train.clip_norm=1.0",
        "train.verify=false",
        f"train.silence={GO_ON:g}",
        f"train.checkpoint_every={EVERY}",
        f"train.checkpoint_keep={KEEP}",
        f"train.checkpoint_folder={folder / 'kept'}",
        "train.elastic=true",
        "device=cpu",
        f"hydra.run.dir={folder / 'run'}",
    ]


def main() -> None:
    """The whole life of a rank."""
    from .inject import Injector

    folder, rank = Path(os.environ[FOLDER]), int(os.environ["OMPI_COMM_WORLD_RANK"])
    write_process(folder, rank)
    Injector(read_case(folder), rank, folder, folder / "kept")
    launch(train, "config")


if __name__ == "__main__":
    main()
