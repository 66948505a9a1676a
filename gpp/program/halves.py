"""The joint graph cut by ancestry: forward, the input half and the weight half of backward.

forward: what its results need. Input half: what the inputs' gradients need besides. Weight half: the rest.
What crosses a cut is the stash; views and constants are recomputed from their base, so the stash counts no
storage twice; parameters are handed in again, and what is cast of them is cast again.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
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
_SILENT_VIEWS = {  # their schemas do not say that they share their argument's storage
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default,
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
    updates = writers(graph)
    held = set(joint.arguments[:parameters])
    forward = _ancestors((*joint.outputs, *filter(_mutates, joint.forward_nodes)), set(), updates)
    given = {*joint.arguments, *joint.tangents}
    gradients = (*joint.input_gradients, *joint.weight_gradients)
    backward = _ancestors(gradients, set(), updates) - given
    order = {n: i for i, n in enumerate(graph.nodes)}
    forward = _with_parts(_with_early_readers(forward, backward, updates, order) - given)
    input_half = _ancestors(joint.input_gradients, forward, updates) - given
    input_half = _with_early_readers(input_half, backward - forward, updates, order)
    input_half = _with_parts(input_half - forward - given)
    weight_half = _ancestors(joint.weight_gradients, forward | input_half, updates) - given
    before_weight = _crossing(weight_half, joint.weight_gradients, held, order, updates)
    weight_half |= before_weight.repeated
    before_input = _crossing(
        input_half, (*joint.input_gradients, *before_weight.stash), held | set(joint.tangents), order, updates
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


Updates = Mapping[fx.Node, tuple[fx.Node, ...]]


def writers(graph: fx.Graph) -> Updates:
    """For every value whose storage is written to: the calls that do."""
    base: dict[fx.Node, fx.Node] = {}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        aliases = _mutates(node) or node.target is operator.getitem or _is_view(node)
        base[node] = base[first] if aliases and isinstance(first, fx.Node) else node
        if _mutates(node):
            found.setdefault(base[node], []).append(node)
    return {node: tuple(found[root]) for node, root in base.items() if root in found}


def _ancestors(roots: Iterable[fx.Node | None], stop: set[fx.Node], updates: Updates) -> set[fx.Node]:
    """The roots and what they are computed from, with the calls that write to any of it."""
    found: set[fx.Node] = set()
    queue = [r for r in roots if isinstance(r, fx.Node) and r not in stop]
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        before = (*node.all_input_nodes, *(() if node.op == "placeholder" else updates.get(node, ())))
        queue += [i for i in before if i not in stop and i not in found]
    return found


def _with_parts(members: set[fx.Node]) -> set[fx.Node]:
    """The members, and what is picked out of their tuples: so a tensor crosses a cut, never a whole tuple."""
    return members | {u for n in members for u in n.users if u.target is operator.getitem}


def _with_early_readers(
    members: set[fx.Node], others: set[fx.Node], updates: Updates, order: Mapping[fx.Node, int]
) -> set[fx.Node]:
    """The members, and those others that must read a storage before a member writes to it."""
    found = set(members)
    while True:
        early = {
            node
            for node in others - found
            if any(
                writer in found and order[writer] > order[node]
                for used in node.all_input_nodes
                for writer in updates.get(used, ())
            )
        }
        if not early:
            return found
        found |= _ancestors(early, found, updates)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@dataclass(frozen=True)
class _Crossing:
    stash: tuple[fx.Node, ...]
    repeated: set[fx.Node]


def _crossing(
    half: set[fx.Node],
    results: Iterable[fx.Node | None],
    held: set[fx.Node],
    order: dict[fx.Node, int],
    updates: Updates,
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
        if (_is_free(node) or _is_cast_of(node, held)) and (node not in updates or _is_view(node)):
            repeated.add(node)
            queue += node.all_input_nodes
        else:
            stash.add(node)
    return _Crossing(tuple(sorted(stash, key=order.__getitem__)), repeated)


def _is_free(node: fx.Node) -> bool:
    """A view, or a constant made from no tensor: repeating it costs less than keeping it."""
    if node.op == "get_attr":
        return True
    if node.target is operator.getitem:
        return all(_is_free(source) for source in node.all_input_nodes)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if _is_view(node):
        return True
    return not node.all_input_nodes and torch.Tag.nondeterministic_seeded not in node.target.tags


def _is_cast_of(node: fx.Node, held: set[fx.Node]) -> bool:
    """A parameter, or a view of one, in another data type: a copy for each micro-batch in flight would be
    dearer than the cast."""
    if node.target is not torch.ops.aten._to_copy.default:
        return False
    source = node.args[0]
    while isinstance(source, fx.Node) and _is_view(source):
        source = source.args[0]
    return source in held


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target in _SILENT_VIEWS)


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
