"""Where values that are not finite come from, in one graph: run node by node, with a look at each tensor.

Infinite values may be meant (a mask of -inf before a softmax), so none is an error in itself. A tensor that
is not finite has a mark with its sources: what it was computed from, back to where all was still finite. Who
finds the loss or a gradient not finite follows its mark.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from gpp.schedule.task import Samples

from .attribution import owner_of

AT_MOST = 8  # sources of a mark: more would tell nobody more
_UNWRITTEN = ("aten.empty", "aten.new_empty")  # whatever was in the memory


@dataclass(frozen=True, slots=True)
class Place:
    """A pass: forward or backward of a stage on some samples, and the rank that ran it."""

    rank: int
    stage: int
    samples: Samples
    backward: bool


@dataclass(frozen=True, slots=True)
class Given:
    """It was there before: in a "key" of the batch (`samples` are those that are not finite), a "parameter",
    a "buffer" or a "constant" of the model."""

    place: Place
    what: str
    name: str
    samples: Samples
    nan: bool


@dataclass(frozen=True, slots=True)
class Passed:
    """Another stage has sent it: the value of that name, or its gradient."""

    gradient: bool
    name: str
    samples: Samples


@dataclass(frozen=True, slots=True)
class Made:
    """A node made it: not a number or infinite (`nan`), from finite values or of what is infinite in `of`.
    `order` is the node's place in its graph, `owner` where in the model it comes from; `meant`: the model
    itself says infinity there."""

    place: Place
    order: int
    owner: str
    target: str
    nan: bool
    meant: bool
    of: "tuple[Source, ...]" = ()


Source = Given | Passed | Made
Label = Callable[[int, Tensor, bool], tuple[Source, ...]]  # of an argument by its position; is any a NaN?


@dataclass(frozen=True, slots=True)
class Mark:
    """Of a tensor that is not finite: whether any of it is not a number, and where that comes from."""

    nan: bool
    sources: tuple[Source, ...]


Marks = Mark | tuple[Mark | None, ...] | None  # of a node's result


class Inspector(fx.Interpreter):
    """Runs a graph, and marks what is not finite. `label` says where an argument comes from that is not."""

    def __init__(self, module: fx.GraphModule, place: Place, label: Label) -> None:
        super().__init__(module)
        self._place = place
        self._label = label
        self._marks: dict[fx.Node, Marks] = {}
        self._orders = {node: order for order, node in enumerate(module.graph.nodes)}
        self._returned: list[Marks] = []

    def inspect(self, arguments: Sequence[Tensor]) -> tuple[Sequence[Any], list[Mark | None]]:
        """The graph's results, and their marks."""
        self._marks.clear()
        results: Sequence[Any] = self.run(*arguments, enable_io_processing=False)
        return results, [mark if isinstance(mark, Mark) else None for mark in self._returned]

    def arguments(self) -> list[Mark | None]:
        """The marks of the graph's arguments, as it has left them."""
        marks = [self._marks.get(node) for node in self.graph.nodes if node.op == "placeholder"]
        return [mark if isinstance(mark, Mark) else None for mark in marks]

    def run_node(self, n: fx.Node) -> Any:
        """The node's result."""
        if n.op == "output":
            returned: Any = n.args[0]
            self._returned = [None if node is None else self._marks.get(node) for node in returned]
            return super().run_node(n)
        if n.op != "call_function":
            value = super().run_node(n)
            if (nan := not_a_number(value)) is not None:
                self._marks[n] = self._handed_in(n, value, nan)
            return value
        if n.target is operator.getitem:
            source: Any = n.args[0]
            marks = self._marks.get(source)
            index: Any = n.args[1]
            self._marks[n] = marks[index] if isinstance(marks, tuple) else None
            return super().run_node(n)
        inputs = list(self._inputs(n))
        value = super().run_node(n)
        written = [inputs[i][0] for i in _written(n)] if isinstance(n.target, torch._ops.OpOverload) else []
        pointwise = not written and torch.Tag.pointwise in getattr(n.target, "tags", ())
        if not str(n.target).startswith(_UNWRITTEN):
            marks_of = [self._mark(n, leaf, inputs, pointwise=pointwise) for leaf in _leaves(value)]
            self._marks[n] = tuple(marks_of) if isinstance(value, tuple | list) else marks_of[0]
        for changed in written:
            self._mark_all(changed, self._mark(n, changed, inputs, pointwise=False))
        return value

    def _handed_in(self, node: fx.Node, value: Tensor, nan: bool) -> Mark | None:
        if node.op == "get_attr":
            return Mark(
                nan, (Given(self._place, "constant", str(node.target), self._place.samples, nan=nan),)
            )
        sources = self._label(self._orders[node], value, nan)
        return Mark(nan, sources) if sources else None

    def _inputs(self, node: fx.Node) -> Iterator[tuple[Tensor | None, Mark | None]]:
        """The arguments of a call in order, with their marks; lists of tensors as their members."""
        for argument in tree_leaves((list(node.args), dict(node.kwargs))):
            value = self.env[argument] if isinstance(argument, fx.Node) else None
            mark = self._marks.get(argument) if isinstance(argument, fx.Node) else None
            yield value if isinstance(value, Tensor) else None, mark if isinstance(mark, Mark) else None

    def _mark(
        self,
        node: fx.Node,
        value: Any,
        inputs: Sequence[tuple[Tensor | None, Mark | None]],
        *,
        pointwise: bool,
    ) -> Mark | None:
        nan = not_a_number(value)
        if nan is None:
            return None
        marked = [(t, m) for t, m in inputs if t is not None and m is not None]
        if pointwise and _same_shape(value, [t for t, _ in marked]):
            fresh = _fresh(value, [t for t, _ in marked])
            marked = [(t, m) for t, m in marked if _meet(value, t)]
        else:
            fresh = None
        numbers = _sources(m for _, m in marked if m.nan)
        infinities = _sources(m for _, m in marked if not m.nan)
        handed_on = (numbers or infinities) if nan else (*numbers, *infinities)
        if fresh is None:
            fresh = _Fresh(not marked, nan and not numbers and bool(infinities))
        if fresh.of_finite:
            return Mark(nan, (self._made(node, nan=nan), *handed_on)[:AT_MOST])
        if fresh.of_infinite:
            # where only some elements are made here, the others come from what was not a number before
            return Mark(nan, (self._made(node, nan=True, of=infinities or handed_on), *numbers)[:AT_MOST])
        return Mark(nan, handed_on[:AT_MOST])

    def _made(self, node: fx.Node, *, nan: bool, of: tuple[Source, ...] = ()) -> Made:
        found = owner_of(node)
        scalars = tree_leaves((list(node.args), dict(node.kwargs)))
        meant = not of and any(isinstance(s, float) and not math.isfinite(s) for s in scalars)
        name = node.target if isinstance(node.target, str | torch._ops.OpOverload) else node.name
        return Made(
            self._place, self._orders[node], "" if found is None else str(found), str(name), nan, meant, of
        )

    def _mark_all(self, changed: Tensor | None, mark: Mark | None) -> None:
        """What lies in the memory of a tensor that was written to."""
        if changed is None:
            return
        start, stop = _extent(changed)
        for node, value in self.env.items():
            if (
                isinstance(value, Tensor)
                and not value.is_sparse
                and _extent(value)[0] < stop
                and start < _extent(value)[1]
            ):
                known = mark or self._marks.get(node)
                self._marks[node] = None if not_a_number(value) is None else known


