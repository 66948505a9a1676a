"""Normalisations over the last dimension.

layer_norm, rms_norm -> gpp_kernels.layer_norm, rms_norm
"""

from collections.abc import Mapping
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


def _layer_norm(node: fx.Node) -> Match:
    given = arguments(node)
    _last_dimension_alone(given)
    taken = tuple(given[key] for key in ("input", "weight", "bias", "eps"))
    return Match((node,), layer_norm, taken, check_layer_norm, (node,))


def _rms_norm(node: fx.Node) -> Match:
    given = arguments(node)
    _last_dimension_alone(given)
    eps = given["eps"]
    if eps is None:  # torch's default: the unit in the last place of what it computes in
        eps = torch.finfo(statistics_dtype(made(node))).eps
    return Match((node,), rms_norm, (given["input"], given["weight"], eps), check_rms_norm, (node,))


def _last_dimension_alone(given: dict[str, Any]) -> None:
    if len(given["normalized_shape"]) != 1:
        raise LeftAlone(f"it normalises {len(given['normalized_shape'])} dimensions, the operator one")


NORMS: Mapping[Any, Pattern] = {aten.layer_norm.default: _layer_norm, aten.rms_norm.default: _rms_norm}
