"""A model of two towers for real: by gpp along its branches, cut as a line by gpp and by torch, and as two
processes that know nothing of each other, all in the same two ranks, in turns."""

import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from gpp.runtime.communicator import Communicator
from gpp.runtime.data import Batches
from gpp.runtime.mpi import connect

from .jobs import answer, question

ROUNDS = 3
WIDTH, LAYERS = 768, 6
RATE = 1e-3


def tower(width: int = WIDTH, layers: int = LAYERS) -> nn.Sequential:
    """Half of the work."""
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())))


class TwoTowers(nn.Module):
    """Two equal towers; the loss compares what they say."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.left, self.right = tower(width, layers), tower(width, layers)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean squared difference."""
        return nn.functional.mse_loss(self.left(a), self.right(b))


class Vectors:
    """The same samples again and again."""

    keys = ("a", "b")

    def __init__(self, samples: int = 4096, width: int = WIDTH) -> None:
        generator = torch.Generator().manual_seed(0)
        self._values = torch.randn(64, width, generator=generator)
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """Rows by their number."""
        return {key: self._values[torch.tensor([i % 64 for i in indices])] for key in keys}


class _First(nn.Module):
    """torch's first stage: the left tower; what the right one needs goes along."""

    def __init__(self) -> None:
        super().__init__()
        self.left = tower()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What the left tower says, and the right one's input."""
        return self.left(a), b


class _Second(nn.Module):
    """torch's second stage."""

    def __init__(self) -> None:
        super().__init__()
        self.right = tower()

    def forward(self, left: Tensor, b: Tensor) -> Tensor:
        """Both towers' answers, for the loss."""
        return torch.stack([left, self.right(b)])


def _by_gpp(
    comm: Communicator, mini_batch: int, micro_batch: int, planner: str
) -> Callable[[int], list[float]]:
    """Steps of a plan in which the left tower is rank 0's and the rest rank 1's."""
    from hydra import compose, initialize_config_dir

    from launch.job import GuardedCrew, asked, pipeline_of, prepare
    from launch.start import CONF

    overrides = [
        "model._target_=benchmarks.pipeline.towers.TwoTowers",
        "data._target_=benchmarks.pipeline.towers.Vectors",
        f"train.mini_batch={mini_batch}",
        f"train.micro_batch={micro_batch}",
        "train.held_out=0",
        "train.verify=false",
        "schedule=1f1b",
        "optimizer=sgd",
        f"optimizer.lr={RATE}",
        f"planner={planner}",
        "planner.constraints.pins={left.*: left, right.*: right}",
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("config", overrides=overrides)
    request, _ = asked(config, overrides, comm, lambda: None, alone=False)
    job, _, initialised = prepare(request, comm, alone=False)
    pipeline = pipeline_of(config, job, initialised, GuardedCrew(comm))
    data = job.material.train_data

    def run(steps: int) -> list[float]:
        done = len(pipeline.step_seconds)
        pipeline.fit(data, Batches(len(data), mini_batch, 0), steps)
        return list(pipeline.step_seconds[done:])

    return run


def _by_torch(mini_batch: int, micro_batch: int) -> Callable[[int], list[float]]:
    """Steps of Schedule1F1B over gloo."""
    rank, count = dist.get_rank(), mini_batch // micro_batch
    module: nn.Module = _First() if rank == 0 else _Second()
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output[0], output[1])

    schedule = Schedule1F1B(stage, count, loss_fn=loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    rows = Vectors().read(range(mini_batch), ("a", "b"))
    target = torch.zeros(mini_batch)

    def run(steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(rows["a"], rows["b"])
            else:
                schedule.step(target=target, losses=[])
            optimizer.step()
            found.append(time.perf_counter() - start)
        return found

    return run


def _alone(mini_batch: int, micro_batch: int) -> Callable[[int], list[float]]:
    """Steps of a tower that waits for nobody: half of the work, as a user's own loop does it."""
    module = tower()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    rows = Vectors().read(range(mini_batch), ("a",))["a"]
    target = torch.zeros(micro_batch, WIDTH)
    count = mini_batch // micro_batch

    def run(steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad()
            for part in torch.split(rows, micro_batch):
                (nn.functional.mse_loss(module(part), target) / count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            found.append(time.perf_counter() - start)
        return found

    return run


def main() -> None:
    """All sides in turns; the answer is each one's seconds of a step, of the slower rank."""
    asked = question()
    torch.set_num_threads(1)
    comm = connect()
    port = comm.broadcast_object(lambda: 20000 + os.getpid() % 20000)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size
    )
    sizes = int(asked["mini_batch"]), int(asked["micro_batch"])
    sides: dict[str, Callable[[int], list[float]]] = {
        "gpp": _by_gpp(comm, *sizes, "gpp"),
        "gpp in a row": _by_gpp(comm, *sizes, "sequential"),
        "torch in a row": _by_torch(*sizes),
        "independent": _alone(*sizes),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            comm.barrier()
            own: list[Any] = comm.all_gather_object(run(int(asked["steps"])))
            rounds = [seconds[1:] for seconds in own if seconds]
            found[name] += [max(each) for each in zip(*rounds, strict=True)]
    if comm.rank == 0:
        answer({name: median(seconds) for name, seconds in found.items()})
    comm.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
