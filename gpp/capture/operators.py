"""The captured model as a ComputationGraph: operators with their costs, tensors between them.

FLOPs, bytes moved and the stash of forward are measured on fake tensors; a backward half is charged what its
forward cost: a product of activations and weights has one product in either half, a product of two
activations two in the input half, everything else its traffic once more in the input half. A table that rows
are looked up in gets a dense gradient: zeros of its size, to which the rows' gradients are added. The weight
half also adds each parameter's gradient to the sum over micro-batches.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from gpp.graph import DTYPE_BYTES, ComputationGraph, Operator, Parameter, Work
from gpp.graph import Tensor as Value
from gpp.program.autocast import is_cast

from .dependence import Dependence, Dependences
from .export import EXAMPLES, Exported
from .grouping import Grouping, base_name
from .measure import NodeCost
from .tail import Tails

_DTYPE = {getattr(torch, name): name for name in DTYPE_BYTES}


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype's name in records."""
    return _DTYPE[dtype]


def boundary(exported: Exported, grouping: Grouping) -> dict[str, list[fx.Node]]:
    """Operator to those of its nodes that other operators read, in graph order."""
    out: dict[str, list[fx.Node]] = {name: [] for name in grouping.names}
    for node in exported.module.graph.nodes:
        owner = grouping.operator_of.get(node.name)
        if owner is not None and any(grouping.operator_of.get(u.name, owner) != owner for u in node.users):
            out[owner].append(node)
    return out


def inherited(exported: Exported, facts: Dependences) -> dict[str, set[str]]:
    """For each node the state placeholders that it reads itself or through tables."""
    reach: dict[str, set[str]] = {}
    for node in exported.module.graph.nodes:
        found: set[str] = set()
        for used in node.all_input_nodes:
            kind = facts.kind[used.name]
            if kind is Dependence.STATE:
                found.add(used.name)
            elif kind in (Dependence.TABLE, Dependence.SIZE):
                found |= reach[used.name]
        reach[node.name] = found
    return reach


def build_graph(
    exported: Exported,
    facts: Dependences,
    tails: Tails,
    grouping: Grouping,
    costs: Mapping[str, NodeCost],
    trainable: Mapping[str, bool],
    sizes: Mapping[str, int],
) -> ComputationGraph:
    """Assemble the graph; `sizes` gives the bytes of parameters and buffers by full name."""
    members: dict[str, list[fx.Node]] = {name: [] for name in grouping.names}
    for node in exported.module.graph.nodes:
        owner = grouping.operator_of.get(node.name) or grouping.attached.get(node.name)
        if owner is not None:
            members[owner].append(node)
    crossing = boundary(exported, grouping)
    reach = inherited(exported, facts)
    placeholders = {n.name: n.meta.get("val") for n in exported.module.graph.nodes if n.op == "placeholder"}
    return ComputationGraph(
        operators=tuple(
            _operator(
                name,
                members[name],
                crossing[name],
                exported,
                facts,
                tails,
                grouping,
                costs,
                trainable,
                sizes,
                reach,
                placeholders,
            )
            for name in grouping.names
        ),
        loss_weighted=tails.loss.weight is not None,
    )


def _operator(
    name: str,
    members: list[fx.Node],
    crossing: list[fx.Node],
    exported: Exported,
    facts: Dependences,
    tails: Tails,
    grouping: Grouping,
    costs: Mapping[str, NodeCost],
    trainable: Mapping[str, bool],
    sizes: Mapping[str, int],
    reach: Mapping[str, set[str]],
    placeholders: Mapping[str, object],
) -> Operator:
    state = {s for node in members for s in reach[node.name]}
    parameters = sorted({exported.parameters[s] for s in state if s in exported.parameters})
    buffers = {exported.buffers[s] for s in state if s in exported.buffers}
    inside = {n.name for n in members}
    inputs = {
        used.name: None
        for node in members
        for used in node.all_input_nodes
        if facts.kind[used.name] is Dependence.SAMPLES and used.name not in inside
    }
    keys = {
        exported.batch_keys[used.name]: None
        for node in members
        for used in node.all_input_nodes
        if used.name in exported.batch_keys
    }
    casts = {c for node in members for c in _weights_of(node, exported)}
    forward, back_input, back_weight = _works(members, exported, facts, costs, trainable, reach, placeholders)
    saved = {k: v for node in members for k, v in costs[node.name].saved.items()}
    weight_stash = sum(
        _bytes(used, costs) + _bytes(node, costs)
        for node in members
        if _learns(node, exported, trainable, reach)
        for used in _data(node, facts)[:1]
    )
    return Operator(
        name=name,
        kind=grouping.kinds[name],
        inputs=tuple(inputs),
        outputs=tuple(_value(n, costs) for n in crossing),
        batch_keys=tuple(keys),
        parameters=tuple(Parameter(p, sizes[p], trainable[p]) for p in parameters),
        buffer_bytes=sum(sizes[b] for b in buffers) + int(sum(_bytes(c, costs) for c in casts)),
        forward=forward,
        backward_input=back_input,
        backward_weight=back_weight,
        stash=sum(saved.values()) / EXAMPLES,
        weight_stash=weight_stash / EXAMPLES,
        batch_coupled=any(n.name in facts.coupled for n in members),
        terms=tuple(n.name for n in members if n.name in tails.terms),
    )


