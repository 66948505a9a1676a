"""What a checkpoint in some steps takes from training."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.section import Cell, Section
from gpp.api.checkpoints import Checkpoints
from gpp.api.pipeline import Pipeline
from gpp.api.start import pipeline
from gpp.checkpoint.folder import newest
from gpp.runtime.data import Batches

WIDTH, LAYERS = 1024, 4
MINI_BATCH = 256
EVERY = 20
ROUNDS = 3
MOST = 0.05


class Deep(nn.Module):
    """Layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The loss of samples (n, WIDTH)."""
        loss: Tensor = self.layers(x).square().mean()
        return loss


class Noise:
    """Samples that cost nothing to read."""

    keys = ("x",)

    def __init__(self) -> None:
        self._all = torch.randn(4 * MINI_BATCH, WIDTH)

    def __len__(self) -> int:
        return len(self._all)

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """The samples at `indices`."""
        return {key: self._all[list(indices)] for key in keys}


def stall_of_a_step(rounds: int = ROUNDS, every: int = EVERY) -> Section:
    """Steps with and without checkpoints, in turn; of each the round that took least."""
    torch.manual_seed(0)
    data = Noise()
    rows: list[tuple[Cell, ...]] = []
    means: list[tuple[float, float]] = []
    with (
        TemporaryDirectory() as folder,
        pipeline(
            Deep(),
            data.read(range(4), ("x",)),
            optimizer=lambda named: torch.optim.AdamW([p for _, p in named]),
            mini_batch=MINI_BATCH,
            devices=1,
            device="cpu",
            verify=False,
        ) as pipe,
    ):
        _steps(pipe, data, every, None)
        kept = Checkpoints(folder=Path(folder), every=every, keep=1)
        for number in range(rounds):
            plain = _steps(pipe, data, every, None)
            written = _steps(pipe, data, every, kept)
            means.append((mean(plain) * 1e3, mean(written) * 1e3))
            rows.append((number, median(plain) * 1e3, *means[-1]))
        found, _ = newest(Path(folder))
        assert found is not None
        size = found.manifest.bytes
    best = [min(column) for column in zip(*means, strict=True)]
    share = best[1] / best[0] - 1
    return Section(
        name="stall",
        what=f"what a checkpoint costs a step: {size / 1e6:.0f} MB in {every} steps, one rank on one thread",
        reach=f"at most {MOST:.0%} of the step time",
        measured=f"{share:.1%} of a step of {best[0]:.0f} ms",
        reached=share <= MOST,
        columns=("round", "median without (ms)", "mean without (ms)", "mean with (ms)"),
        rows=tuple(rows),
        note="The checkpoint is copied between two steps and written by a thread during the next ones; the "
        "wait for the last one, when training is over, is not in it.",
    )


def _steps(pipe: Pipeline, data: Noise, every: int, kept: Checkpoints | None) -> list[float]:
    """The seconds of two times `every` steps, each half begun by a checkpoint if there are any."""
    before = len(pipe.step_seconds) + every
    pipe.fit(data, Batches(len(data), MINI_BATCH, 0), 3 * every, checkpoints=kept)
    return list(pipe.step_seconds[before:])
