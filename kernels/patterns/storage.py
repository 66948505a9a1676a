"""Which values of a graph share storage, and who writes to it."""

import operator

import torch
from torch import fx

from .match import arguments, nodes_of


def storage(node: fx.Node) -> fx.Node:
    """The node that made the storage of a value: not the views of it, nor what wrote to it."""
    while node.op == "call_function" and (node.target is operator.getitem or _shares(node)):
        source = nodes_of(node.args[0])
        if not source:
            break
        node = source[0]
    return node


def written(node: fx.Node) -> set[fx.Node]:
    """The storages that a call writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return set()
    given = arguments(node)
    return {
        storage(value)
        for argument in node.target._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in nodes_of(given[argument.name])
    }


def _shares(node: fx.Node) -> bool:
    """Whether a call returns its first argument, or a part of it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)
