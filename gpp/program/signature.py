"""What a set of operators computes, as a digest: the same work has the same digest in any model."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .build import Roots
from .carve import carve, example_inputs, interface, value_spec
from .traced import TracedModel

_META = torch.device("meta")


def signature(traced: TracedModel, operators: Sequence[str], size: int, roots: Roots) -> str:
    """A digest of the graph that a stage of these operators runs for calls of `size` samples.

    It holds every call with its attributes, shapes and dtypes, and which gradients are wanted. Names and the
    seeds of random numbers are left out: they change no time.
    """
    mode = traced.train
    face = interface(mode, operators)
    nodes = {full: mode.nodes[n] for n, full in {**mode.parameters, **mode.buffers}.items()}
    graph = carve(mode, operators, size, face.parameters, face.buffers, device=_META).graph
    state = [nodes[name].meta["val"] for name in (*face.parameters, *face.buffers)]
    lines = [f"{_layout(v)}" for v in (*state, *example_inputs(mode, face, size, _META))]
    lines += [f"learns {traced.trainable[name]}" for name in face.parameters]
    lines += [f"flows {value_spec(mode, name).needs_grad}" for name in (*face.inputs, *face.outputs)]
    lines += [f"seed {name in roots.coefficients}" for name in face.terms]
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            lines.append(f"{_target(node)} {_plain(_arguments(node), number)} {_plain(node.kwargs, number)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def _layout(value: Tensor) -> str:
    return f"{tuple(value.shape)} {tuple(value.stride())} {value.dtype}"


def _target(node: fx.Node) -> str:
    return node.op if node.op == "output" else f"{getattr(node.target, '__module__', '')}.{node.target}"


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    if node.target is torch.ops.gpp.keyed_bits.default:
        return (node.args[0], *node.args[2:])
    return tuple(node.args)


def _plain(item: Any, number: dict[fx.Node, str]) -> str:
    if isinstance(item, fx.Node):
        return number[item]
    if isinstance(item, tuple | list):
        return f"[{', '.join(_plain(i, number) for i in item)}]"
    if isinstance(item, dict):
        return f"{{{', '.join(f'{k}: {_plain(v, number)}' for k, v in sorted(item.items()))}}}"
    return getattr(item, "__qualname__", None) or repr(item)
