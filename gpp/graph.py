"""What is to be computed: operators, the tensors between them, and their directed acyclic graph.

Seconds, bytes, samples. Everything that grows with the batch is given per sample, so one graph serves
every micro-batch size (GraphPipe §3, the computation graph G_C).
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gpp.records import MOST, RecordError, from_json, to_json

FORMAT = "gpp.graph/1"

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}


class GraphError(ValueError):
    """A computation graph that breaks one of its rules."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value between operators; `shape` is that of one sample, the batch dimension left out."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    needs_grad: bool

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(sorted(DTYPE_BYTES))
            raise GraphError(f"tensor {self.name} has dtype {self.dtype!r}, known are {known}")
        if any(size < 0 for size in self.shape):
            raise GraphError(f"tensor {self.name} has a negative size in its shape {self.shape}")
        if self.bytes > MOST:
            raise GraphError(f"tensor {self.name} has more than {MOST} bytes, its shape is {self.shape}")

    @property
    def bytes(self) -> int:
        """Bytes of one sample."""
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A learnable (or frozen) array by its full name in the model; tied weights share one name."""

    name: str
    bytes: int
    trainable: bool

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise GraphError(f"parameter {self.name} has a negative number of bytes, {self.bytes}")


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic and memory traffic of one pass: per sample, and what each call costs whatever its size."""

    flops: float = 0.0
    bytes: float = 0.0
    bytes_per_call: float = 0.0
    kernels: int = 0

    def __post_init__(self) -> None:
        amounts = (self.flops, self.bytes, self.bytes_per_call, self.kernels)
        if not (min(amounts) >= 0 and max(amounts) < math.inf):
            raise GraphError(f"work must not be negative nor infinite, it is {self}")


@dataclass(frozen=True, slots=True)
class Operator:
    """One heavy node of the model with the cheap ones around it.

    `inputs` name tensors of other operators, `batch_keys` what it reads from the data set, `terms` the scalar
    results (loss terms, metrics, weights) that it produces. `stash` is what its forward leaves for its
    backward in bytes per sample, `weight_stash` the part of that which the weight half alone still needs.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    batch_keys: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    buffer_bytes: int = 0
    forward: Work = Work()
    backward_input: Work = Work()
    backward_weight: Work = Work()
    stash: float = 0.0
    weight_stash: float = 0.0
    batch_coupled: bool = False
    terms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        amounts = (self.stash, self.weight_stash, self.buffer_bytes)
        if not (min(amounts) >= 0 and max(amounts) < math.inf):
            raise GraphError(f"operator {self.name} has a negative number of bytes, or an infinite one")

    @property
    def has_backward(self) -> bool:
        """Whether any gradient flows through: to a trainable parameter, to an output, or from a loss to an
        input."""
        return (
            any(p.trainable for p in self.parameters)
            or any(t.needs_grad for t in self.outputs)
            or self.backward_input != Work()
        )


@dataclass(frozen=True)
class ComputationGraph:
    """Operators in a topological order; an edge is a tensor from its producer to each consumer.

    Raises GraphError for a repeated name, an input nobody produced before, or an empty graph.
    """

    operators: tuple[Operator, ...]
    loss_weighted: bool = False  # the loss is a (sum, weight) pair: the divisor is known only at run time

    def __post_init__(self) -> None:
        if not self.operators:
            raise GraphError("a computation graph needs at least one operator, it has none")
        seen: set[str] = set()
        names: set[str] = set()
        for op in self.operators:
            if op.name in names:
                raise GraphError(f"operator {op.name} appears twice; names must be unique")
            names.add(op.name)
            for name in op.inputs:
                if name not in seen:
                    raise GraphError(
                        f"operator {op.name} reads {name}, which no earlier operator produces: "
                        "the operators must be in topological order and acyclic"
                    )
            for tensor in op.outputs:
                if tensor.name in seen:
                    raise GraphError(f"tensor {tensor.name} is produced twice")
                seen.add(tensor.name)

    @cached_property
    def index(self) -> dict[str, int]:
        """Operator name to its position."""
        return {op.name: i for i, op in enumerate(self.operators)}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {t.name: t for op in self.operators for t in op.outputs}

    @cached_property
    def producer(self) -> dict[str, int]:
        """Tensor name to the position of its producer."""
        return {t.name: i for i, op in enumerate(self.operators) for t in op.outputs}

    @cached_property
    def edges(self) -> dict[tuple[int, int], tuple[Tensor, ...]]:
        """(producer, consumer) positions to the tensors between them, sorted by position."""
        found: dict[tuple[int, int], list[Tensor]] = {}
        for i, op in enumerate(self.operators):
            for name in op.inputs:
                found.setdefault((self.producer[name], i), []).append(self.tensors[name])
        return {pair: tuple(found[pair]) for pair in sorted(found)}

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Positions of each operator's direct consumers."""
        out: list[list[int]] = [[] for _ in self.operators]
        for u, v in self.edges:
            out[u].append(v)
        return tuple(tuple(vs) for vs in out)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Positions of each operator's direct producers."""
        into: list[list[int]] = [[] for _ in self.operators]
        for u, v in self.edges:
            into[v].append(u)
        return tuple(tuple(us) for us in into)

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """For each operator the bit set of the positions it depends on."""
        return ancestor_masks(self.predecessors)

    def is_convex(self, positions: Iterable[int]) -> bool:
        """Whether no path leaves the set and comes back (GraphPipe §3, C1)."""
        inside = 0
        for i in positions:
            inside |= 1 << i
        outside_after = 0  # operators outside the set that depend on it
        for i, mask in enumerate(self.ancestors):
            if inside >> i & 1:
                if mask & outside_after:
                    return False
            elif mask & inside:
                outside_after |= 1 << i
        return True

    def fingerprint(self) -> str:
        """A digest of everything in the graph; a plan made for another graph is refused by it."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(graph_to_json(self).encode()).hexdigest()[:16]


def ancestor_masks(predecessors: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """For each node, in a topological order, the bit set of the nodes that it depends on."""
    masks: list[int] = []
    for us in predecessors:
        mask = 0
        for u in us:
            mask |= masks[u] | (1 << u)
        masks.append(mask)
    return tuple(masks)


def graph_to_json(graph: ComputationGraph) -> str:
    """The graph as JSON, keys sorted, the same text for the same graph."""
    return to_json(graph, FORMAT)


def graph_from_json(text: str) -> ComputationGraph:
    """Read `graph_to_json`'s text back. Raises GraphError naming what is malformed."""
    try:
        return from_json(ComputationGraph, text, FORMAT)
    except RecordError as error:
        raise GraphError(f"not a computation graph: {error}") from None
