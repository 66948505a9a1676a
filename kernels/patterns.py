"""The patterns of ATen nodes that operators of this package can take the place of.

    layer_norm or rms_norm over the last dimension         -> gpp_kernels.layer_norm, rms_norm
    linear whose only reader is relu, gelu or silu         -> gpp_kernels.linear with that activation
    cross_entropy_loss of [samples, classes] or [classes]  -> gpp_kernels.cross_entropy
    mse_loss                                               -> gpp_kernels.mse_loss
    binary_cross_entropy_with_logits without weights       -> gpp_kernels.binary_cross_entropy_with_logits

A product without an activation stays with torch: its library's is faster and there is nothing to fuse.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .cross_entropy import check_forward as check_cross_entropy
from .cross_entropy import cross_entropy
from .layer_norm import check_forward as check_layer_norm
from .layer_norm import layer_norm
from .linear import check_forward as check_linear
from .linear import linear
from .pointwise_loss import binary_cross_entropy_with_logits, mse_loss
from .pointwise_loss import check_forward as check_pointwise_loss
from .reduction import REDUCTIONS
from .rms_norm import check_forward as check_rms_norm
from .rms_norm import rms_norm
from .rows import statistics_dtype

aten = torch.ops.aten


class LeftAlone(Exception):
    """Why a node does not fit its pattern."""


@dataclass(frozen=True, slots=True)
class Match:
    """A chain of nodes, of which the first alone reads from outside, and the call that can replace it.

    `check` raises TypeError or ValueError for arguments that the operator refuses.
    """

    nodes: tuple[fx.Node, ...]
    operator: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    check: Callable[..., None]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an ATen operator by name, with the schema's defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def _layer_norm(node: fx.Node) -> Match:
    given = arguments(node)
    _last_dimension_alone(given)
    taken = tuple(given[key] for key in ("input", "weight", "bias", "eps"))
    return Match((node,), layer_norm, taken, check_layer_norm)


def _rms_norm(node: fx.Node) -> Match:
    given = arguments(node)
    _last_dimension_alone(given)
    eps = given["eps"]
    if eps is None:  # torch's default: the unit in the last place of what it computes in
        eps = torch.finfo(statistics_dtype(_made(node))).eps
    return Match((node,), rms_norm, (given["input"], given["weight"], eps), check_rms_norm)


def _last_dimension_alone(given: dict[str, Any]) -> None:
    if len(given["normalized_shape"]) != 1:
        raise LeftAlone(f"it normalises {len(given['normalized_shape'])} dimensions, the operator one")


def _linear(node: fx.Node) -> Match:
    given = arguments(node)
    readers = list(node.users)
    if len(readers) != 1:
        raise LeftAlone(f"{len(readers)} nodes read its output, an activation must be the only one")
    activation = _activation(readers[0])
    if activation is None:
        raise LeftAlone(f"no activation follows but {readers[0].name}: a plain product stays with torch")
    taken = (given["input"], given["weight"], given["bias"], activation)
    return Match((node, readers[0]), linear, taken, check_linear)


def _activation(node: fx.Node) -> str | None:
    """The operator's name for an activation; in-place ones count, nothing else reads what they overwrite."""
    if node.target in (aten.relu.default, aten.relu_.default):
        return "relu"
    if node.target in (aten.silu.default, aten.silu_.default):
        return "silu"
    if node.target in (aten.gelu.default, aten.gelu_.default):
        return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu_erf"
    return None


def _cross_entropy(node: fx.Node) -> Match:
    given = arguments(node)
    _no_weights(given, "weight")
    logits = _made(given["self"])
    _made(given["target"])  # torch takes probabilities too, so its dtype must be known
    if logits.dim() > 2:
        raise LeftAlone(f"its classes are dimension 1 of {logits.dim()}, the operator takes the last")
    reduction, smoothing = REDUCTIONS[given["reduction"]], given["label_smoothing"]
    taken = (given["self"], given["target"], reduction, given["ignore_index"], smoothing)
    return Match((node,), cross_entropy, taken, check_cross_entropy)


def _pointwise(operator: torch._ops.OpOverload, node: fx.Node) -> Match:
    given = arguments(node)
    _no_weights(given, "weight", "pos_weight")
    for key in ("self", "target"):
        _made(given[key])  # torch would stretch one to the other, so both shapes must be known
    taken = (given["self"], given["target"], REDUCTIONS[given["reduction"]])
    name = operator._schema.name.partition("::")[2]
    return Match((node,), operator, taken, partial(check_pointwise_loss, name))


def _no_weights(given: dict[str, Any], *names: str) -> None:
    for name in names:
        if given.get(name) is not None:
            raise LeftAlone(f"it has a {name}, the operator none")


def _made(node: fx.Node) -> Tensor:
    """The example value of what a node makes."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise LeftAlone(f"the shape and dtype of {node.name} are not known")
    return value


PATTERNS: Mapping[Any, Callable[[fx.Node], Match]] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.linear.default: _linear,
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.mse_loss.default: partial(_pointwise, mse_loss),
    aten.binary_cross_entropy_with_logits.default: partial(_pointwise, binary_cross_entropy_with_logits),
}
