"""What a profile becomes, and what its readers have in common: checked values, order, tensors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, TypeVar

from gpp.cost import CostTable
from gpp.graph import ComputationGraph, Tensor, Work

CALL = Work(kernels=1)  # there is work; how much only the times say
KINDS: Mapping[type, str] = {dict: "an object", list: "a list", int: "an integer", str: "a text"}
LARGEST = 1e24  # seconds, bytes: beyond is a mistake, and sums of such would not be numbers any more
Kind = TypeVar("Kind")


class ProfileError(ValueError):
    """A profile that is malformed or contradicts itself."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A graph, its times, and what the optimizer keeps per byte of parameters."""

    graph: ComputationGraph
    costs: CostTable
    optimizer_factor: float
    unit: int


def topological(labels: Sequence[str], edges: Iterable[tuple[int, int]], name: str) -> list[int]:
    """Positions in an order that respects the edges, otherwise that of the file."""
    after: list[list[int]] = [[] for _ in labels]
    missing = [0] * len(labels)
    for u, v in edges:
        after[u].append(v)
        missing[v] += 1
    ready = [i for i, count in enumerate(missing) if not count]
    heapify(ready)
    order = []
    while ready:
        order.append(heappop(ready))
        for v in after[order[-1]]:
            missing[v] -= 1
            if not missing[v]:
                heappush(ready, v)
    if len(order) < len(labels):
        left = [labels[i] for i in range(len(labels)) if missing[i]]
        raise ProfileError(f"{name}: the graph must be acyclic, node {left[0]} is on a cycle or after one")
    return order


def tensor_of(name: str, size: float, unit: int, needs_grad: bool) -> Tensor:
    """A tensor of at least size / unit bytes a sample."""
    count = math.ceil(size / unit)
    width, dtype = (4, "float32") if count % 4 == 0 else (2, "float16")
    return Tensor(name, (-(-count // width),), dtype, needs_grad)


def instance_of(value: object, kind: type[Kind], where: str) -> Kind:
    """The value, if it is of that type."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProfileError(f"{where}: must be {KINDS[kind]}, it is {str(value)[:60]!r}")
    return value


def get(data: Mapping[str, Any], key: str, kind: type[Kind], where: str) -> Kind:
    """The entry, if it is there and of that type."""
    if key not in data:
        raise ProfileError(f"{where}: {key} is missing")
    return instance_of(data[key], kind, f"{where}: {key}")


def number_in(data: Mapping[str, Any], key: str, where: str, *, least: float = 0.0) -> float:
    """The entry, if it is a number and at least that."""
    if key not in data:
        raise ProfileError(f"{where}: {key} is missing")
    value = data[key]
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    return checked(number, key, where, least, shown=value)


def count_in(data: Mapping[str, Any], key: str, where: str) -> int:
    """The entry, if it is a whole number and at least 1."""
    value = number_in(data, key, where, least=1)
    if value != int(value):
        raise ProfileError(f"{where}: {key} must be a whole number, it is {data[key]!r}")
    return int(value)


def checked(value: float, key: str, where: str, least: float, *, shown: object) -> float:
    """The value, if it is at least that and not absurdly large; `shown` is how the file has it."""
    if value > LARGEST:
        raise ProfileError(f"{where}: {key} must be at most {LARGEST:g}, it is {str(shown)[:60]}")
    if not value >= least:
        raise ProfileError(f"{where}: {key} must be a number of at least {least:g}, it is {shown!r}")
    return float(value)
