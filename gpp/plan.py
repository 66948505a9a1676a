"""A plan: the stage graph (GraphPipe §3, G_S), on which devices, in which micro-batches, and its estimate.

Seconds, bytes, samples. A plan simulates by itself: it needs neither the model nor the cost table that it was
made with, only their fingerprints. One function, `stage_memory`, states the memory model.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from gpp.graph import ComputationGraph
from gpp.made_for import Note
from gpp.records import RecordError, from_json, to_json
from gpp.topology import DeviceTopology

FORMAT, OLDER = "gpp.plan/3", ("gpp.plan/2",)  # without `made_for`
MICRO_BATCHES = 1 << 17  # of a stage in one step, at most: a schedule lists them all
POLICIES = ("1f1b", "gpipe", "zero-bubble", "greedy")


class PlanError(ValueError):
    """A plan that breaks a rule, or a request that no plan can meet."""


_CLOSE = 1e-6  # a step time and its bound this close are equal
_AMOUNTS = ("stash", "weight_stash", "parameter_bytes", "trainable_bytes", "optimizer_bytes", "buffer_bytes")


def _check_amount(what: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise PlanError(f"{what} must be a finite number of at least 0, it is {value}")


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Times of one micro-batch on one replica (of `update`: of one step)."""

    forward: float
    backward_input: float
    backward_weight: float
    recompute: float = 0.0
    update: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "backward_input", "backward_weight", "recompute", "update"):
            _check_amount(f"seconds.{name} of a stage", getattr(self, name))

    @property
    def backward(self) -> float:
        """Both halves of the backward pass."""
        return self.backward_input + self.backward_weight


