"""Normalisations over the last dimension.

layer_norm, rms_norm -> gpp_kernels.layer_norm, rms_norm
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..layer_norm import check_forward as check_layer_norm
from ..layer_norm import layer_norm
from ..rms_norm import check_forward as check_rms_norm
from ..rms_norm import rms_norm
from ..rows import statistics_dtype
from .match import LeftAlone, Match, Pattern, arguments, made

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Norm:
    """What a norm over the last dimension is given; RMS norm is not centred and has no bias."""

    input: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    centred: bool


def norm_arguments(node: fx.Node) -> Norm:
    """The arguments of a norm; LeftAlone if it takes more than the last dimension."""
    given = arguments(node)
    if len(given["normalized_shape"]) != 1:
        raise LeftAlone(f"it normalises {len(given['normalized_shape'])} dimensions, the operator one")
    eps = given["eps"]
    if eps is None:  # torch's default: the unit in the last place of what it computes in
        eps = torch.finfo(statistics_dtype(made(node))).eps
    centred = node.target is aten.layer_norm.default
    return Norm(given["input"], given["weight"], given.get("bias"), eps, centred)


def _layer_norm(node: fx.Node) -> Match:
    norm = norm_arguments(node)
    taken = (norm.input, norm.weight, norm.bias, norm.eps)
    return Match((node,), layer_norm, taken, check_layer_norm, (node,))


def _rms_norm(node: fx.Node) -> Match:
    norm = norm_arguments(node)
    return Match((node,), rms_norm, (norm.input, norm.weight, norm.eps), check_rms_norm, (node,))


NORMS: Mapping[Any, Pattern] = {aten.layer_norm.default: _layer_norm, aten.rms_norm.default: _rms_norm}
