"""The least that a step asks of the devices that hold an operator: what the proofs of `bound` add up.

A split is a micro-batch size b and a number of replicas d that divides it: r = mini_batch / b rounds, in each
of which every replica computes a piece of b / d samples. Messages are asynchronous and cost a device nothing;
a stage's all-reduce and update come after its last pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpp.cost import CostModel, all_reduce_seconds
from gpp.graph import Operator
from gpp.topology import Device, DeviceTopology

from .estimate import Problem
from .intervals import takes_part_in_backward
from .options import divisors

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pieces:
    """By split and operator, [splits, operators], inf where a split is not allowed. Seconds of one piece:
    `forward`, `back` (what must be done before a gradient leaves), `whole`; `closing` are all-reduce and
    update of the operator's own parameters, once a step. `rounds` and `replicas` are [splits, 1]."""

    forward: Array
    back: Array
    whole: Array
    closing: Array
    rounds: Array
    replicas: Array
    trains: NDArray[np.bool_]

    @property
    def alone(self) -> Array:
        """What each replica does in a step for the operator, were it a stage of its own."""
        return np.asarray(self.rounds * self.whole + self.closing)


@dataclass(frozen=True)
class Shares:
    """By degree and unit, [degrees, units], inf where not allowed: what each of so many replicas does in a
    step for a unit's operators. These add up over the units of a stage, and over stages that share devices.

    `compute` are all rounds, of whatever micro-batch size takes least; `closing` all-reduce and update in
    proportion to bytes, tied parameters counted once; `start` [degrees] what these cost a stage besides.
    """

    degrees: tuple[int, ...]
    compute: Array
    closing: Array
    start: Array

    @property
    def load(self) -> Array:
        """All of it."""
        return np.asarray(self.compute + self.closing)


@dataclass(frozen=True)
class Loads:
    """Both, and how much of the fastest device's work each device does in the same time, at most."""

    pieces: Pieces
    shares: Shares
    speeds: Array


def loads(problem: Problem) -> Loads:
    """Asks the cost model O(n divisors(mini_batch)) times for each kind of device. Of unequal devices the
    fastest counts. The cost of an update and of an all-reduce must be affine in their bytes."""
    graph, topology, options, costs = problem.graph, problem.topology, problem.options, problem.costs
    kinds = tuple(dict.fromkeys(topology.devices))
    limit = min(len(topology.devices), options.max_replicas or len(topology.devices))
    splits = [(b, d) for b in options.micro_batches for d in divisors(b) if d <= limit]
    samples = sorted({b / d for b, d in splits})
    backward = [takes_part_in_backward(graph, op) for op in graph.operators]
    asked = {
        (s, kind): _seconds(graph.operators, backward, costs, s, kind) for s in samples for kind in kinds
    }
    fastest = {s: np.minimum.reduce([asked[s, kind] for kind in kinds]) for s in samples}

    speed = {kind: _speed(samples, fastest, asked, kind) for kind in kinds}
    degrees = tuple(sorted({d for _, d in splits}))
    row = np.array([degrees.index(d) for _, d in splits])
    fixed = [problem.units.replicas[u] for u in problem.units.unit_of]
    barred = np.array([_barred(graph.operators, fixed, d) for d in degrees])[row]
    calls = np.stack([fastest[b / d] for b, d in splits])  # [split, pass, operator]
    calls = np.where(barred[:, None, :], np.inf, calls)
    rounds = np.array([[options.mini_batch / b] for b, _ in splits])

    own, once = _trainable(graph.operators)
    start, each = np.transpose([_closing(problem, kinds, d, float(own.sum())) for d in degrees])
    closing = np.where(own > 0, start[row, None] + each[row, None] * own, 0.0)
    owner, count = np.array(problem.units.unit_of), len(problem.units.members)
    compute = np.full((len(degrees), count), np.inf)
    for split, d in enumerate(row.tolist()):
        found = np.bincount(owner, rounds[split] * calls[split].sum(0), count)
        compute[d] = np.minimum(compute[d], found)
    return Loads(
        pieces=Pieces(
            forward=calls[:, 0],
            back=calls[:, 1] if may_split(problem) else calls[:, 1] + calls[:, 2],
            whole=calls.sum(1),
            closing=closing,
            rounds=rounds,
            replicas=np.array([[float(d)] for _, d in splits]),
            trains=own > 0,
        ),
        shares=Shares(degrees, compute, np.outer(each, np.bincount(owner, once, count)), start),
        speeds=np.array([speed[kind] for kind in topology.devices]),
    )


def _seconds(
    ops: Sequence[Operator], backward: Sequence[bool], costs: CostModel, samples: float, device: Device
) -> Array:
    """[3, n]: forward, input half and weight half of every operator."""
    rows = [
        (
            costs.forward(op, samples, device),
            costs.backward_input(op, samples, device) if back else 0.0,
            costs.backward_weight(op, samples, device) if back else 0.0,
        )
        for op, back in zip(ops, backward, strict=True)
    ]
    return np.transpose(rows)


def may_split(problem: Problem) -> bool:
    """Whether a plan's weight halves may trail."""
    options = problem.options
    return options.split_backward or options.greedy or options.policy.name in ("zero-bubble", "greedy")


def _barred(ops: Sequence[Operator], fixed: Sequence[int | None], degree: int) -> list[bool]:
    return [
        (op.batch_coupled and degree > 1) or r not in (None, degree) for op, r in zip(ops, fixed, strict=True)
    ]


def _trainable(ops: Sequence[Operator]) -> tuple[Array, Array]:
    """Bytes of each operator's trainable parameters; and of those that no operator before it has."""
    own, once = np.zeros(len(ops)), np.zeros(len(ops))
    seen: set[str] = set()
    for i, op in enumerate(ops):
        sizes = {p.name: p.bytes for p in op.parameters if p.trainable}
        own[i] = sum(sizes.values())
        once[i] = sum(size for name, size in sizes.items() if name not in seen)
        seen |= set(sizes)
    return own, once


def _closing(problem: Problem, kinds: Sequence[Device], degree: int, most: float) -> tuple[float, float]:
    """Seconds of all-reduce and update on so many replicas: fixed, and for each byte."""
    topology, options = problem.topology, problem.options
    shards = degree if options.shard_optimizer else 1

    def seconds(size: float) -> float:
        update = min(problem.costs.update(size / shards, kind) for kind in kinds)
        return update + _all_reduce(size, degree, topology)

    start = seconds(0.0)
    return start, max(seconds(most) - start, 0.0) / most if most else 0.0


def _all_reduce(size: float, devices: int, topology: DeviceTopology) -> float:
    links = [topology.between] + ([topology.inside] if devices <= topology.per_host else [])
    return min(all_reduce_seconds(size, devices, link) for link in links)


def _speed(
    samples: Sequence[float],
    fastest: Mapping[float, Array],
    asked: Mapping[tuple[float, Device], Array],
    kind: Device,
) -> float:
    """The most of any pass that a device does while the fastest does all of it."""
    most = 0.0
    for size in samples:
        own = asked[size, kind]
        most = max(most, float(np.divide(fastest[size], own, out=np.zeros_like(own), where=own > 0).max()))
    return most or 1.0
