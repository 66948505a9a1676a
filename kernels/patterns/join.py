"""Linear layers over a concatenation.

    linear of cat(parts, -1), with its activation if one follows -> gpp_kernels.join_linear

The concatenation must have no other reader: it is not made.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..join_linear import check_forward, join_linear
from .linear import activation_of
from .match import LeftAlone, Match, Pattern, arguments, in_order, made

aten = torch.ops.aten


def _join(node: fx.Node) -> Match | None:
    if not any(_is_read_by(node, reader) for reader in node.users):
        return None
    given = arguments(node)
    parts = list(given["tensors"])
    if given["dim"] not in (-1, made(node).dim() - 1):
        raise LeftAlone(f"it joins along dimension {given['dim']}, a linear layer reads the last")
    if len(parts) < 2:
        raise LeftAlone("it joins nothing")
    readers = list(node.users)
    if len(readers) != 1:
        raise LeftAlone(f"{len(readers)} nodes read it, a linear layer must be the only one")
    (linear,) = readers
    layer = arguments(linear)
    nodes, result, activation = [node, linear], linear, None
    if len(linear.users) == 1:
        (result,) = linear.users
        activation = activation_of(result)
        nodes.append(result)
    if activation is None:
        nodes, result, activation = [node, linear], linear, "none"
    taken = (parts, layer["weight"], layer["bias"], activation)
    return Match(in_order(nodes), join_linear, taken, check_forward, (result,))


def _is_read_by(node: fx.Node, reader: fx.Node) -> bool:
    """Whether the reader is a linear layer of it."""
    if reader.target is not aten.linear.default:
        return False
    layer = arguments(reader)
    return layer["input"] is node and node not in (layer["weight"], layer["bias"])


JOINS: Mapping[Any, Pattern] = {aten.cat.default: _join}
