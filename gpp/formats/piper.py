"""Piper's JSON: variants of operators ("TMPCs") by degree of tensor parallelism and with recomputation.

Seconds of a micro-batch, bytes of parameters, memory a y + b for y micro-batches in flight; bytes on edges.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpp.cost import CostTable, Timing
from gpp.graph import ComputationGraph, Operator, Parameter, Tensor, Work

from .profile import (
    CALL,
    Profile,
    ProfileError,
    count_in,
    get,
    instance_of,
    number_in,
    tensor_of,
    topological,
)

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
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ProfileError(f"{name}, line {error.lineno}: not JSON, {error.msg}") from None
    except (RecursionError, ValueError) as error:  # too deep, or a number of too many digits
        raise ProfileError(f"{name}: cannot be read as JSON, {error}") from None
    data = instance_of(found, dict, name)
    places = [f"{name}: nodes[{i}]" for i in range(len(get(data, "nodes", list, name)))]
    raw = [instance_of(item, dict, place) for item, place in zip(data["nodes"], places, strict=True)]
    numbers = [get(item, "id", int, place) for item, place in zip(raw, places, strict=True)]
    edges = _piper_edges(get(data, "edges", list, name), _positions(numbers, name), name)
    order = topological([str(number) for number in numbers], edges, name)
    position = {numbers[old]: new for new, old in enumerate(order)}
    moved = {(position[numbers[u]], position[numbers[v]]): size for (u, v), size in edges.items()}
    batches = "maxBatchSize" if "mbsInBatch" not in data and "maxBatchSize" in data else "mbsInBatch"
    return PiperInstance(
        nodes=tuple(_Reader(name, position, moved).node(raw[old], numbers[old]) for old in order),
        edges=moved,
        devices=count_in(data, "maxDevices", name),
        memory=number_in(data, "maxMemoryPerDevice", name),
        bandwidth=number_in(data, "bandwidth", name, least=1e-9),
        micro_batches=count_in(data, batches, name),
    )


def piper_profile(instance: PiperInstance, unit: int, name: str = "profile") -> Profile:
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
            raise ProfileError(
                f"{name}: node {node.number} ({node.name}) has no variant without tensor parallelism, TMPCs 1"
            )
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
    for i, (own, variant) in enumerate(zip(names, chosen, strict=True)):
        weight = min(int(variant.parameter_bytes), int(variant.base / 2))
        rest = int(variant.base) - 2 * weight - int(factor * weight)
        third = variant.seconds / 3
        halves = (third, third) if weight else (2 * third, 0.0)
        timings.append(Timing(own, (float(unit),), (third,), (halves[0],), (halves[1],)))
        operators.append(
            Operator(
                name=own,
                kind=instance.nodes[i].name,
                inputs=tuple(inputs[i]),
                outputs=tuple(tensor for (source, _), tensor in tensors.items() if source == i),
                batch_keys=() if inputs[i] else (f"{own}.in",),
                parameters=(Parameter(f"{own}.weight", weight, True),) if weight else (),
                buffer_bytes=max(rest, 0),
                forward=CALL,
                backward_input=CALL,
                backward_weight=CALL if weight else Work(),
                stash=variant.slope / unit,
                terms=() if any(source == i for source, _ in tensors) else (f"{own}.out",),
            )
        )
    return Profile(ComputationGraph(tuple(operators)), CostTable(tuple(timings), 0.0), factor, unit)


@dataclass(frozen=True, slots=True)
class _Reader:
    """What a node's entries are checked against: where each node is, and the edges between these places."""

    name: str
    position: Mapping[int, int]
    edges: Mapping[tuple[int, int], float]

    def node(self, data: Mapping[str, Any], number: int) -> PiperNode:
        """An entry of `nodes`."""
        label = get(data, "name", str, f"{self.name}: node {number}") if "name" in data else ""
        if not label.isprintable():
            raise ProfileError(f"{self.name}: node {number}: name must be one line of text, it is {label!r}")
        where = f"{self.name}: node {number}" + (f" ({label})" if label else "")
        variants: dict[int, tuple[PiperVariant, ...]] = {}
        for key, items in get(data, "TMPCs", dict, where).items():
            degree = _number(key)
            if degree is None or degree < 1 or degree in variants:
                raise ProfileError(
                    f"{where}: TMPCs are by number of devices, at least 1, each once, one is {key!r}"
                )
            variants[degree] = tuple(
                self._variant(instance_of(item, dict, where), number, f"{where}, TMPCs {degree}")
                for item in instance_of(items, list, where)
            )
        return PiperNode(number, label, variants)

    def _variant(self, data: Mapping[str, Any], number: int, where: str) -> PiperVariant:
        here = self.position[number]
        return PiperVariant(
            name=get(data, "id", str, where),
            seconds=number_in(data, "timePerSample", where),
            parameter_bytes=number_in(data, "parameterSize", where),
            slope=number_in(data, "memoryUsageA", where),
            base=number_in(data, "memoryUsageB", where),
            received=self._exchanged(data, "syncTimeFw", where, lambda other: (other, here)),
            sent=self._exchanged(data, "syncTimeBw", where, lambda other: (here, other)),
        )

    def _exchanged(
        self, data: Mapping[str, Any], key: str, where: str, edge: Callable[[int], tuple[int, int]]
    ) -> dict[int, float]:
        found = {}
        for text in (sizes := get(data, key, dict, where)):
            node = _number(text)
            if node is None or node not in self.position:
                raise ProfileError(f"{where}: {key} names node {text!r}, which is not in the file")
            other = self.position[node]
            if edge(other) not in self.edges:
                way = "from" if key == "syncTimeFw" else "to"
                raise ProfileError(f"{where}: {key} names node {text!r}, {way} which it has no edge")
            found[other] = number_in(sizes, text, f"{where}: {key}")
        return found


def _number(text: str) -> int | None:
    """A whole number; None for any other text."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


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
    """Names, with their node's number where several have the same, and once more while that is taken."""
    count = Counter(name for name, _ in names)
    found: list[str] = []
    taken = {name for name, times in count.items() if times == 1}
    for name, number in names:
        own = name
        while count[name] > 1 and (own == name or own in taken):
            own = f"{own}.{number}"
        taken.add(own)
        found.append(own)
    return found
