"""The joint graph cut by ancestry: forward, the input half and the weight half of backward.

forward: what its results need. Input half: what the inputs' gradients need besides. Weight half: the rest.
What crosses a cut is the stash; views and constants are recomputed from their base, so the stash counts no
storage twice, and parameters are handed in again.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _BoxedCodeGen

from .joint import Joint

_MASKED = {
    torch.ops.aten.native_layer_norm_backward.default,
    torch.ops.aten.native_group_norm_backward.default,
    torch.ops.aten.convolution_backward.default,
}


@dataclass(frozen=True)
class Halves:
    """Three graphs. Stash entries are positions-free: forward returns them after its results, in order.

    `forward(*arguments)` -> results, stash. `backward_input([*parameters, *stash, *tangents])` -> input
    gradients, weight stash. `backward_weight([*parameters, *weight stash])` -> weight gradients. The last two
    take one list and empty it. A gradient that autograd did not find is None.
    """

    forward: fx.GraphModule
    backward_input: fx.GraphModule
    backward_weight: fx.GraphModule
    results: int
    gradients: int


def cut(joint: Joint, parameters: int) -> Halves:
    """Cut; the first `parameters` arguments are handed to all three graphs and never stashed."""
    _split_masked(joint)
    graph = joint.module.graph
    held = set(joint.arguments[:parameters])
    forward = _ancestors(joint.outputs, set()) | {n for n in joint.forward_nodes if _mutates(n)}
    forward |= _ancestors(forward, set())
    forward = {n for n in forward if n.op != "placeholder"}
    input_half = _ancestors(joint.input_gradients, forward) - set(joint.arguments) - set(joint.tangents)
    weight_half = (
        _ancestors(joint.weight_gradients, forward | input_half) - set(joint.arguments) - set(joint.tangents)
    )
    order = {n: i for i, n in enumerate(graph.nodes)}
    before_weight = _crossing(weight_half, joint.weight_gradients, held, order)
    weight_half |= before_weight.repeated
    before_input = _crossing(
        input_half, (*joint.input_gradients, *before_weight.stash), held | set(joint.tangents), order
    )
    input_half |= before_input.repeated

    return Halves(
        forward=_graph(
            joint.module, list(joint.arguments), forward, (*joint.outputs, *before_input.stash), order
        ),
        backward_input=_graph(
            joint.module,
            [*joint.arguments[:parameters], *before_input.stash, *joint.tangents],
            input_half,
            (*joint.input_gradients, *before_weight.stash),
            order,
            boxed=True,
        ),
        backward_weight=_graph(
            joint.module,
            [*joint.arguments[:parameters], *before_weight.stash],
            weight_half,
            joint.weight_gradients,
            order,
            boxed=True,
        ),
        results=len(joint.outputs),
        gradients=len(joint.input_gradients),
    )


def _ancestors(roots: Iterable[fx.Node | None], stop: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [r for r in roots if isinstance(r, fx.Node) and r not in stop]
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        queue += [i for i in node.all_input_nodes if i not in stop and i not in found]
    return found


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@dataclass(frozen=True)
class _Crossing:
    stash: tuple[fx.Node, ...]
    repeated: set[fx.Node]


def _crossing(
    half: set[fx.Node], results: Iterable[fx.Node | None], held: set[fx.Node], order: dict[fx.Node, int]
) -> _Crossing:
    """What a half reads from before it: stashed, or computed again if that costs nothing."""
    stash: set[fx.Node] = set()
    repeated: set[fx.Node] = set()
    queue = [i for n in half for i in n.all_input_nodes if i not in half]
    queue += [r for r in results if isinstance(r, fx.Node) and r not in half]
    while queue:
        node = queue.pop()
        if node in held or node in stash or node in repeated or node in half:
            continue
        if _is_free(node):
            repeated.add(node)
            queue += node.all_input_nodes
        else:
            stash.add(node)
    return _Crossing(tuple(sorted(stash, key=order.__getitem__)), repeated)


def _is_free(node: fx.Node) -> bool:
    """A view, or a constant made from no tensor: repeating it costs less than keeping it."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.is_view:
        return True
    return not node.all_input_nodes and torch.Tag.nondeterministic_seeded not in node.target.tags


def _graph(
    source: fx.GraphModule,
    arguments: Sequence[fx.Node],
    members: set[fx.Node],
    results: Sequence[fx.Node | None],
    order: dict[fx.Node, int],
    *,
    boxed: bool = False,
) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    for i, node in enumerate(arguments):
        made[node] = graph.placeholder(f"a{i}")
        made[node].meta = dict(node.meta)
    for node in sorted(members, key=order.__getitem__):
        if node not in made and node.op != "placeholder":
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(None if r is None else made[r] for r in results))
    if boxed:
        graph.set_codegen(_BoxedCodeGen())
    module = fx.GraphModule(source, graph)
    module.recompile()
    return module


def _split_masked(joint: Joint) -> None:
    """Give norms and convolutions one call for dx and one for their weights, by output_mask."""
    graph = joint.module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _MASKED:
            continue
        mask = list(node.args[-1])
        if not mask[0] or not any(mask[1:]):
            continue
        with graph.inserting_after(node):
            twin = graph.node_copy(node)
        twin.args = (*node.args[:-1], [False, *mask[1:]])
        node.args = (*node.args[:-1], [True, *([False] * (len(mask) - 1))])
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] != 0:
                user.args = (twin, user.args[1])
