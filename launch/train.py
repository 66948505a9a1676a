"""python -m launch.train: trains a model as a graph of pipeline stages, under MPI or in one process.

Groups: model data cluster cost planner schedule kernels transport optimizer; keys: train.* plan device. The
run's folder holds plan.json, graph.json, trace.json, metrics.jsonl, result.json and config.yaml, with
kernels=triton also kernels.txt, with train.checkpoint_every= also checkpoints.
"""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from omegaconf import DictConfig

from .start import launch, own_overrides, run_folder

if TYPE_CHECKING:
    from gpp.api.pipeline import Pipeline
    from gpp.checkpoint.shelf import Copy, Shelf
    from gpp.runtime.communicator import Communicator
    from gpp.runtime.mpi import MpiCommunicator
    from kernels.fuse import FuseReport

    from .job import Job
    from .preemption import Listener


def train(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    if config.device == "emulated":
        from .emulate import emulate

        emulate(config, mpi)
        return
    from gpp.runtime.loopback import LoopbackWorld

    from .elastic import shelf_for, without
    from .preemption import listening

    comm: Communicator = mpi if mpi is not None else LoopbackWorld(1).communicators[0]
    folder = Path(comm.broadcast_object(lambda: str(run_folder().resolve())))
    shelf: Shelf | None = None
    with listening(comm.rank) as listener:
        while True:
            try:
                shelf = shelf_for(config, mpi) if shelf is None else shelf
                _ended(config, mpi, comm, listener, folder, shelf)
                return
            except Exception as error:
                lost = mpi.lost_behind(error) if mpi is not None else ()
                if mpi is None or not lost:
                    raise
            comm = mpi = mpi.survivors()
            listener.rank = mpi.rank
            config = without(config, lost, mpi, folder)


def _ended(
    config: DictConfig,
    mpi: "MpiCommunicator | None",
    comm: "Communicator",
    listener: "Listener",
    folder: Path,
    shelf: "Shelf | None",
) -> None:
    """From a configuration to results and, where ranks have been lost, to the end of this process."""
    from .guard import Leaving

    try:
        _train(config, mpi, comm, listener, folder, shelf)
    except Leaving as leaving:
        if shelf is not None:
            shelf.close()
        if mpi is not None and mpi.has_lost:
            mpi.end(int(leaving.code or 0))
        raise
    if shelf is not None:
        shelf.close()
    if mpi is not None and mpi.has_lost:
        mpi.end(0)


def _train(
    config: DictConfig,
    mpi: "MpiCommunicator | None",
    comm: "Communicator",
    listener: "Listener",
    folder: Path,
    shelf: "Shelf | None",
) -> None:
    """From a configuration to results; called by all ranks together. `shelf` is for copies in memory, and may
    have some."""
    from gpp.runtime.watching import Rules

    from .guard import together
    from .job import GuardedCrew, asked, pipeline_of, prepare
    from .kernels import kernels_name, write_reports
    from .resume import AUTO, check_room, copy_to_take, folder_of
    from .settings import train_settings
    from .transport import process_groups, staging_of
    from .validation import check_training

    alone, overrides = mpi is None, own_overrides()
    request, found = asked(
        config,
        overrides,
        comm,
        lambda: check_training(config, overrides, comm, mpi, folder),
        alone=alone,
    )
    settings, source = train_settings(config), comm.broadcast_object(lambda: found)
    rules = Rules(settings.silence, strict=True, elastic=settings.elastic)
    comm.watch_by(rules, folder)
    staging = together(comm, lambda: staging_of(config, comm, alone=alone))
    copy = None if shelf is None else copy_to_take(shelf, source, comm)
    comm.doing.now("captures the model and plans")
    room = partial(check_room, settings, folder, averaged=settings.ema is not None)
    job, ranks, initialised = prepare(request, comm, alone=alone, room=room)
    if comm.rank == 0:
        _announce(config, job, ranks, folder)
    groups = together(comm, lambda: process_groups(config, comm, job.arranged.lowered.train))
    make_sum = None if groups is None else groups.make_sum
    fused: list[FuseReport] = []
    crew = GuardedCrew(mpi, ranks)
    crew.comm.watch_by(rules, folder)
    pipeline = pipeline_of(config, job, initialised, crew, staging, make_sum, fused.append)
    del initialised  # the whole model's weights: each stage has its own by now
    if kernels_name(config, job.material.device) == "triton":
        write_reports(comm, fused, folder)
    if shelf is not None and copy is not None and _goes_on_from_copy(job, pipeline, shelf, copy):
        pass
    elif source is not None:
        _go_on(job, pipeline, source)
    elif settings.resume == AUTO and comm.rank == 0:
        kept = folder_of(settings, folder)
        print(f"train.resume=auto: there is no checkpoint in {kept} yet, training begins", flush=True)
    listener.tell(pipeline.ask_to_stop)
    _run(config, job, pipeline, folder, shelf)
    if groups is not None:
        groups.close()


def _announce(config: DictConfig, job: "Job", ranks: int, folder: Path) -> None:
    from gpp.graph import graph_to_json
    from gpp.plan_table import device_ranges

    from .log import announce_plan, counted

    captured, settings = job.material.captured, job.material.settings
    announce_plan(config, job.plan, folder)
    (folder / "graph.json").write_text(graph_to_json(captured.graph))
    if captured.coupled:
        print(f"mixes samples per micro-batch, as gradient accumulation does: {', '.join(captured.coupled)}")
    for name, count in captured.merged.items():
        print(
            f"{name} cannot be cut inside: its {count} heavy nodes pass values whose dimension 0 is not the "
            "samples (batch_first=False, or samples and sequence flattened)"
        )
    if captured.coupled_metrics:
        print(f"averaged over micro-batches, not over samples: {', '.join(captured.coupled_metrics)}")
    beyond = range(len(job.plan.topology.devices), ranks)
    if beyond:
        print(f"ranks without work: {device_ranges(beyond)}")
    cores = len(os.sched_getaffinity(0))
    if ranks > cores and job.material.device.type == "cpu":
        print(f"{ranks} ranks, {cores} cores here: the prediction takes each rank to have its own")
    batches = job.material.batches
    if batches.dropped:
        print(
            f"each epoch ({counted(batches.per_epoch, 'step')}) leaves out {batches.dropped} of "
            f"{batches.length} training samples, others each time"
        )
    print(f"{counted(ranks, 'rank')}, {counted(settings.steps, 'step')}, {folder}", flush=True)


def _go_on(job: "Job", pipeline: "Pipeline", source: Path) -> None:
    """From a checkpoint, or the newest whole one of a folder; called by all ranks together."""
    from gpp.checkpoint.folder import named

    passed_over = pipeline.load(source, job.material.batches)
    if pipeline.is_first:
        for text in passed_over:
            print(f"passed over: {text}")
        _say_step(job, pipeline, f"{named(source, pipeline.steps)}")


def _goes_on_from_copy(job: "Job", pipeline: "Pipeline", shelf: "Shelf", copy: "Copy") -> bool:
    """From a copy in memory, if it is of use; called by all ranks together."""
    from gpp.checkpoint.tensors import CheckpointError

    try:
        pipeline.recall(shelf, copy, job.material.batches)
    except CheckpointError as error:
        if pipeline.is_first:
            print(f"passed over: {error}", flush=True)
        return False
    if pipeline.is_first:
        _say_step(job, pipeline, "the copy in memory")
    return True


def _say_step(job: "Job", pipeline: "Pipeline", source: str) -> None:
    made, wanted = pipeline.steps, job.material.settings.steps
    what = f"goes on at step {made} of {wanted}" if made < wanted else "trained enough, evaluates only"
    print(f"{what}: {source} has {made}, train.steps={wanted}", flush=True)


def _run(config: DictConfig, job: "Job", pipeline: "Pipeline", folder: Path, shelf: "Shelf | None") -> None:
    """From the weights as they are to the results; called by all ranks together."""
    from .log import Log, say_evaluation
    from .resume import checkpoints

    settings, first = job.material.settings, pipeline.is_first
    with Log(
        folder,
        settings.steps,
        settings.log_every,
        active=first,
        says_rate=job.material.make_scheduler is not None,
        begin=pipeline.steps,
    ) as log:
        pipeline.fit(
            job.material.train_data,
            job.material.batches,
            max(0, settings.steps - pipeline.steps),
            log.step,
            prefetch=settings.prefetch,
            checkpoints=checkpoints(config, settings, job.plan, folder, shelf),
        )
        if pipeline.steps < settings.steps:
            _leave(config, job, pipeline, folder)
        held_out = job.material.held_out
        evaluation = pipeline.evaluate_dataset(held_out) if len(held_out) else {}
        averaged = (
            pipeline.evaluate_dataset(held_out, averaged=True) if len(held_out) and settings.ema else {}
        )
        trace = pipeline.trace()
        memory = pipeline.peak_memory()
        if first:
            say_evaluation(held_out, evaluation, averaged)
            log.finish(
                job.plan,
                trace,
                pipeline.typical_seconds,
                job.planner_seconds,
                memory,
                {
                    "eval": evaluation,
                    **({"eval_ema": averaged} if averaged else {}),
                    "skipped_steps": pipeline.skipped,
                },
            )


def _leave(config: DictConfig, job: "Job", pipeline: "Pipeline", folder: Path) -> NoReturn:
    """What was done is kept, and the job ends; called by all ranks together."""
    from .guard import Leaving
    from .preemption import exit_code
    from .resume import kept_of

    settings = job.material.settings
    kept = kept_of(config, settings, job.plan, folder)
    if settings.checkpoint_every is None:
        pipeline.save(kept)
    code = exit_code(settings.preempted_exit)
    if pipeline.is_first:
        print(
            f"{pipeline.stopped}: stopped after {pipeline.steps} of {settings.steps} steps, which are kept "
            f"in {kept.folder}; the same command with train.resume=auto and this hydra.run.dir goes on there "
            f"(exit code {code})",
            flush=True,
        )
    raise Leaving(code)


if __name__ == "__main__":
    launch(train, "config")
