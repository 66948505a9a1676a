"""Weights in lower precision made once a step, not in every call.

Where a captured graph casts a parameter (autocast does), the cast becomes one more argument of the stage's
graphs: whoever keeps the parameters keeps it too and makes it anew after each update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from .autocast import is_cast
from .joint import Joint


@dataclass(frozen=True, slots=True)
class WeightCast:
    """The parameter at `position` among a stage's, in another data type."""

    position: int
    dtype: torch.dtype

    def of(self, parameters: Sequence[Tensor]) -> Tensor:
        """The cast parameter."""
        return parameters[self.position].detach().to(self.dtype)


def weight_casts(forward: fx.GraphModule, parameters: int) -> tuple[WeightCast, ...]:
    """The casts that autocast has put on the first `parameters` arguments of a forward graph."""
    placeholders = [n for n in forward.graph.nodes if n.op == "placeholder"][:parameters]
    return tuple(
        dict.fromkeys(
            WeightCast(i, user.meta["val"].dtype)
            for i, node in enumerate(placeholders)
            for user in node.users
            if is_cast(user)
        )
    )


def with_weight_casts(joint: Joint, parameters: int, casts: Sequence[WeightCast]) -> Joint:
    """The joint graph with these casts as arguments, behind the parameters. In place."""
    if not casts:
        return joint
    graph = joint.module.graph
    added: list[fx.Node] = []
    for cast in casts:
        last = added[-1] if added else joint.arguments[parameters - 1]
        with graph.inserting_after(last):
            made = graph.placeholder(f"weight_{len(added)}")
        for user in list(joint.arguments[cast.position].users):
            if user.target is torch.ops.aten._to_copy.default and dict(user.kwargs) == {"dtype": cast.dtype}:
                made.meta = dict(user.meta)
                user.replace_all_uses_with(made)
                graph.erase_node(user)
        added.append(made)
    left = set(graph.nodes)
    return replace(
        joint,
        arguments=(*joint.arguments[:parameters], *added, *joint.arguments[parameters:]),
        forward_nodes=joint.forward_nodes & left,
    )


def completed(parameters: Sequence[Tensor], count: int, casts: Sequence[WeightCast]) -> Sequence[Tensor]:
    """The parameters with their casts: as they are given, or made for this call."""
    if len(parameters) == count + len(casts):
        return parameters
    return [*parameters, *(cast.of(parameters) for cast in casts)]
