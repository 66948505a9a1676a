"""A stage's part of a traced graph at one size, as a plain graph of its own.

Sizes become numbers, tables are recomputed inside, other stages' values become inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .attribution import OWNER, owner
from .stage import ValueSpec
from .traced import POSITION, TracedMode, symbol


class ProgramError(ValueError):
    """A stage that cannot be cut out of the model."""


@dataclass(frozen=True)
class Interface:
    """What a set of operators reads and gives, in graph order (parameters and buffers by full name)."""

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    inputs: tuple[str, ...]
    batch_keys: tuple[str, ...]
    outputs: tuple[str, ...]
    terms: tuple[str, ...]
    predictions: tuple[str, ...] = ()


def interface(mode: TracedMode, operators: Iterable[str]) -> Interface:
    """The interface of a stage with these operators."""
    chosen = frozenset(operators)
    own, needed = _needed(mode, chosen)
    parameters: dict[str, None] = {}
    buffers: dict[str, None] = {}
    inputs: dict[str, None] = {}
    keys: dict[str, None] = {}
    outputs: dict[str, None] = {}
    for node in mode.graph.nodes:
        if node.name in needed:
            if node.name in mode.parameters:
                parameters[mode.parameters[node.name]] = None
            elif node.name in mode.buffers:
                buffers[mode.buffers[node.name]] = None
            elif node.name in mode.batch_keys:
                keys[mode.batch_keys[node.name]] = None
            elif node.name in mode.operator_of and node.name not in own:
                inputs[node.name] = None
        readers = {mode.operator_of[u.name] for u in node.users if u.name in mode.operator_of}
        if mode.operator_of.get(node.name) in chosen and not readers <= chosen:
            outputs[node.name] = None
    terms = tuple(name for name, node in mode.terms.items() if node in own)
    wanted = tuple(name for name, node in mode.predictions.items() if node in own)
    return Interface(
        tuple(parameters), tuple(buffers), tuple(inputs), tuple(keys), tuple(outputs), terms, wanted
    )


def _needed(mode: TracedMode, chosen: frozenset[str]) -> tuple[set[str], set[str]]:
    """The stage's own calls, and these with everything they read directly or through tables."""
    own = {name for name, op in mode.operator_of.items() if op in chosen}
    own |= {name for name, op in mode.attached.items() if op in chosen}
    needed = set(own)
    for node in reversed(list(mode.graph.nodes)):
        if node.name in needed and (node.name in own or node.name not in mode.operator_of):
            if not _is_number(node):
                needed |= {used.name for used in node.all_input_nodes}
    return own, needed


def _is_number(node: fx.Node) -> bool:
    return isinstance(
        node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool
    )


def value_spec(mode: TracedMode, name: str) -> ValueSpec:
    """Shape, dtype and gradient of a value that crosses stages."""
    value = mode.nodes[name].meta["val"]
    return ValueSpec(name, tuple(int(s) for s in value.shape[1:]), value.dtype, name in mode.needs_grad)


def carve(
    mode: TracedMode,
    operators: Iterable[str],
    size: int,
    parameters: Sequence[str],
    buffers: Sequence[str],
    *,
    device: torch.device,
) -> fx.GraphModule:
    """The forward graph of a stage for `size` samples.

    Arguments: parameters, buffers (in the orders given), inputs, batch keys, position; returns outputs, then
    terms and predictions, in the orders of `interface`.
    """
    chosen = frozenset(operators)
    face = interface(mode, chosen)
    needed = _needed(mode, chosen)[1]
    nodes = mode.nodes
    by_parameter = {full: name for name, full in mode.parameters.items() if name in needed}
    by_buffer = {full: name for name, full in mode.buffers.items() if name in needed}
    by_key = {key: name for name, key in mode.batch_keys.items()}
    root = torch.nn.Module()
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}

    def placeholder(label: str, source: str | None) -> None:
        node = graph.placeholder(label)
        if source is not None:
            made[nodes[source]] = node
            if "val" in nodes[source].meta:  # what a rewrite of the graph may have to know
                node.meta["val"] = nodes[source].meta["val"]

    for i, name in enumerate(parameters):
        placeholder(f"parameter_{i}", by_parameter.get(name))
    for i, name in enumerate(buffers):
        placeholder(f"buffer_{i}", by_buffer.get(name))
    for name in face.inputs:
        placeholder(name, name)
    for key in face.batch_keys:
        placeholder(f"key_{by_key[key]}", by_key[key])
    placeholder("position", POSITION)

    for node in mode.graph.nodes:
        if node in made or node.name not in needed or node.op == "output":
            continue
        if node.name in mode.constants:
            root.register_buffer(node.name, mode.constants[node.name].to(device))
            made[node] = graph.get_attr(node.name)
        elif node.op == "get_attr":
            setattr(root, str(node.target), getattr(mode.module, str(node.target)))
            made[node] = graph.get_attr(str(node.target))
        elif _is_number(node):
            made[node] = _number(node, mode, size)
        elif node.op == "call_function":
            made[node] = graph.node_copy(node, lambda n: _argument(n, made))
            operator = mode.operator_of.get(node.name, mode.attached.get(node.name))
            if operator is not None:
                made[node].meta[OWNER] = owner(node, operator)
    results = (
        *face.outputs,
        *(mode.terms[t] for t in face.terms),
        *(mode.predictions[p] for p in face.predictions),
    )
    graph.output(tuple(made[nodes[n]] for n in results))
    module = fx.GraphModule(root, move_factories(graph, device))
    module.recompile()
    return module


def _argument(node: fx.Node, made: Mapping[fx.Node, Any]) -> Any:
    if node not in made:
        raise ProgramError(f"{node.name} is read by a stage that cannot reach it")
    return made[node]


def _number(node: fx.Node, mode: TracedMode, size: int) -> Any:
    """A size at this number of samples."""
    value = node.meta["val"]
    expression = symbol(value)
    if expression is None:
        return value
    known = expression.subs({s: size for s in expression.free_symbols})
    if isinstance(value, torch.SymBool):
        return bool(known)
    return int(known) if isinstance(value, torch.SymInt) else float(known)


def move_factories(graph: fx.Graph, device: torch.device) -> fx.Graph:
    """Point every device that calls of the graph name (zeros, arange, to) at `device`."""

    def moved(item: Any) -> Any:
        return device if isinstance(item, torch.device) else item

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    return graph


def example_inputs(mode: TracedMode, face: Interface, size: int, device: torch.device) -> list[Tensor]:
    """Empty inputs, batch keys and position of the right shapes."""
    nodes = mode.nodes
    by_key = {key: name for name, key in mode.batch_keys.items()}
    values = [nodes[n].meta["val"] for n in (*face.inputs, *(by_key[k] for k in face.batch_keys))]
    made = [torch.empty((size, *(int(s) for s in v.shape[1:])), dtype=v.dtype, device=device) for v in values]
    return [*made, torch.zeros(2, dtype=torch.int64, device=device)]
