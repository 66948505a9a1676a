"""How many kernels a micro-batch launches, plain and fused: whole models, counted without a GPU."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from benchmarks.section import Cell, Section
from gpp.capture.capture import Captured
from gpp.program.build import Alone, Roots, alone
from kernels.launches import launches
from launch.job import gather
from launch.start import CONF

from .rivals import OURS
from .stages import hooks_of

MODELS = {
    "MMT": ("model=mmt_paper",),
    "DLRM": ("model=dlrm",),
    "DLRM, dots of sums": ("model=dlrm", "model.pooling=sum", "model.interaction=dot"),
    "CANDLE-Uno": ("model=candle_uno",),
}
SAMPLES = 4


def paper_models() -> dict[str, Captured]:
    """Captured on the meta device: no weights are made."""
    return {name: _captured(*overrides) for name, overrides in MODELS.items()}


def _captured(*model: str) -> Captured:
    overrides = [*model, "train.init=recorded"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("capture", overrides=overrides)
    return gather(config, overrides)[0].captured


def launch_counts(models: Mapping[str, Captured]) -> Section:
    """Forward, input half and weight half of each model as one stage."""
    rows: list[tuple[Cell, ...]] = []
    for name, captured in models.items():
        plain, fused = (_count(captured, provider) for provider in ("eager", OURS))
        before, after = plain.total(), fused.total()
        own = sum(count for kernel, count in fused.items() if "." not in kernel)
        rows.append((name, before, after, after / before, own))
    shares = [float(row[3] or 0) for row in rows]
    return Section(
        name="launches",
        what="kernels that a micro-batch launches, forward and backward: kernels=triton over torch's own",
        reach="fewer",
        measured=f"{min(shares):.2f} to {max(shares):.2f}",
        reached=max(shares) < 1,
        columns=("model", "torch's own", "fused", "share", "of this project among them"),
        rows=tuple(rows),
        note="Counted on fake tensors: an operator of this project as the kernels that it launches, any "
        "other as one, unless it makes a view.",
    )


def _count(captured: Captured, provider: str) -> Counter[str]:
    device = torch.device("cpu")
    names = [operator.name for operator in captured.graph.operators]
    roots = Roots(captured.roots, captured.train.loss.weight is None)
    hooks = hooks_of(provider, device)
    stage = alone(captured.traced, names, SAMPLES, roots, device, hooks)
    count, buffers = len(stage.face.parameters), len(stage.face.buffers)
    state, given = stage.examples[:count], stage.examples[count:-1]
    values = list(state), list(given[:buffers]), list(given[buffers:]), stage.examples[-1]
    return launches(_trained, stage, captured.traced.trainable, *values)


def _trained(
    stage: Alone,
    trainable: Mapping[str, bool],
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    inputs: Sequence[Tensor],
    position: Tensor,
) -> Any:
    """One micro-batch."""
    sums = [
        torch.zeros_like(p)
        for p, name in zip(parameters, stage.face.parameters, strict=True)
        if trainable[name]
    ]
    made = stage.functions.forward(parameters, buffers, inputs, position)
    back = stage.functions.backward_input(parameters, list(made.stash), [])
    return stage.functions.backward_weight(parameters, list(back.stash), sums)
