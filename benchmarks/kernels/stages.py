"""Whole stages as a rank executes them: forward, input half and weight half, by each value of `kernels=`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from gpp.api.capture import capture
from gpp.capture.capture import Captured
from gpp.models.candle_uno import CandleUno
from gpp.models.case_study import CaseStudy
from gpp.models.dlrm import Dlrm
from gpp.program.autocast import Autocast
from gpp.program.build import Hooks, Roots
from gpp.program.stopwatch import passes
from launch.kernels import hooks

from .ceilings import Ceilings
from .clock import Clock
from .measure import Measurement
from .rivals import OURS

PROVIDERS = (OURS, "eager", "inductor")
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Stage:
    """Part of a model: how the model and a batch are made from sizes, and which operators are the stage's."""

    name: str
    module: Callable[[Sizes], nn.Module]
    batch: Callable[[Sizes, int], dict[str, Tensor]]
    belongs: Callable[[str], bool]
    sizes: Sizes
    tiny: Sizes
    samples: tuple[int, ...]


def _layers(sizes: Sizes) -> nn.Module:
    return CaseStudy(
        branches=1, layers=2, hidden=sizes["hidden"], heads=sizes["heads"], ffn=sizes["ffn"], classes=16
    )


def _sequences(sizes: Sizes, samples: int) -> dict[str, Tensor]:
    return {
        "vectors_0": torch.randn(samples, sizes["sequence"], sizes["hidden"]),
        "label": torch.randint(16, (samples,)),
    }


def _towers(sizes: Sizes) -> nn.Module:
    return CandleUno(
        {"drug1_fingerprints": sizes["features"]}, branches=1, layers=4, hidden=sizes["hidden"], top_layers=0
    )


def _features(sizes: Sizes, samples: int) -> dict[str, Tensor]:
    return {
        "drug1_fingerprints": torch.randn(samples, sizes["features"]),
        "growth": torch.randn(samples),
    }


def _recommender(sizes: Sizes) -> nn.Module:
    return Dlrm(
        dense=1,
        features=13,
        dense_layers=3,
        hidden=sizes["hidden"],
        tables=sizes["tables"],
        rows=sizes["rows"],
        dimension=sizes["dimension"],
        bag=1,
        pooling="sum",
        interaction="dot",
        top_layers=3,
    )


def _clicks(sizes: Sizes, samples: int) -> dict[str, Tensor]:
    rows = {f"sparse_{i}": torch.randint(sizes["rows"], (samples, 1)) for i in range(sizes["tables"])}
    return {"dense_0": torch.randn(samples, 13), **rows, "label": torch.randint(2, (samples,)).float()}


STAGES = (
    Stage(
        name="MMT layer",
        module=_layers,
        batch=_sequences,
        belongs=lambda name: name.startswith("branches.0.1."),
        sizes={"hidden": 1024, "heads": 16, "ffn": 4096, "sequence": 256},
        tiny={"hidden": 16, "heads": 2, "ffn": 32, "sequence": 8},
        samples=(4, 16, 1),
    ),
    Stage(
        name="CANDLE tower",
        module=_towers,
        batch=_features,
        belongs=lambda name: name.startswith("towers."),
        sizes={"features": 2048, "hidden": 4096},
        tiny={"features": 12, "hidden": 16},
        samples=(256, 1024, 64),
    ),
    Stage(
        name="DLRM",
        module=_recommender,
        batch=_clicks,
        belongs=lambda name: True,
        sizes={"hidden": 512, "tables": 26, "rows": 100_000, "dimension": 64},
        tiny={"hidden": 16, "tables": 3, "rows": 11, "dimension": 8},
        samples=(1024, 4096, 256),
    ),
)


@dataclass(frozen=True)
class StageWork:
    """A stage at one number of samples, measured with every provider."""

    stage: Stage
    samples: int
    dtype: str
    providers: tuple[str, ...] = PROVIDERS
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.stage.name} samples={self.samples} {self.dtype}"

    def run(self, clock: Clock, ceilings: Ceilings) -> Iterator[Measurement]:
        """One measurement a provider, of the three passes together."""
        captured = traced(self.stage, self.dtype, clock.device)
        for name in self.providers:
            gpu = wall = None
            note = ""
            try:
                with clock.scope(), torch.no_grad():
                    call = self.call(captured, name, clock.device)
                    gpu, wall = clock.gpu([call]), clock.wall([call])
            except Exception as error:  # as with operators: a cell of the table
                note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
            size = f"samples={self.samples}"
            yield Measurement("stage", self.stage.name, size, self.dtype, "both", name, gpu, wall, note=note)
            clock.forget()

    def call(self, captured: Captured, provider: str, device: torch.device) -> Callable[[], None]:
        """The three passes of the stage with these kernels, once."""
        sizes = self.stage.sizes
        names = [op.name for op in captured.graph.operators if self.stage.belongs(op.name)]
        if not names:
            raise ValueError(f"no operator of the captured model is part of the stage {self.stage.name}")
        roots = Roots(captured.roots, captured.train.loss.weight is None)
        batch = self.stage.batch(sizes, self.samples)
        run = passes(captured.traced, names, self.samples, roots, batch, device, hooks_of(provider, device))

        def call() -> None:
            with torch.no_grad():
                run(lambda: None)

        return call


def hooks_of(provider: str, device: torch.device) -> Hooks:
    """As `kernels=` of a configuration gives them."""
    return hooks(OmegaConf.create({"kernels": {"name": provider, "attention": "torch"}}), device)


def traced(stage: Stage, dtype: str, device: torch.device) -> Captured:
    """The model of a stage captured on the meta device; bf16 by autocast, as `precision=bf16`."""
    with torch.device("meta"):
        module = stage.module(stage.sizes)
    autocast: Any = Autocast(device.type) if dtype == "bf16" else None
    return capture(module, stage.batch(stage.sizes, 4), autocast=autocast)


def stage_works(dtypes: tuple[str, ...], stages: tuple[Stage, ...] = STAGES) -> list[StageWork]:
    """Every stage at its numbers of samples; the first of them with what is worth most."""
    return [
        StageWork(stage, samples, dtype, rank=0 if place == 0 else 1)
        for stage in stages
        for place, samples in enumerate(stage.samples)
        for dtype in ("bf16", "fp32")
        if dtype in dtypes and (dtype == "bf16" or place == 0)
    ]
