"""Piper's JSON: variants of operators ("TMPCs") by degree of tensor parallelism and with recomputation.

Seconds of a micro-batch, bytes of parameters, memory a y + b for y micro-batches in flight; bytes on edges.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpp.cost import CostTable, Timing
from gpp.graph import ComputationGraph, Operator, Parameter, Tensor, Work

from .profile import CALL, Profile, ProfileError, get, instance_of, number_in, tensor_of, topological

RECOMPUTED = "activation recomp"  # how Piper names a variant that recomputes


@dataclass(frozen=True, slots=True)
class PiperVariant:
    """One way to run a node: seconds of a micro-batch both ways, bytes; memory is `slope` y + `base`.

    `received` and `sent` are bytes that it also exchanges over an edge from or to a node, by its number.
    """

    name: str
    seconds: float
    parameter_bytes: float
    slope: float
    base: float
    received: Mapping[int, float]
    sent: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class PiperNode:
    """An operator; `variants` by degree of tensor parallelism."""

    number: int
    name: str
    variants: Mapping[int, tuple[PiperVariant, ...]]


@dataclass(frozen=True, slots=True)
class PiperInstance:
    """A planner's whole input as Piper states it. `edges` are (from, to) positions in `nodes`, which are in a
    topological order, to bytes of a micro-batch one way; `bandwidth` in bytes per second, `memory` in bytes.
    """

    nodes: tuple[PiperNode, ...]
    edges: Mapping[tuple[int, int], float]
    devices: int
    memory: float
    bandwidth: float
    micro_batches: int


def read_piper(text: str, name: str) -> PiperInstance:
    """Piper's JSON. Raises ProfileError."""
    try:
        data = instance_of(json.loads(text), dict, name)
    except json.JSONDecodeError as error:
        raise ProfileError(f"{name}, line {error.lineno}: not JSON, {error.msg}") from None
    places = [f"{name}: nodes[{i}]" for i in range(len(get(data, "nodes", list, name)))]
    raw = [instance_of(item, dict, place) for item, place in zip(data["nodes"], places, strict=True)]
    numbers = [get(item, "id", int, place) for item, place in zip(raw, places, strict=True)]
    edges = _piper_edges(get(data, "edges", list, name), _positions(numbers, name), name)
    order = topological([str(number) for number in numbers], edges, name)
    position = {numbers[old]: new for new, old in enumerate(order)}
    batches = "maxBatchSize" if "mbsInBatch" not in data and "maxBatchSize" in data else "mbsInBatch"
    return PiperInstance(
        nodes=tuple(_piper_node(raw[old], numbers[old], position, name) for old in order),
        edges={(position[numbers[u]], position[numbers[v]]): size for (u, v), size in edges.items()},
        devices=int(number_in(data, "maxDevices", name, least=1)),
        memory=number_in(data, "maxMemoryPerDevice", name),
        bandwidth=number_in(data, "bandwidth", name, least=1e-9),
        micro_batches=int(number_in(data, batches, name, least=1)),
    )


def piper_profile(instance: PiperInstance, unit: int) -> Profile:
    """A graph with the variants that neither recompute nor split tensors.

    Piper gives both passes as one time: a third of it is the forward, the rest the backward. Every edge
    carries as much back as forth, as Piper charges it. Of memory a y + b, a is the stash of a micro-batch; b
    parameters, gradients, as much optimizer state per byte as every operator has room for, and buffers.
    Where b is below parameters and gradients these are taken to be b: memory is right, and the all-reduce
    smaller than Piper's. Raises ProfileError for an operator that cannot run on one device.
    """
    chosen = []
    for node in instance.nodes:
        variants = node.variants.get(1, ())
        if not variants:
            raise ProfileError(f"node {node.number} ({node.name}) has no variant without tensor parallelism")
        chosen.append(next((v for v in variants if v.name != RECOMPUTED), variants[0]))
    room = [v.base / v.parameter_bytes - 2 for v in chosen if v.parameter_bytes]
    factor = max(min(room, default=0.0), 0.0)
    names = _unique([(node.name or f"node{node.number}", node.number) for node in instance.nodes])
    tensors: dict[tuple[int, float], Tensor] = {}
    inputs: list[list[str]] = [[] for _ in chosen]
    for (u, v), size in sorted(instance.edges.items()):
        # readers of equally many bytes read the same tensor
        count = sum(1 for source, _ in tensors if source == u)
        tensor = tensors.setdefault((u, size), tensor_of(f"{names[u]}.out{count}", size, unit, size > 0))
        inputs[v].append(tensor.name)
    operators, timings = [], []
    for i, (name, variant) in enumerate(zip(names, chosen, strict=True)):
        weight = min(int(variant.parameter_bytes), int(variant.base / 2))
        rest = int(variant.base) - 2 * weight - int(factor * weight)
        third = variant.seconds / 3
        halves = (third, third) if weight else (2 * third, 0.0)
        timings.append(Timing(name, (float(unit),), (third,), (halves[0],), (halves[1],)))
        operators.append(
            Operator(
                name=name,
                kind=instance.nodes[i].name,
                inputs=tuple(inputs[i]),
                outputs=tuple(tensor for (source, _), tensor in tensors.items() if source == i),
                batch_keys=() if inputs[i] else (f"{name}.in",),
                parameters=(Parameter(f"{name}.weight", weight, True),) if weight else (),
                buffer_bytes=max(rest, 0),
                forward=CALL,
                backward_input=CALL,
                backward_weight=CALL if weight else Work(),
                stash=variant.slope / unit,
                terms=() if any(source == i for source, _ in tensors) else (f"{name}.out",),
            )
        )
    return Profile(ComputationGraph(tuple(operators)), CostTable(tuple(timings), 0.0), factor, unit)


