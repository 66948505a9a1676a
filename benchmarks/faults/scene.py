"""The model, the data and the plans of the jobs that faults are put into."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpp.capture.capture import Captured
from gpp.cost import Roofline
from gpp.plan import Plan, Policy, check_plan
from gpp.planner.estimate import Group, Problem, assemble
from gpp.planner.options import Options
from gpp.topology import Device, DeviceTopology, Link

from .cases import PIECES, RANKS, Shape

MINI_BATCH = 16
SAMPLES = 203
WIDTH = 64
STAGES = {  # prefixes of the operators of each stage, in order, and its replicas
    Shape.CHAIN: (("stem", 1), ("branches", 1), ("", 1)),
    Shape.DIAMOND: (("stem", 1), ("branches.0", 1), ("branches.1", 1), ("", 1)),
    Shape.REPLICAS: (("stem", 2), ("", 1)),
}
LAGS = {Shape.DIAMOND: (0, 1, 1, 1), Shape.REPLICAS: (0, 1)}  # of weight halves, in micro-batches


class Branched(nn.Module):
    """A stem, two branches, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(2 * WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of samples x (n, 8) with labels y (n)."""
        found = torch.relu(self.stem(x))
        guess = self.head(torch.cat([torch.relu(branch(found)) for branch in self.branches], 1))
        return F.mse_loss(guess.squeeze(1), y)


class Samples:
    """Samples that are made as they are read."""

    keys = ("x", "y")

    def __init__(self, count: int = SAMPLES) -> None:
        self._x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._x)

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """The samples at `indices`."""
        x = self._x[list(indices)]
        found = {"x": x, "y": x.sum(1)}
        return {key: found[key] for key in keys}


def plan_of(shape: Shape) -> Callable[[Captured], Plan]:
    """What plans the model in such stages, on as many ranks as they need."""

    def plan(captured: Captured) -> Plan:
        device = Device("any", memory=1e12, flops=1e9, bandwidth=1e9)
        link, count = Link(0.0, 1e9), RANKS[shape]
        topology = DeviceTopology("any", (device,) * count, count, link, link)
        size = MINI_BATCH // PIECES
        options = Options(
            mini_batch=MINI_BATCH,
            micro_batch=size,
            policy=Policy("zero-bubble" if shape in LAGS else "1f1b"),
            global_norm=True,
        )
        problem = Problem(captured.graph, topology, Roofline(), options)
        left = {operator.name: number for number, operator in enumerate(captured.graph.operators)}
        groups = []
        for prefix, replicas in STAGES[shape]:
            mine = [name for name in left if name.startswith(prefix)]
            groups.append(Group(tuple(left.pop(name) for name in mine), replicas))
        made = assemble(problem, groups, size, "by hand")
        if shape in LAGS:
            lagging = tuple(
                replace(stage, weight_lag=lag, in_flight=stage.in_flight + lag * size)
                for stage, lag in zip(made.stage_graph.stages, LAGS[shape], strict=True)
            )
            made = replace(made, stage_graph=replace(made.stage_graph, stages=lagging))
        check_plan(made, captured.graph)
        return made

    return plan
