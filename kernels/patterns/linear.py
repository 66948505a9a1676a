"""Linear layers.

    linear whose only reader is relu, gelu or silu -> gpp_kernels.linear with that activation

A product without an activation stays with torch: its library's is faster and there is nothing to fuse.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..linear import check_forward as check_linear
from ..linear import linear
from .match import LeftAlone, Match, Pattern, arguments

aten = torch.ops.aten


def _linear(node: fx.Node) -> Match:
    given = arguments(node)
    readers = list(node.users)
    if len(readers) != 1:
        raise LeftAlone(f"{len(readers)} nodes read its output, an activation must be the only one")
    activation = activation_of(readers[0])
    if activation is None:
        raise LeftAlone(f"no activation follows but {readers[0].name}: a plain product stays with torch")
    taken = (given["input"], given["weight"], given["bias"], activation)
    return Match((node, readers[0]), linear, taken, check_linear, (readers[0],))


def activation_of(node: fx.Node) -> str | None:
    """The operator's name for an activation; in-place ones count, nothing else reads what they overwrite."""
    if node.target in (aten.relu.default, aten.relu_.default):
        return "relu"
    if node.target in (aten.silu.default, aten.silu_.default):
        return "silu"
    if node.target in (aten.gelu.default, aten.gelu_.default):
        return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu_erf"
    return None


LINEAR: Mapping[Any, Pattern] = {aten.linear.default: _linear}
