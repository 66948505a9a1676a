"""The program of an MPI job: every scene that has enough with its ranks; rank 0 prints what has passed."""

import gc
import sys
import traceback

import torch

from gpp.runtime.mpi import connect

from . import scenes


def main() -> None:
    gc.freeze()
    torch.set_num_threads(1)
    comm = connect()
    names = list(scenes.ON_PROCESSES[comm.size])
    try:
        for name in names:
            scenes.equal_to_the_reference(scenes.BY_NAME[name])
        if comm.size == 3:
            said = comm.all_gather_object(scenes.refusals())
            assert said == said[:1] * 3, said
            assert all(text.startswith("rank ") and "key '" in text for text in said[0]), said[0]
            scenes.unequal_batches(comm.rank)
            scenes.unequal_arguments(comm.rank)
            said = comm.all_gather_object(scenes.steps_left_out(comm.rank))
            assert said == said[:1] * 3, said
            names += ["refusals", "unequal", "left-out"]
        if comm.size == 4:
            scenes.predictions_in_order((2, 1, 1))
            scenes.planned_by_arguments()
            names += ["predictions"]
    except BaseException:
        print(f"rank {comm.rank}:", traceback.format_exc(), file=sys.stderr, flush=True)
        comm.abort(1)
    comm.barrier()
    if comm.rank == 0:
        print(*names, sep="\n", flush=True)
    comm.close()


if __name__ == "__main__":
    main()
