"""The scalar tail of a model: `a + 0.3 b` as a linear combination of terms.

Each term becomes a sink of its own with a root weight, so a model with several heads does not collapse into
one last stage; rank 0 combines the values.
"""

from dataclasses import dataclass

import torch
from torch import fx

from gpp.program.stage import TermSum

from .export import CaptureError, Exported

_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar)
_SUB = (torch.ops.aten.sub.Tensor, torch.ops.aten.sub.Scalar, torch.ops.aten.rsub.Scalar)
_MUL = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)
_DIV = (torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar)


@dataclass(frozen=True)
class Tails:
    """The loss and the metrics as sums of terms; `nodes` are the tail's own calls, computed by no stage.

    `roots` gives each loss term's coefficient: the seed of its gradient.
    """

    loss: TermSum
    metrics: tuple[TermSum, ...]
    ignored: tuple[str, ...]
    terms: frozenset[str]
    roots: dict[str, float]
    nodes: frozenset[str]


@dataclass
class _Combination:
    terms: dict[str, float]
    constant: float

    def scaled(self, factor: float) -> "_Combination":
        return _Combination({k: v * factor for k, v in self.terms.items()}, self.constant * factor)

    def plus(self, other: "_Combination") -> "_Combination":
        terms = dict(self.terms)
        for key, value in other.terms.items():
            terms[key] = terms.get(key, 0.0) + value
        return _Combination(terms, self.constant + other.constant)


def split_tails(exported: Exported) -> Tails:
    """Split every result of the model into terms. Raises CaptureError for a pair with a constant."""
    inner: set[str] = set()
    loss = _term_sum("loss", *exported.loss, inner)
    metrics = tuple(_term_sum(name, *pair, inner) for name, pair in exported.metrics.items())
    terms = {
        name
        for result in (loss, *metrics)
        for part in (result.terms, result.weight or ())
        for name, _ in part
    }
    ignored = tuple(node.name for node in exported.ignored.values())
    # A node can be the inside of one tail and be read by an operator too: then it is a term.
    outside = {
        node.name
        for node in exported.module.graph.nodes
        if node.name in inner and any(u.name not in inner and u.op != "output" for u in node.users)
    }
    if outside:
        raise CaptureError(
            f"the scalar {sorted(outside)[0]} is part of the loss and is also used inside the model: "
            "return it by a metric or detach it before use"
        )
    known = frozenset({*terms, *ignored})
    return Tails(loss, metrics, ignored, known, dict(loss.terms), frozenset(inner - terms))


def _term_sum(name: str, total: fx.Node, weight: fx.Node | None, inner: set[str]) -> TermSum:
    combined = _combination(total, inner)
    if weight is None:
        return TermSum(name, tuple(combined.terms.items()), combined.constant, None)
    divisor = _combination(weight, inner)
    if combined.constant or divisor.constant:
        raise CaptureError(
            f"the (sum, weight) pair of {name} adds a constant, which would be counted once a micro-batch: "
            "add it to each sample's value instead"
        )
    return TermSum(name, tuple(combined.terms.items()), 0.0, tuple(divisor.terms.items()))


def _combination(node: object, inner: set[str]) -> _Combination:
    """`node` as a linear combination; what is not linear is a term."""
    if isinstance(node, int | float):
        return _Combination({}, float(node))
    assert isinstance(node, fx.Node)
    found = _linear(node, inner)
    if found is None:
        return _Combination({node.name: 1.0}, 0.0)
    inner.add(node.name)
    return found


def _linear(node: fx.Node, inner: set[str]) -> _Combination | None:
    if node.op != "call_function":
        return None
    if node.target is torch.ops.aten.neg.default:
        return _combination(node.args[0], inner).scaled(-1.0)
    if node.target in (*_ADD, *_SUB):
        a, b = node.args[0], node.args[1]
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not _scalars(a, b) or not isinstance(alpha, int | float):
            return None
        sign = alpha if node.target in _ADD else -alpha
        left, right = _combination(a, inner), _combination(b, inner)
        if node.target is torch.ops.aten.rsub.Scalar:
            return right.plus(left.scaled(sign))
        return left.plus(right.scaled(sign))
    if node.target in (*_MUL, *_DIV) and len(node.args) == 2:
        a, b = node.args
        if isinstance(b, int | float) and _scalars(a) and (b != 0 or node.target in _MUL):
            return _combination(a, inner).scaled(float(b) if node.target in _MUL else 1.0 / b)
        if isinstance(a, int | float) and _scalars(b) and node.target in _MUL:
            return _combination(b, inner).scaled(float(a))
    return None


def _scalars(*values: object) -> bool:
    return all(
        isinstance(v, int | float)
        or (
            isinstance(v, fx.Node)
            and isinstance(v.meta.get("val"), torch.Tensor)
            and v.meta["val"].dim() == 0
        )
        for v in values
    )
