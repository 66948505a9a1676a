"""A proven lower bound on the step time of any plan.

For plans of convex stages in which a stage's d devices split its micro-batch evenly, each micro-batch size is
one of those considered, both halves of a backward run in one go, and an all-reduce waits for its device's
last pass. Three arguments, the largest counts:

- work: every operator computes every sample somewhere, on K devices at most;
- one operator: its d replicas each compute m pieces, then reduce and update, whatever else they do;
- a path: between two updates of a parameter that leads to an operator v, a micro-batch must travel from the
  parameter to v, all pieces of v's work must be done, and a gradient must travel back.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from gpp.cost import CostModel, all_reduce_seconds
from gpp.graph import ComputationGraph
from gpp.topology import DeviceTopology

from .intervals import operator_seconds, takes_part_in_backward
from .options import Options, divisors

Array = NDArray[np.float64]


def bound(
    graph: ComputationGraph, topology: DeviceTopology, costs: CostModel, options: Options
) -> tuple[float, str]:
    """Seconds that no step can beat, and what says so: "work", "operator NAME" or "path through NAME".

    Asks the cost model O(n divisors(mini_batch)) times. Of unequal devices the fastest counts.
    """
    devices = len(topology.devices)
    kinds = tuple(dict.fromkeys(topology.devices))
    limit = min(devices, options.max_replicas or devices)
    splits = [(b, d) for b in options.micro_batches for d in divisors(b) if d <= limit]
    seconds_of = cache(lambda samples: operator_seconds(graph, costs, kinds, samples, min))
    calls = np.stack([seconds_of(b / d) for b, d in splits])  # [split, pass, operator]
    rounds = np.array([options.mini_batch // b for b, _ in splits], dtype=float)
    degrees = np.array([d for _, d in splits])
    coupled = np.array([op.batch_coupled for op in graph.operators])
    trainable = [sum(p.bytes for p in op.parameters if p.trainable) for op in graph.operators]
    update = np.array(
        [min(costs.update(size, kind) for kind in kinds) if size else 0.0 for size in trainable]
    )

    forbidden = coupled[None, :] & (degrees > 1)[:, None]
    compute = np.where(forbidden, np.inf, rounds[:, None] * calls.sum(1))  # of one replica in a step
    everything = {p.name: p.bytes for op in graph.operators for p in op.parameters if p.trainable}
    last = min(costs.update(sum(everything.values()), kind) for kind in kinds) if everything else 0.0
    work = float((compute * degrees[:, None]).min(0).sum() + last) / devices

    reduce = np.array([[_all_reduce(size, int(d), topology) for size in trainable] for d in degrees])
    alone = (compute + reduce + update).min(0)
    way = _there_and_back(graph, calls.sum(1).min(0), update) + compute.min(0)
    best = [
        (work, "work"),
        (float(alone.max()), f"operator {graph.operators[int(alone.argmax())].name}"),
        (float(way.max()), f"path through {graph.operators[int(way.argmax())].name}"),
    ]
    return max(best, key=lambda pair: pair[0])


def _all_reduce(size: int, devices: int, topology: DeviceTopology) -> float:
    links = [topology.between] + ([topology.inside] if devices <= topology.per_host else [])
    return min(all_reduce_seconds(size, devices, link) for link in links)


def _there_and_back(graph: ComputationGraph, piece: Array, update: Array) -> Array:
    """For every operator the most that must happen, in a row, before its first and after its last piece: the
    path from some parameter to it, the gradient's way back and the parameter's update. `piece` are seconds of
    all passes of one piece. -inf where no gradient flows from it to a parameter of another operator."""
    before = np.full(len(graph.operators), -np.inf)
    for (u, v), tensors in graph.edges.items():
        flows = any(t.needs_grad for t in tensors) and takes_part_in_backward(graph, graph.operators[v])
        if not flows:
            continue
        before[v] = max(before[v], before[u] + piece[u])
        if any(p.trainable for p in graph.operators[u].parameters):
            before[v] = max(before[v], piece[u] + update[u])
    return before
