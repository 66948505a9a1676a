"""Losses, fused with their gradient.

cross_entropy_loss of [samples, classes] or [classes]  -> gpp_kernels.cross_entropy
mse_loss                                               -> gpp_kernels.mse_loss
binary_cross_entropy_with_logits without weights       -> gpp_kernels.binary_cross_entropy_with_logits
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from ..cross_entropy import check_forward as check_cross_entropy
from ..cross_entropy import cross_entropy
from ..pointwise_loss import binary_cross_entropy_with_logits, mse_loss
from ..pointwise_loss import check_forward as check_pointwise_loss
from ..reduction import REDUCTIONS
from .match import LeftAlone, Match, Pattern, arguments, made, no_weights

aten = torch.ops.aten


def _cross_entropy(node: fx.Node) -> Match:
    given = arguments(node)
    no_weights(given, "weight")
    logits = made(given["self"])
    made(given["target"])  # torch takes probabilities too, so its dtype must be known
    if logits.dim() > 2:
        raise LeftAlone(f"its classes are dimension 1 of {logits.dim()}, the operator takes the last")
    reduction, smoothing = REDUCTIONS[given["reduction"]], given["label_smoothing"]
    taken = (given["self"], given["target"], reduction, given["ignore_index"], smoothing)
    return Match((node,), cross_entropy, taken, check_cross_entropy, (node,))


def _pointwise(operator: torch._ops.OpOverload, node: fx.Node) -> Match:
    given = arguments(node)
    no_weights(given, "weight", "pos_weight")
    for key in ("self", "target"):
        made(given[key])  # torch would stretch one to the other, so both shapes must be known
    taken = (given["self"], given["target"], REDUCTIONS[given["reduction"]])
    name = operator._schema.name.partition("::")[2]
    return Match((node,), operator, taken, partial(check_pointwise_loss, name), (node,))


LOSSES: Mapping[Any, Pattern] = {
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.mse_loss.default: partial(_pointwise, mse_loss),
    aten.binary_cross_entropy_with_logits.default: partial(_pointwise, binary_cross_entropy_with_logits),
}