def _piper_node(data: Mapping[str, Any], number: int, position: Mapping[int, int], name: str) -> PiperNode:
    label = str(data.get("name", ""))
    where = f"{name}: node {number}" + (f" ({label})" if label else "")
    variants = {}
    for degree, items in get(data, "TMPCs", dict, where).items():
        if not str(degree).isdecimal() or int(degree) < 1:
            raise ProfileError(f"{where}: TMPCs are by number of devices, at least 1, one is {degree!r}")
        variants[int(degree)] = tuple(
            _variant(instance_of(item, dict, where), position, f"{where}, TMPCs {degree}")
            for item in instance_of(items, list, where)
        )
    return PiperNode(number, label, variants)


def _variant(data: Mapping[str, Any], position: Mapping[int, int], where: str) -> PiperVariant:
    return PiperVariant(
        name=get(data, "id", str, where),
        seconds=number_in(data, "timePerSample", where),
        parameter_bytes=number_in(data, "parameterSize", where),
        slope=number_in(data, "memoryUsageA", where),
        base=number_in(data, "memoryUsageB", where),
        received=_exchanged(data, "syncTimeFw", position, where),
        sent=_exchanged(data, "syncTimeBw", position, where),
    )


def _exchanged(
    data: Mapping[str, Any], key: str, position: Mapping[int, int], where: str
) -> dict[int, float]:
    found = {}
    for node in (sizes := get(data, key, dict, where)):
        if not node.lstrip("-").isdecimal() or int(node) not in position:
            raise ProfileError(f"{where}: {key} names node {node!r}, which is not in the file")
        found[position[int(node)]] = number_in(sizes, node, f"{where}: {key}")
    return found


def _piper_edges(
    items: Sequence[Any], position: Mapping[int, int], name: str
) -> dict[tuple[int, int], float]:
    edges: dict[tuple[int, int], float] = {}
    for i, item in enumerate(items):
        where = f"{name}: edges[{i}]"
        ends = [get(instance_of(item, dict, where), key, int, where) for key in ("sourceId", "destId")]
        for end in ends:
            if end not in position:
                raise ProfileError(f"{where}: names node {end}, which is not in the file")
        pair = (position[ends[0]], position[ends[1]])
        if pair in edges:
            raise ProfileError(f"{where}: edge {ends[0]} -> {ends[1]} appears twice")
        edges[pair] = number_in(item, "communicationCost", where)
    return edges


def _positions(numbers: Sequence[int], name: str) -> dict[int, int]:
    if not numbers:
        raise ProfileError(f"{name}: nodes must not be empty")
    found = {number: i for i, number in enumerate(numbers)}
    if len(found) < len(numbers):
        twice = next(number for i, number in enumerate(numbers) if found[number] != i)
        raise ProfileError(f"{name}: node {twice} appears twice; ids must be unique")
    return found


def _unique(names: Sequence[tuple[str, int]]) -> list[str]:
    """Names, with their node's number where several have the same."""
    plain = [name for name, _ in names]
    return [f"{name}.{number}" if plain.count(name) > 1 else name for name, number in names]
