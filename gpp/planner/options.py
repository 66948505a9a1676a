"""What every planner is asked besides the model, the cluster and its costs."""

from dataclasses import dataclass, field
from typing import Literal

from gpp.plan import MICRO_BATCHES, PlanError, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What the user has decided. Operators are named by glob patterns; each must match at least one.

    `together`: what the patterns of an entry match is one stage. `pins`: (pattern, label), operators with the
    same label are in one stage, with different labels in different ones. `uncut`: (producer, consumer), no
    stage border between them where one feeds the other. `replicas`: (pattern, number), the stage of these
    operators has so many.
    """

    together: tuple[tuple[str, ...], ...] = ()
    pins: tuple[tuple[str, str], ...] = ()
    uncut: tuple[tuple[str, str], ...] = ()
    replicas: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A training step of `mini_batch` samples.

    `micro_batch` is a number of samples or "auto". `optimizer_factor` is the optimizer's state in bytes per
    byte of trainable parameters (AdamW keeps two moments: 2; SGD 0, with momentum 1). `max_replicas` bounds
    the data parallelism of one stage.

    What a planner may choose, where it can: `stage_micro_batches` (every stage its own micro-batch size) and
    `bursts` (the k of kFkB) for `graphpipe`; for `gpp` schedules other than `policy` (`eager`,
    `split_backward`, `greedy`), `recompute` of some stages, `shard_optimizer` over replicas, and `colocate`,
    several light stages on one device. `collapse` lets `piper` not tell equal branches apart.
    """

    mini_batch: int
    micro_batch: int | Literal["auto"] = "auto"
    policy: Policy = field(default_factory=Policy)
    optimizer_factor: float = 2.0
    global_norm: bool = False
    max_replicas: int | None = None
    precision: str = "float32"
    constraints: Constraints = field(default_factory=Constraints)
    stage_micro_batches: bool = False
    bursts: tuple[int, ...] = (1,)
    eager: bool = False
    split_backward: bool = False
    greedy: bool = False
    recompute: bool = False
    shard_optimizer: bool = False
    colocate: bool = False
    collapse: bool = False

    def __post_init__(self) -> None:
        if self.mini_batch < 1:
            raise PlanError(f"train.mini_batch must be at least 1, it is {self.mini_batch}")
        if self.optimizer_factor < 0:
            raise PlanError(
                f"the optimizer's bytes must not be negative, the factor is {self.optimizer_factor}"
            )
        if self.max_replicas is not None and self.max_replicas < 1:
            raise PlanError(f"planner.max_replicas must be at least 1, it is {self.max_replicas}")
        if self.micro_batch == "auto":
            return
        if not isinstance(self.micro_batch, int) or self.micro_batch < 1:
            raise PlanError(
                f"train.micro_batch must be auto or at least 1 sample, it is {self.micro_batch!r}"
            )
        if self.mini_batch // self.micro_batch > MICRO_BATCHES:
            raise PlanError(
                f"a step of {self.mini_batch} samples has more than {MICRO_BATCHES} micro-batches of "
                f"train.micro_batch {self.micro_batch}: take larger ones"
            )
        if self.mini_batch % self.micro_batch:
            raise PlanError(
                f"train.micro_batch {self.micro_batch} does not divide train.mini_batch {self.mini_batch}; "
                f"use one of {', '.join(map(str, divisors(self.mini_batch)))}"
            )

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """The micro-batch sizes to consider: the given one, or the powers of two that divide the mini-batch
        and the mini-batch itself."""
        if self.micro_batch != "auto":
            return (self.micro_batch,)
        sizes = {1 << i for i in range(self.mini_batch.bit_length()) if self.mini_batch % (1 << i) == 0}
        few = {size for size in sizes if self.mini_batch // size <= MICRO_BATCHES}
        return tuple(sorted(few | {self.mini_batch}))

    def degrees(self, micro_batch: int, devices: int) -> tuple[int, ...]:
        """Replicas a stage may have: powers of two that divide the micro-batch (GraphPipe §5)."""
        limit = min(devices, micro_batch, self.max_replicas or devices)
        return tuple(
            1 << i for i in range(limit.bit_length()) if micro_batch % (1 << i) == 0 and 1 << i <= limit
        )


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))