def _value(node: fx.Node, costs: Mapping[str, NodeCost]) -> Value:
    cost = costs[node.name]
    assert cost.shape is not None and cost.dtype is not None
    return Value(node.name, cost.shape[1:], dtype_name(cost.dtype), cost.requires_grad)


def _bytes(node: fx.Node, costs: Mapping[str, NodeCost]) -> float:
    cost = costs[node.name]
    if cost.shape is None or cost.dtype is None:
        return 0.0
    return float(math.prod(cost.shape) * cost.dtype.itemsize)


def _data(node: fx.Node, facts: Dependences) -> list[fx.Node]:
    """What a node reads of the batch: a linear layer its input, a lookup its row numbers."""
    kinds = (Dependence.SAMPLES, Dependence.KEY)
    return [used for used in node.all_input_nodes if facts.kind[used.name] in kinds]


def _learns(
    node: fx.Node, exported: Exported, trainable: Mapping[str, bool], reach: Mapping[str, set[str]]
) -> bool:
    return any(_is_learnt(s, exported, trainable) for s in reach[node.name])


def _is_learnt(state: str, exported: Exported, trainable: Mapping[str, bool]) -> bool:
    return state in exported.parameters and trainable[exported.parameters[state]]


def _state_bytes(names: Iterable[str], state: Mapping[str, object]) -> float:
    values = (state.get(name) for name in names)
    return float(sum(math.prod(v.shape) * v.dtype.itemsize for v in values if isinstance(v, Tensor)))


def _works(
    members: list[fx.Node],
    exported: Exported,
    facts: Dependences,
    costs: Mapping[str, NodeCost],
    trainable: Mapping[str, bool],
    reach: Mapping[str, set[str]],
    state: Mapping[str, object],
) -> tuple[Work, Work, Work]:
    """Work of forward, input half and weight half, per sample and per call."""
    totals = [[0.0, 0.0, 0.0, 0.0] for _ in range(3)]
    learnt: set[str] = set()

    def add(half: int, factor: float, cost: NodeCost, fixed: float) -> None:
        total = totals[half]
        total[0] += factor * cost.flops
        total[1] += factor * max(cost.bytes - fixed, 0.0)
        total[2] += factor * fixed
        total[3] += factor * cost.kernels

    for node in members:
        cost = costs[node.name]
        casts = _weights_of(node, exported)
        read = reach[node.name] - {s for cast in casts for s in reach[cast.name]}
        fixed = _state_bytes(read, state) + sum(_bytes(cast, costs) for cast in casts)
        fixed = 0.0 if cost.rows else fixed
        add(0, 1.0, cost, fixed)
        for used in node.all_input_nodes:  # tables are recomputed where they are read
            if facts.kind[used.name] is Dependence.TABLE and used not in casts:
                table = costs[used.name]
                add(0, 1.0, _copied(table) if is_cast(used) else table, table.bytes if is_cast(used) else 0.0)
        if not cost.requires_grad:
            continue
        learns = _learns(node, exported, trainable, reach)
        learnt |= {s for s in reach[node.name] if _is_learnt(s, exported, trainable)}
        flowing = [u for u in node.all_input_nodes if u.op == "call_function" and costs[u.name].requires_grad]
        heavy = cost.flops > 4 * cost.bytes / 4 and base_name(node) != "embedding"
        if flowing:
            add(1, 2.0 if heavy and not learns else 1.0, cost, fixed)
        if learns and cost.rows:  # reads the gradients, reads and writes the rows; the zeros come on top
            scattered = NodeCost(cost.flops, cost.bytes + cost.rows, cost.kernels + 1)
            add(2, 1.0, scattered, 0.0)
            totals[2][2] += _state_bytes(reach[node.name], state)
        elif learns:
            add(2, 1.0, cost, fixed)
            for cast in casts:  # their gradients back to the parameters' own type
                add(2, 1.0, _copied(costs[cast.name]), costs[cast.name].bytes)
    totals[2][2] += 3 * _state_bytes(learnt, state)  # gradient and sum are read, the sum is written
    totals[2][3] += len(learnt)
    return (
        Work(*_per_sample(totals[0])),
        Work(*_per_sample(totals[1])),
        Work(*_per_sample(totals[2])),
    )


def _weights_of(node: fx.Node, exported: Exported) -> list[fx.Node]:
    """The parameters that a node reads in lower precision. They are made once a step, and kept."""
    parameters = exported.parameters
    return [u for u in node.all_input_nodes if is_cast(u) and u.all_input_nodes[0].name in parameters]


def _copied(cost: NodeCost) -> NodeCost:
    """A cast of a parameter: traffic, and nothing that grows with the samples."""
    return NodeCost(bytes=cost.bytes, kernels=cost.kernels)


def _per_sample(total: list[float]) -> tuple[float, float, float, int]:
    return total[0] / EXAMPLES, total[1] / EXAMPLES, total[2], math.ceil(total[3])
