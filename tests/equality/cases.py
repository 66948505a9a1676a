"""What is compared with the reference: a model, how it is cut, and how it is trained."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from . import models


@dataclass(frozen=True)
class Case:
    """`stages` are prefixes of operator names, one tuple a stage ("" takes the rest), with replicas.

    `chained` adds an order between neighbours; `lags` are the weight lags of the stages, in micro-batches
    held beyond the rule's; `recompute` lists stages that run their forward again; with
    `shard` replicas share the optimizer's state out; stages with the same number in `slots` share devices.

    `exact`: sums are in the reference's order, so float32 must be equal to the bit; else the run is in
    float64 and must agree to 1e-10.
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

    @property
    def ranks(self) -> int:
        if self.slots:
            counts = dict(zip(self.slots, self.replicas or (1,) * len(self.slots), strict=True))
            return sum(counts.values())
        return sum(self.replicas) if self.replicas else len(self.stages)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.exact else torch.float64

    def make_optimizer(self, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        parameters = [p for _, p in named]
        kinds = {
            "adamw": partial(torch.optim.AdamW, lr=0.01),
            "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
        }
        return kinds[self.optimizer](parameters)


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
)  # fmt: skip
