"""python -m launch.train: trains a model as a graph of pipeline stages, under MPI or in one process.

Groups: model data cluster cost planner schedule kernels transport optimizer; keys: train.* plan device. The
run's folder holds plan.json, graph.json, trace.json, metrics.jsonl, result.json and config.yaml.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from .settings import own_yaml
from .start import launch, own_overrides, run_folder

if TYPE_CHECKING:
    from gpp.program.stage import StageProgram
    from gpp.runtime.communicator import Communicator
    from gpp.runtime.mpi import MpiCommunicator
    from gpp.runtime.state import StageState
    from gpp.runtime.trainer import StepRecord

    from .job import Job

    _Part = tuple[list[StageProgram], StageState | None]


def train(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    from gpp.runtime.loopback import LoopbackWorld, run

    from .job import threads_of_a_rank

    comm: Communicator = mpi if mpi is not None else LoopbackWorld(1).communicators[0]
    folder = Path(comm.broadcast_object(lambda: str(run_folder().resolve())))
    job, ranks, parts, base = _set_up(config, comm, folder, alone=mpi is None)
    threads = threads_of_a_rank(ranks if mpi is None else comm.hosts.count(comm.hosts[comm.rank]))

    def work(own: "Communicator") -> None:
        _rank(job, own, *parts[own.rank], folder, base)

    if mpi is not None:
        import torch

        torch.set_num_threads(threads)
        work(comm)
        return
    run(LoopbackWorld(ranks), work, threads)


def _set_up(
    config: DictConfig, comm: "Communicator", folder: Path, *, alone: bool
) -> "tuple[Job, int, dict[int, _Part], int]":
    """The job, the number of ranks, program and state of this process's ranks, and the memory it held before
    them. The whole model's initial weights end with this function."""
    from gpp.runtime.memory import start_of_peak

    from .guard import together
    from .job import prepare, programs_of, state_of

    job, ranks, initialised = prepare(config, own_overrides(), comm, alone=alone)
    mine = range(ranks) if alone else [comm.rank]
    programs = together(comm, lambda: {rank: programs_of(config, job, rank) for rank in mine})
    if comm.rank == 0:
        _announce(config, job, ranks, folder)
    base = start_of_peak()
    parts = together(
        comm,
        lambda: {rank: (programs[rank], state_of(job, rank, programs[rank], initialised)) for rank in mine},
    )
    return job, ranks, parts, base


def _announce(config: DictConfig, job: "Job", ranks: int, folder: Path) -> None:
    from gpp.graph import graph_to_json
    from gpp.plan import plan_to_json
    from gpp.plan_table import device_ranges, plan_table

    captured, settings = job.material.captured, job.material.settings
    for old in ("result.json", "trace.json"):  # of an earlier run into this folder
        (folder / old).unlink(missing_ok=True)
    (folder / "plan.json").write_text(plan_to_json(job.plan))
    (folder / "graph.json").write_text(graph_to_json(captured.graph))
    (folder / "config.yaml").write_text(own_yaml(config))
    print(plan_table(job.plan))
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
            f"each epoch ({_count(batches.per_epoch, 'step')}) leaves out {batches.dropped} of "
            f"{batches.length} training samples, others each time"
        )
    print(f"{_count(ranks, 'rank')}, {_count(settings.steps, 'step')}, {folder}", flush=True)


def _rank(
    job: "Job",
    comm: "Communicator",
    programs: "Sequence[StageProgram]",
    state: "StageState | None",
    folder: Path,
    base: int,
) -> None:
    """One rank from initial weights to its part of the results."""
    from gpp.runtime.trainer import Trainer

    trainer = Trainer(
        comm,
        job.plan,
        job.evaluation,
        job.lowered,
        programs,
        state,
        job.material.captured.train,
        job.material.captured.evaluate,
        job.material.device,
    )
    settings = job.material.settings
    with _Log(folder, settings.steps, settings.log_every, comm.rank == 0) as log:
        trainer.fit(job.material.train_data, job.material.batches, 0, settings.steps, log.step)
        evaluation = trainer.evaluate(job.material.held_out) if len(job.material.held_out) else {}
        trace = trainer.trace()
        memory = comm.all_gather_object(_device_memory(job, base))
        if comm.rank == 0:
            log.finish(job, trainer.measured.typical, evaluation, trace, memory, comm.size)


