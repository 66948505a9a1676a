"""What is compared with the reference: a model, how it is cut, and how it is trained."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from launch.optimizers import OptimizerMaker, optimizer_maker
from tests.thorough import ALL

from . import models


@dataclass(frozen=True)
class Case:
    """`stages` are prefixes of operator names, one tuple a stage ("" takes the rest), with replicas.

    `chained` adds an order between neighbours; `lags` are the weight lags of the stages, in micro-batches
    held beyond the rule's; `recompute` lists stages that run their forward again; with
    `shard` replicas share the optimizer's state out; stages with the same number in `slots` share devices.

    `accumulate` mini-batches go through the pipeline before an update; `groups` are patterns on names with
    learning rates, `undecayed` kinds without weight decay; `scheduler`: the rates change; `ema` is the decay
    of the weights' moving average; the weights below `pretrained` come from a file, those that match `freeze`
    do not learn; `precision` "bf16" runs under autocast.

    `exact`: sums are in the reference's order, so float32 must be equal to the bit; else the run is in
    float64 and must agree to 1e-10. Autocast leaves float64 alone: there it is float32, to 1e-5.
    """

    name: str
    model: type[nn.Module]
    stages: tuple[tuple[str, ...], ...]
    replicas: tuple[int, ...] = ()
    micro_batch: int = 2
    mini_batch: int = 8
    exact: bool = True
    policy: str = "1f1b"
    extra: int = 0
    optimizer: str = "adamw"
    clip: float | None = None
    chained: bool = False
    lags: tuple[int, ...] = ()
    recompute: tuple[int, ...] = ()
    shard: bool = False
    slots: tuple[int, ...] = ()
    precision: str = "fp32"
    accumulate: int = 1
    groups: tuple[tuple[str, float], ...] = ()
    undecayed: tuple[str, ...] = ()
    scheduler: bool = False
    ema: float | None = None
    pretrained: str = ""
    freeze: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Of a step."""
        return self.mini_batch * self.accumulate

    @property
    def ranks(self) -> int:
        if self.slots:
            counts = dict(zip(self.slots, self.replicas or (1,) * len(self.slots), strict=True))
            return sum(counts.values())
        return sum(self.replicas) if self.replicas else len(self.stages)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.exact or self.precision == "bf16" else torch.float64

    @property
    def bound(self) -> float:
        """Where sums are in another order than the reference's; under autocast they are float32."""
        return 1e-10 if self.dtype == torch.float64 else 1e-5

    @property
    def call(self) -> int:
        """Samples of one call of the reference: other kernels serve other sizes, and round otherwise."""
        same = self.precision == "bf16" and len(set(self.replicas)) == 1
        return self.micro_batch // (self.replicas[0] if same else 1)

    @property
    def rounding(self) -> float:
        """Of an evaluation, whose calls may have other sizes than the reference's."""
        return 1e-6 if self.precision == "fp32" else 1e-3

    def make_optimizer(self, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        parameters = [p for _, p in named]
        kinds = {
            "adamw": partial(torch.optim.AdamW, lr=0.01),
            "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
        }
        return kinds[self.optimizer](parameters)

    @property
    def grouped(self) -> OptimizerMaker:
        """`groups` are patterns with their learning rates."""
        return optimizer_maker(
            {
                "_target_": "torch.optim.AdamW",
                "lr": 0.01,
                "weight_decay": 0.5,
                "groups": [{"pattern": pattern, "lr": rate} for pattern, rate in self.groups],
                "no_decay": list(self.undecayed),
            }
        )

    def make_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
        return lr_scheduler.ChainedScheduler([first, lr_scheduler.StepLR(optimizer, 1, gamma=0.5)])


_FOUR = (("a",), ("b",), ("c",), ("",))
_THREE = (("a",), ("b",), ("",))

CASES = (
    Case("one-stage", models.Chain, (("",),)),
    Case("one-stage-clipped", models.Chain, (("",),), clip=0.05),
    Case("one-micro-batch", models.Chain, (("a", "b"), ("",)), micro_batch=8),
    Case("chain-2", models.Chain, (("a", "b"), ("",))),
    Case("chain-3", models.Chain, (("a",), ("b", "c"), ("",)), micro_batch=1),
    Case("chain-4", models.Chain, _FOUR),
    Case("chain-gpipe", models.Chain, _FOUR, policy="gpipe"),
    Case("chain-zero-bubble", models.Chain, _FOUR, policy="zero-bubble", lags=(0, 1, 2, 3), micro_batch=1),
    Case("chain-recompute", models.Chain, _FOUR, recompute=(0, 1, 3)),
    Case("chain-eager", models.Chain, (("a",), ("b", "c"), ("",)), extra=1, micro_batch=1),
    Case("chain-sgd", models.Chain, (("a",), ("b",), ("",)), optimizer="sgd"),
    Case("chain-rmsprop", models.Chain, (("a", "b"), ("",)), optimizer="rmsprop"),
    Case("odd-micro-batch", models.Chain, (("a",), ("",)), micro_batch=3, mini_batch=9),
    Case("two-towers", models.TwoTowers, (("a",), ("b",), ("",))),
    Case("two-towers-in-a-row", models.TwoTowers, (("a",), ("b",), ("",)), chained=True),
    Case(
        "two-towers-zero-bubble", models.TwoTowers, _THREE, policy="zero-bubble", lags=(0, 1, 2)
    ),
    Case("diamond", models.Diamond, _FOUR),
    Case(
        "diamond-zero-bubble-replicas",
        models.Diamond,
        _FOUR,
        replicas=(1, 2, 1, 2),
        policy="zero-bubble",
        lags=(1, 1, 2, 1),
        exact=False,
    ),
    Case(
        "diamond-zero-bubble",
        models.Diamond,
        _FOUR,
        policy="zero-bubble",
        lags=(0, 2, 1, 2),
        recompute=(1,),
    ),
    Case("fan-out", models.FanOut, (("a", "b"), ("c",), ("",))),
    Case(
        "unbalanced-six", models.Unbalanced, (("a",), ("b.0",), ("b.1",), ("b.2",), ("",)),
        replicas=(1, 1, 1, 1, 2), exact=False,
    ),
    Case("fan-out-spread", models.FanOut, (("a",), ("b",), ("c", "d"), ("",))),
    Case("fan-out-four", models.FanOut, _FOUR),
    Case("skip", models.Skip, (("a",), ("b",), ("",))),
    Case("unbalanced", models.Unbalanced, (("a",), ("b.0", "b.1"), ("b.2",), ("",))),
    Case("integer-edge", models.IntegerEdge, (("a",), ("b",), ("",))),
    Case("table", models.Table, (("a",), ("b",), ("",)), micro_batch=8),
    Case("table-micro", models.Table, (("a",), ("b",), ("",)), exact=False),
    Case("tied", models.Tied, (("a",), ("b",), ("",)), exact=False),
    Case("tied-one-micro-batch", models.Tied, (("a",), ("b",), ("",)), micro_batch=8),
    Case("tied-replicas", models.Tied, (("a",), ("b",), ("",)), replicas=(2, 1, 1), exact=False),
    Case("batch-norm-recompute", models.BatchNorm, (("a",), ("norm", "b"), ("",)), recompute=(0, 1)),
    Case("batch-norm", models.BatchNorm, (("a",), ("norm", "b"), ("",))),
    Case("dropout", models.Dropout, (("a",), ("b",), ("",))),
    Case("dropout-replicas", models.Dropout, (("a",), ("b",), ("",)), replicas=(2, 1, 1), exact=False),
    Case("dropout-recompute", models.Dropout, (("a",), ("b",), ("",)), recompute=(0, 1)),
    Case(
        "encoder-zero-bubble", models.Encoder, _FOUR, policy="zero-bubble", lags=(0, 1, 1, 2)
    ),
    Case("encoder", models.Encoder, (("a",), ("b",), ("c",), ("",))),
    Case("encoder-fine", models.Encoder, (("a", "b.self"), ("b",), ("c.self",), ("",))),
    Case("two-heads", models.TwoHeads, (("a",), ("b",), ("",))),
    Case("two-heads-clipped", models.TwoHeads, (("a",), ("b",), ("",)), clip=0.1),
    Case("padded", models.Padded, (("a",), ("b",), ("",))),
    Case("padded-clipped", models.Padded, (("a",), ("b",), ("",)), clip=0.05),
    Case("padded-replicas", models.Padded, (("a",), ("b",), ("",)), replicas=(1, 1, 2), exact=False),
    Case("frozen", models.Frozen, _FOUR),
    Case("replicas-1-2-1", models.Chain, (("a",), ("b", "c"), ("",)), replicas=(1, 2, 1), exact=False),
    Case(
        "replicas-1-2-1-clipped", models.Chain, (("a",), ("b", "c"), ("",)),
        replicas=(1, 2, 1), exact=False, clip=0.05,
    ),
    Case("replicas-2-4", models.Chain, (("a", "b"), ("",)), replicas=(2, 4), micro_batch=4, exact=False),
    Case("replicas-4-2", models.Chain, (("a", "b"), ("",)), replicas=(4, 2), micro_batch=4, exact=False),
    Case(
        "replicas-3-1", models.Chain, (("a", "b"), ("",)),
        replicas=(3, 1), micro_batch=3, mini_batch=9, exact=False,
    ),
    Case("data-parallel-sharded", models.Chain, (("",),), replicas=(2,), exact=False, shard=True),
    Case(
        "diamond-sharded-clipped",
        models.Diamond,
        _FOUR,
        replicas=(1, 2, 1, 2),
        exact=False,
        shard=True,
        clip=0.05,
    ),
    Case(
        "tied-sharded", models.Tied, (("a",), ("b",), ("",)), replicas=(2, 1, 1), exact=False, shard=True
    ),
    Case("chain-two-on-a-device", models.Chain, _FOUR, slots=(0, 1, 0, 1)),
    Case("diamond-two-on-a-device", models.Diamond, _FOUR, slots=(0, 1, 1, 0)),
    Case("two-towers-on-one-device", models.TwoTowers, _THREE, slots=(0, 0, 1)),
    Case("tied-on-one-device", models.Tied, _THREE, slots=(0, 1, 0), exact=False),
    Case("clipped-on-one-device", models.Diamond, _FOUR, slots=(0, 1, 1, 2), clip=0.05),
    Case(
        "diamond-shared-replicas",
        models.Diamond,
        _FOUR,
        replicas=(1, 2, 2, 1),
        slots=(0, 1, 1, 2),
        exact=False,
        optimizer="sgd",  # sees a gradient that is summed twice
    ),
    Case(
        "two-heads-on-one-device",
        models.TwoHeads,
        _THREE,
        slots=(0, 0, 1),
        policy="zero-bubble",
        lags=(1, 0, 1),
    ),
    *(
        Case(
            f"residual-on-one-device{'' if policy == '1f1b' else '-' + policy}",
            models.Residual,
            (("a", "b"), ("c",), ("d",), ("",)),
            slots=(0, 0, 1, 2),
            policy=policy,
            exact=False,
        )
        for policy in ("1f1b", "greedy")
    ),
    Case("clicks", models.Clicks, (("towers.0",), ("towers.1",), ("bags",), ("",))),
    Case("clicks-a-table-each", models.Clicks, (("bags.0", "towers"), ("bags.1",), ("",)), micro_batch=1),
    Case("clicks-pooled", models.PooledClicks, (("towers",), ("bags.0",), ("bags.1",), ("",))),
    Case(
        "clicks-pooled-replicas",
        models.PooledClicks,
        (("towers",), ("bags",), ("",)),
        replicas=(1, 2, 1),
        exact=False,
    ),
    Case("drugs", models.Drugs, (("towers.a",), ("towers.b",), ("towers.c",), ("",))),
    Case("data-parallel", models.Chain, (("",),), replicas=(2,), exact=False),
    Case("diamond-replicas", models.Diamond, _FOUR, replicas=(1, 2, 1, 2), exact=False),
    Case("accumulated", models.Chain, _FOUR, accumulate=3),
    Case("accumulated-pair", models.Padded, _THREE, accumulate=2, clip=0.05),
    Case("accumulated-tied-replicas", models.Tied, _THREE, replicas=(2, 1, 1), accumulate=2, exact=False),
    Case("ema", models.TwoTowers, _THREE, ema=0.9),
    Case("ema-tied", models.Tied, _THREE, micro_batch=8, ema=0.9),
    Case("ema-batch-norm", models.BatchNorm, (("a",), ("norm", "b"), ("",)), ema=0.5),
    Case("ema-sharded", models.Diamond, _FOUR, replicas=(1, 2, 1, 2), shard=True, ema=0.9, exact=False),
    Case("groups", models.Chain, _FOUR, groups=(("d.*", 0.1), ("*.bias", 0.03), ("d.bias", 9.0))),
    Case(
        "groups-sharded", models.Diamond, _FOUR, replicas=(1, 2, 1, 2), exact=False, shard=True,
        groups=(("b.*", 0.1),), undecayed=("biases",),
    ),
    Case("groups-of-one-stage", models.Encoder, _FOUR, groups=(("c.*", 0.1),), undecayed=("norms",)),
    Case("scheduler", models.TwoTowers, _THREE, scheduler=True, optimizer="sgd"),
    Case("scheduler-groups-ema", models.Diamond, _FOUR, scheduler=True, groups=(("b.*", 0.1),), ema=0.9),
    Case("pretrained", models.TwoTowers, _THREE, pretrained="a."),
    Case(
        "pretrained-frozen", models.TwoTowers, _THREE,
        pretrained="a.", freeze=("a.*",), scheduler=True, clip=0.05,
    ),
    Case("pretrained-frozen-within", models.Chain, _FOUR, pretrained="b.", freeze=("b.*",), ema=0.9),
    Case("bf16-one-stage", models.Chain, (("",),), precision="bf16"),
    Case("bf16-chain", models.Chain, _FOUR, precision="bf16", clip=0.05),
    Case("bf16-zero-bubble", models.Chain, _FOUR, precision="bf16", policy="zero-bubble", lags=(0, 1, 2, 1)),
    Case("bf16-recompute", models.Dropout, _THREE, precision="bf16", recompute=(0, 1)),
    Case("bf16-two-towers", models.TwoTowers, _THREE, precision="bf16", ema=0.9),
    Case("bf16-diamond", models.Diamond, _FOUR, precision="bf16", accumulate=2),
    Case("bf16-skip", models.Skip, _THREE, precision="bf16"),
    Case("bf16-fan-out", models.FanOut, (("a",), ("b",), ("c", "d"), ("",)), precision="bf16"),
    Case("bf16-encoder", models.Encoder, _FOUR, precision="bf16"),
    Case(
        "bf16-encoder-fine", models.Encoder, (("a", "b.self"), ("b",), ("c.self",), ("",)), precision="bf16"
    ),
    Case("bf16-batch-norm", models.BatchNorm, (("a",), ("norm", "b"), ("",)), precision="bf16"),
    Case("bf16-padded", models.Padded, _THREE, precision="bf16"),
    Case("bf16-two-heads", models.TwoHeads, _THREE, precision="bf16"),
    Case("bf16-tied", models.Tied, _THREE, precision="bf16", micro_batch=8),
    Case("bf16-tied-on-one-device", models.Tied, _THREE, precision="bf16", micro_batch=8, slots=(0, 1, 0)),
    Case("bf16-frozen", models.Frozen, _FOUR, precision="bf16"),
    Case("bf16-table", models.Table, _THREE, precision="bf16", micro_batch=8),
    Case(
        "bf16-data-parallel", models.Chain, (("",),),
        replicas=(2,), precision="bf16", exact=False, optimizer="sgd", shard=True,
    ),
    Case("bf16-clicks", models.Clicks, (("towers.0",), ("towers.1",), ("bags",), ("",)), precision="bf16"),
)  # fmt: skip


# what travels differs: several values, integers, orders of sums, weights of the loss
TRAVELLERS: dict[int, tuple[type[nn.Module], ...]] = {
    1: (models.Chain,),
    2: (models.Chain, models.Tied),
    3: (models.TwoTowers, models.Tied, models.IntegerEdge, models.Padded),
    4: (models.Chain, models.Diamond, models.Padded),
    6: (models.Diamond,),
}


def of_processes(ranks: int) -> list[Case]:
    """The cases that a job of so many MPI processes runs: by default those of a few models, without autocast,
    since others differ in what stages compute, which threads have shown. Every process captures every
    model."""
    cases = [case for case in CASES if case.ranks == ranks]
    return cases if ALL else [c for c in cases if c.model in TRAVELLERS[ranks] and c.precision == "fp32"]