def not_a_number(value: Any) -> bool | None:
    """Of a tensor that is not finite, whether any of it is not a number; None of all else."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
        return None
    if not (value.is_floating_point() or value.is_complex()):
        return None
    plain = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    if math.isfinite(float(torch.linalg.vector_norm(plain, dtype=_wide(plain.dtype)))):
        return None
    least, most = (float(bound) for bound in torch.aminmax(plain))  # the norm of finite ones may overflow
    if math.isnan(least) or math.isnan(most):
        return True
    return False if math.isinf(least) or math.isinf(most) else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _sources(marks: Iterable[Mark]) -> tuple[Source, ...]:
    return tuple(dict.fromkeys(source for mark in marks for source in mark.sources))


def _written(node: fx.Node) -> list[int]:
    """The arguments that a call writes to, among those of its schema; lists count as their members."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    found: list[int] = []
    place = 0
    for argument, given in zip(target._schema.arguments, node.args, strict=False):
        count = len(tree_leaves([given]))
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += range(place, place + count)
        place += count
    named = {a.name: a for a in target._schema.arguments}
    for name, given in node.kwargs.items():
        count, info = len(tree_leaves([given])), named[name].alias_info
        if info is not None and info.is_write:
            found += range(place, place + count)
        place += count
    return found


def _extent(value: Tensor) -> tuple[int, int]:
    """The memory that a tensor reaches over."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    start = value.data_ptr()
    return start, start + (last + 1) * value.element_size() if value.numel() else start


def _same_shape(value: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether each element of the result belongs to one of every input, as pointwise operators have it."""
    broadcast: Any = torch.broadcast_shapes
    try:
        return bool(broadcast(value.shape, *(t.shape for t in inputs)) == value.shape)
    except RuntimeError:
        return False


@dataclass(frozen=True, slots=True)
class _Fresh:
    """Whether a call has made a value that is not finite of finite ones, or one that is not a number of
    infinite ones."""

    of_finite: bool
    of_infinite: bool


def _meet(value: Tensor, tensor: Tensor) -> bool:
    """Whether an element of the result is not finite where the argument's is not."""
    return bool((~value.isfinite() & ~tensor.isfinite()).any())


def _fresh(value: Tensor, marked: Sequence[Tensor]) -> _Fresh:
    nowhere = torch.zeros_like(value, dtype=torch.bool)
    nan, infinite = nowhere, nowhere
    for tensor in marked:
        nan, infinite = nan | tensor.isnan(), infinite | tensor.isinf()
    made = (value.isnan() | value.isinf()) & ~nan & ~infinite
    changed = value.isnan() & ~nan & infinite
    return _Fresh(bool(made.any()), bool(changed.any()))