class _Log:
    """What rank 0 prints and writes while it runs; on other ranks nothing."""

    def __init__(self, folder: Path, steps: int, every: int, active: bool) -> None:
        self.folder, self.steps, self.every = folder, steps, every
        self.file = (folder / "metrics.jsonl").open("w") if active else None
        self.last_loss: float | None = None

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def step(self, record: "StepRecord") -> None:
        assert self.file is not None
        self.last_loss = record.loss
        line: dict[str, Any] = {
            "step": record.step,
            "loss": record.loss,
            "step_seconds": record.seconds,
            "samples_per_second": record.samples_per_second,
            **record.metrics,
        }
        if record.norm is not None:
            line["grad_norm"] = record.norm
        self.file.write(_json(line) + "\n")
        self.file.flush()
        if record.step % self.every == 0 or record.step == self.steps - 1:
            metrics = "".join(f"  {name} {value:.4f}" for name, value in record.metrics.items())
            print(
                f"step {record.step:>5}  loss {record.loss:.4f}{metrics}  {record.seconds * 1e3:.0f} ms  "
                f"{record.samples_per_second:.0f} samples/s",
                flush=True,
            )

    def finish(
        self,
        job: "Job",
        measured: float,
        evaluation: dict[str, float],
        trace: Any,
        memory: Sequence[int],
        ranks: int,
    ) -> None:
        from gpp.simulate import predicted
        from gpp.trace import compare, to_chrome

        prediction = predicted(job.plan)
        steps = job.material.settings.steps
        if steps:
            print(compare(prediction.trace, trace))
        (self.folder / "trace.json").write_text(to_chrome(prediction.trace, *([trace] if steps else [])))
        if evaluation:
            self._say_evaluation(job, evaluation)
        result = {
            "world_size": ranks,
            "steps": steps,
            "final_loss": self.last_loss,
            "eval": evaluation,
            "predicted_step_seconds": prediction.step_seconds,
            "measured_step_seconds": measured if steps else None,
            "planner_seconds": job.planner_seconds,
            "peak_memory_bytes": list(memory),
        }
        (self.folder / "result.json").write_text(_json(result, indent=1) + "\n")
        print(f"results: {self.folder}", flush=True)

    def _say_evaluation(self, job: "Job", evaluation: dict[str, float]) -> None:
        held_out = job.material.held_out
        text = "".join(f"  {name} {value:.4f}" for name, value in evaluation.items())
        print(f"held out ({len(held_out)} samples){text}")
        share = _majority(held_out)
        if share is not None:
            print(f"the most frequent label alone would be right for {share:.4f} of them")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _json(value: Any, indent: int | None = None) -> str:
    """JSON, in which a number that is not finite (a diverged loss) is null: the format has no other way."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _majority(data: Any) -> float | None:
    """The share of the most frequent label, if the data set has integer labels."""
    import torch

    from gpp.runtime.data import majority_share

    if "label" not in data.keys:
        return None
    labels = data.read(range(len(data)), ("label",))["label"]
    return (
        None
        if labels.dtype.is_floating_point or labels.dim() != 1
        else majority_share(labels.to(torch.int64))
    )


def _device_memory(job: "Job", base: int) -> int:
    """Peak bytes of the device: CUDA's allocator, or resident memory above what was there before training.

    Ranks that are threads share one process, and each reports the whole.
    """
    import torch

    from gpp.runtime.memory import peak

    if job.material.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(job.material.device))
    return peak() - base


if __name__ == "__main__":
    launch(train, "config")