@dataclass(frozen=True, slots=True)
class Stage:
    """A convex set of operators on some devices, with its share of the schedule (GraphPipe §3, S_i).

    `in_flight` counts samples over all replicas; a replica works on `micro_batch / len(devices)` samples at a
    time. `stash` and `weight_stash` are bytes per sample; `parameter_bytes` and the rest are bytes of one
    replica. `weight_lag` is by how many micro-batches the weight half of a backward trails the input half
    under "zero-bubble", and under "greedy" may trail it at most (0: both in one go). With `recompute` the
    forward runs again before a backward, with `shard_optimizer` each replica keeps the optimizer's state of
    its share of the parameters, and `optimizer_bytes` are those of the fullest.
    """

    name: str
    operators: tuple[str, ...]
    devices: tuple[int, ...]
    micro_batch: int
    in_flight: int
    seconds: StageSeconds
    k: int = 1
    weight_lag: int = 0
    recompute: bool = False
    shard_optimizer: bool = False
    stash: float = 0.0
    weight_stash: float = 0.0
    parameter_bytes: int = 0
    trainable_bytes: int = 0
    optimizer_bytes: int = 0
    buffer_bytes: int = 0
    batch_keys: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()
    has_backward: bool = True

    def __post_init__(self) -> None:
        if not self.operators:
            raise PlanError(f"stage {self.name} has no operators")
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise PlanError(f"stage {self.name} needs distinct devices, it has {self.devices}")
        if self.micro_batch < 1 or self.k < 1 or self.in_flight < 1:
            raise PlanError(
                f"stage {self.name}: micro_batch, k and in_flight must be at least 1, they are "
                f"{self.micro_batch}, {self.k}, {self.in_flight}"
            )
        if not 0 <= self.weight_lag < max(self.in_flight // self.micro_batch, 1):
            raise PlanError(
                f"stage {self.name}: weight_lag must be at least 0 and below the micro-batches in flight, "
                f"{self.in_flight // self.micro_batch}, it is {self.weight_lag}"
            )
        for name in _AMOUNTS:
            _check_amount(f"{name} of stage {self.name}", getattr(self, name))
        if self.micro_batch % len(self.devices):
            raise PlanError(
                f"micro-batch {self.micro_batch} of stage {self.name} does not divide over its "
                f"{len(self.devices)} devices"
            )


@dataclass(frozen=True, slots=True)
class Edge:
    """All tensors from one stage to another; `bytes` per sample forward, `gradient_bytes` per sample back.

    An edge without tensors is an order alone: what running the stages as a sequential pipeline adds to the
    model's own dependencies (GraphPipe §3, C2). Empty messages go along it and come back.
    """

    source: int
    target: int
    tensors: tuple[str, ...]
    bytes: int
    gradient_bytes: int

    def __post_init__(self) -> None:
        if min(self.bytes, self.gradient_bytes) < 0:
            raise PlanError(
                f"edge {self.source} -> {self.target} must not have a negative number of bytes, it has "
                f"{self.bytes} and {self.gradient_bytes}"
            )

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient message (of an order: an empty one) returns."""
        return self.gradient_bytes > 0 or self.is_order

    @property
    def is_order(self) -> bool:
        """Whether it carries nothing."""
        return not self.tensors


@dataclass(frozen=True, slots=True)
class Shared:
    """Tied parameters: held by several stages, their gradients summed over them."""

    parameters: tuple[str, ...]
    bytes: int
    stages: tuple[int, ...]


@dataclass(frozen=True)
class StageGraph:
    """Stages in a topological order and the edges between them, sorted by (source, target)."""

    stages: tuple[Stage, ...]
    edges: tuple[Edge, ...]
    shared: tuple[Shared, ...] = ()

    def __post_init__(self) -> None:
        pairs = [(e.source, e.target) for e in self.edges]
        if pairs != sorted(set(pairs)):
            raise PlanError(f"edges must be unique and sorted by (source, target), they are {pairs}")
        for source, target in pairs:
            if not 0 <= source < target < len(self.stages):
                raise PlanError(
                    f"edge {source} -> {target}: stages must be numbered in topological order, "
                    f"0 to {len(self.stages) - 1}"
                )
        for item in self.shared:
            if any(not 0 <= s < len(self.stages) for s in item.stages):
                raise PlanError(f"tied parameter {item.parameters} names a stage that is not there")

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Stages that each stage sends to."""
        return tuple(tuple(e.target for e in self.edges if e.source == s) for s in range(len(self.stages)))

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Stages that each stage receives from."""
        return tuple(tuple(e.source for e in self.edges if e.target == s) for s in range(len(self.stages)))

    @property
    def depth(self) -> int:
        """Stages on the longest path: the pipeline depth (GraphPipe §2)."""
        depths: list[int] = []
        for s in range(len(self.stages)):
            depths.append(1 + max((depths[p] for p in self.predecessors[s]), default=0))
        return max(depths)


@dataclass(frozen=True, slots=True)
class Policy:
    """How tasks are ordered, within the samples that each stage may have in flight.

    "gpipe": all forwards, then all backwards; "1f1b" (with k of the stages: kFkB); "zero-bubble": 1F1B whose
    weight halves trail by each stage's `weight_lag`; "greedy": what a device does next is chosen on a clock,
    the weight half waiting for the next message for up to `patience` times its own duration.
    `extra_warm_up` are micro-batches on every hop beyond the rule's own (eager 1F1B).
    """

    name: str = "1f1b"
    extra_warm_up: int = 0
    patience: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise PlanError(f"schedule {self.name!r} is unknown; it can be {', '.join(POLICIES)}")
        if self.extra_warm_up < 0:
            raise PlanError(f"schedule.extra_warm_up must not be negative, it is {self.extra_warm_up}")
        if not 0 <= self.patience < math.inf:
            raise PlanError(f"schedule.patience must be a number of at least 0, it is {self.patience}")


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Digests of what the plan was made from."""

    graph: str
    costs: str
    topology: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Something that the planner chose, and the seconds of a step with it and everything before it."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything needed to schedule, simulate and run one training step.

    `estimate` and `lower_bound` are seconds of one step, `bound_by` is the argument that gives the bound, and
    `choices` are what led from the best other planner's plan to this one. `loss_weighted` and `global_norm`
    say which scalars all stages must agree on before they update. `made_for` are the operators of the model,
    so that another one can be told from it by more than its fingerprint.
    """

    stage_graph: StageGraph
    topology: DeviceTopology
    mini_batch: int
    policy: Policy
    fingerprints: Fingerprints
    planner: str
    precision: str = "float32"
    estimate: float = 0.0
    lower_bound: float = 0.0
    bound_by: str = ""
    loss_weighted: bool = False
    global_norm: bool = False
    choices: tuple[Choice, ...] = ()
    made_for: tuple[Note, ...] = ()

    def __post_init__(self) -> None:
        if self.mini_batch < 1:
            raise PlanError(f"mini_batch must be at least 1, it is {self.mini_batch}")
        for name in ("estimate", "lower_bound"):
            _check_amount(f"{name} of a step", getattr(self, name))
        count = len(self.topology.devices)
        owner: dict[int, Stage] = {}
        for stage in self.stage_graph.stages:
            if self.mini_batch // stage.micro_batch > MICRO_BATCHES:
                raise PlanError(
                    f"stage {stage.name} must have at most {MICRO_BATCHES} micro-batches in a step, it has "
                    f"{self.mini_batch // stage.micro_batch}"
                )
            if self.mini_batch % stage.micro_batch:
                raise PlanError(
                    f"micro-batch {stage.micro_batch} of stage {stage.name} does not divide the mini-batch "
                    f"{self.mini_batch}"
                )
            for device in stage.devices:
                if not 0 <= device < count:
                    raise PlanError(
                        f"stage {stage.name} uses device {device}; the cluster has devices 0 to {count - 1}"
                    )
                if device in owner and set(owner[device].devices) != set(stage.devices):
                    raise PlanError(
                        f"device {device} belongs to stage {owner[device].name} and to stage {stage.name}; "
                        "stages that share a device must share all of their devices"
                    )
                owner[device] = stage

    @cached_property
    def residents(self) -> dict[int, tuple[int, ...]]:
        """Each device that is used to the stages on it, ascending; mostly one."""
        found: dict[int, tuple[int, ...]] = {}
        for index, stage in enumerate(self.stage_graph.stages):
            for device in stage.devices:
                found[device] = (*found.get(device, ()), index)
        return dict(sorted(found.items()))

    @cached_property
    def clocked(self) -> frozenset[int]:
        """Stages whose order is chosen on a clock (`gpp.schedule.order`): of a greedy plan all, else those
        that share their devices."""
        if self.policy.name == "greedy":
            return frozenset(range(len(self.stage_graph.stages)))
        return frozenset(s for held in self.residents.values() if len(held) > 1 for s in held)

    @property
    def gap(self) -> float | None:
        """How far the estimate is above the lower bound, as a share of it; None where there is no bound."""
        return self.estimate / self.lower_bound - 1 if self.lower_bound else None

    @property
    def idle_devices(self) -> tuple[int, ...]:
        """Devices that no stage uses."""
        return tuple(d for d in range(len(self.topology.devices)) if d not in self.residents)


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON (plan.json), the same text for the same plan."""
    return to_json(plan, FORMAT)


def plan_from_json(text: str) -> Plan:
    """Read `plan_to_json`'s text back. Raises PlanError naming what is malformed or breaks a rule."""
    try:
        return from_json(Plan, text, FORMAT, OLDER)
    except RecordError as error:
        raise PlanError(f"not a plan: {error}") from None
    except PlanError:
        raise
    except ValueError as error:
        raise PlanError(f"not a plan: {error}") from None


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes on each device of a stage at its peak."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    stash: float
    messages: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.stash + self.messages


def shared_out(sizes: Mapping[str, int], shares: int) -> dict[str, int]:
    """Names to one of `shares` numbers: the largest first, each to the share with the fewest bytes so far.

    How replicas divide the optimizer's state: by whole parameters, so any optimizer works.
    """
    load = [0] * shares
    found = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        found[name] = load.index(min(load))
        load[found[name]] += sizes[name]
    return found


def stage_memory(graph: StageGraph, index: int, *, clocked: Collection[int] = ()) -> StageMemory:
    """The memory model (GraphPipe §5): a whole copy of weights, gradients and optimizer state on each
    replica (with `shard_optimizer`: the fullest share of the state), its share of the stash of all samples in
    flight, and the rings of message buffers at both ends of its edges: as many messages as the upstream stage
    may have forwarded and not yet seen back (of a `clocked` one all that it has in flight), and activations
    that wait for the weight half at their receiver. A stage that recomputes keeps only what it received until
    the backward: the stash is there for one micro-batch, and for those whose weight half is still to come.
    """
    stage = graph.stages[index]
    share = 1 / len(stage.devices)
    stashed = (1 + stage.weight_lag) * stage.micro_batch if stage.recompute else stage.in_flight
    messages = 0.0
    for edge in graph.edges:
        if index in (edge.source, edge.target):
            above, below = graph.stages[edge.source], graph.stages[edge.target]
            lagging = 0 if edge.source in clocked else above.weight_lag * above.micro_batch
            ahead = above.in_flight - lagging
            trailing = (below.weight_lag + 1) * below.micro_batch if below.weight_lag else 0
            messages += (edge.bytes * (ahead + trailing) + edge.gradient_bytes * ahead) * share
    return StageMemory(
        parameters=stage.parameter_bytes,
        gradients=stage.trainable_bytes,
        optimizer=stage.optimizer_bytes,
        buffers=stage.buffer_bytes,
        stash=stage.stash * min(stashed, stage.in_flight) * share,
        messages=messages,
    )


def device_memory(plan: Plan) -> tuple[float, ...]:
    """Bytes on every device at its peak: all stages that it holds."""
    graph = plan.stage_graph
    need = [stage_memory(graph, s, clocked=plan.clocked).total for s in range(len(graph.stages))]
    devices = range(len(plan.topology.devices))
    return tuple(sum(need[s] for s in plan.residents.get(device, ())) for device in devices)


def check_plan(plan: Plan, graph: ComputationGraph | None = None) -> None:
    """Raise PlanError unless the plan is valid (GraphPipe §3, C1-C3 and the memory constraint).

    Without the graph only what the plan knows of itself is checked: devices and memory. With it also that the
    stages partition the operators, each stage is convex, and the edges join the same stages as the
    graph's (what they carry is the capture's to say).
    """
    if 0 < plan.estimate < plan.lower_bound * (1 - _CLOSE):
        raise PlanError(
            f"the estimate of {plan.estimate:.6g} s is below what no plan can beat, {plan.lower_bound:.6g} s "
            f"({plan.bound_by}): one of the two is wrong, plan anew"
        )
    for device, need in enumerate(device_memory(plan)):
        have = plan.topology.devices[device].memory
        if need > have:
            names = " and ".join(plan.stage_graph.stages[s].name for s in plan.residents[device])
            raise PlanError(
                f"stage {names} needs {need / 2**20:.4g} MiB on device {device}, which has "
                f"{have / 2**20:.4g} MiB; use more devices or a smaller train.micro_batch"
            )
    if graph is not None:
        _check_against_graph(plan, graph)


def _check_against_graph(plan: Plan, graph: ComputationGraph) -> None:
    stage_of: dict[str, int] = {}
    for index, stage in enumerate(plan.stage_graph.stages):
        for name in stage.operators:
            if name not in graph.index:
                raise PlanError(f"stage {stage.name} has operator {name}, which the model has not")
            if name in stage_of:
                raise PlanError(f"operator {name} is in two stages: a partition is needed")
            stage_of[name] = index
    missing = [op.name for op in graph.operators if op.name not in stage_of]
    if missing:
        raise PlanError(f"operator {missing[0]} and {len(missing) - 1} more are in no stage")
    for stage in plan.stage_graph.stages:
        if not graph.is_convex(graph.index[name] for name in stage.operators):
            raise PlanError(f"stage {stage.name} is not convex: a path leaves it and comes back")
        coupled = [n for n in stage.operators if graph.operators[graph.index[n]].batch_coupled]
        if coupled and len(stage.devices) > 1:
            raise PlanError(
                f"stage {stage.name} has {len(stage.devices)} replicas, but {coupled[0]} mixes samples"
            )
    expected = {
        (stage_of[graph.operators[u].name], stage_of[graph.operators[v].name]) for u, v in graph.edges
    }
    expected = {(s, t) for s, t in expected if s != t}
    found = {(e.source, e.target) for e in plan.stage_graph.edges if not e.is_order}
    if expected != found:
        raise PlanError(
            f"the stage graph's edges {sorted(found)} are not those of the model, {sorted(expected)}"
        )
