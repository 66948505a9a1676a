"""A stage's forward and backward as one graph, traced by autograd itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from .attribution import Attributing, Ledger
from .autocast import operator_called


@dataclass(frozen=True)
class Joint:
    """One graph: placeholders (arguments of forward, then output gradients), forward's results, gradients.

    `forward_nodes` were recorded before autograd began. `outputs` are forward's results, `input_gradients`
    and `weight_gradients` the rest; None where autograd found no path.
    """

    module: fx.GraphModule
    forward_nodes: frozenset[fx.Node]
    arguments: tuple[fx.Node, ...]
    tangents: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    input_gradients: tuple[fx.Node | None, ...]
    weight_gradients: tuple[fx.Node | None, ...]


def trace_joint(
    forward: fx.GraphModule,
    arguments: Sequence[Tensor],
    learning: Sequence[int],
    flowing: Sequence[int],
    outputs: Sequence[int],
    seeds: Sequence[tuple[int, float]],
) -> Joint:
    """Trace forward and backward.

    `learning` and `flowing` are positions of the arguments whose gradients are wanted (parameters, inputs),
    `outputs` of the results that receive a gradient from other stages, `seeds` of the results that are loss
    terms with the constant that their gradient starts from. Shapes come from `arguments`; nothing is
    computed. Gradients arrive packed, so they are traced contiguous whatever the result's own strides.
    """
    border: list[int] = []
    ledgers: list[Ledger] = []
    interpreter: type[Attributing] = Attributing
    wanted = [*learning, *flowing]

    def joint(given: list[Tensor], tangents: list[Tensor]) -> tuple[Any, ...]:
        leaves = list(given)
        for i in wanted:
            leaves[i] = leaves[i].detach().requires_grad_()
        tracer: Any = get_proxy_mode()
        ledger = Ledger(lambda: len(tracer.tracer.graph.nodes))
        ledgers.append(ledger)
        results = interpreter(forward, ledger).run(*leaves)
        border.append(len(tracer.tracer.graph.nodes))
        ledger.follow()
        roots = [results[i] for i in outputs]
        gradients = list(tangents)
        for i, seed in seeds:
            roots.append(results[i])
            gradients.append(torch.full_like(results[i], seed))
        pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if r.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if pairs and wanted:
            found = torch.autograd.grad(
                [r for r, _ in pairs],
                [leaves[i] for i in wanted],
                [g for _, g in pairs],
                allow_unused=True,
            )
        return (*results, *found)

    module, shapes = _traced(joint, forward, arguments, outputs)
    if any("mkldnn_rnn_layer_backward" in str(n.target) for n in module.graph.nodes):
        # oneDNN's fused LSTM has a backward that takes an undefined tensor, which no graph can hold
        interpreter = _AsCaptured
        with torch.backends.mkldnn.flags(enabled=False):
            module, shapes = _traced(joint, _AsCaptured(forward).run, arguments, outputs)
    ledgers[-1].write(list(module.graph.nodes))
    return _parts(module, border[-1], len(arguments), len(outputs), shapes, len(learning))


class _AsCaptured(Attributing):
    """Under autocast oneDNN's LSTM returns the low precision, the steps that stand for it return float32 if
    the model's initial state is of that: what reads them was captured behind oneDNN's."""

    def run_node(self, n: fx.Node) -> Any:
        """The node's result, of an LSTM in the types that it was captured with."""
        result = super().run_node(n)
        if "aten.lstm" not in str(operator_called(n)):
            return result
        return tuple(v.to(known.dtype) for v, known in zip(result, n.meta["val"], strict=True))


def _traced(
    joint: Callable[..., Any],
    forward: Callable[..., Any],
    arguments: Sequence[Tensor],
    outputs: Sequence[int],
) -> tuple[fx.GraphModule, int]:
    """The graph of `joint` on fake tensors, and how many results forward has."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [_fake(mode, a) for a in arguments]
        with torch.no_grad():
            shapes = forward(*fakes)
        tangents = [torch.empty_like(shapes[i], memory_format=torch.contiguous_format) for i in outputs]
        with torch.enable_grad():
            return make_fx(joint, _allow_non_fake_inputs=True)(fakes, tangents), len(shapes)


def _fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _parts(
    module: fx.GraphModule, border: int, arguments: int, tangents: int, results: int, learning: int
) -> Joint:
    nodes = list(module.graph.nodes)
    forward_nodes = frozenset(nodes[:border])
    _strip_detach(module.graph)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    output = next(n for n in module.graph.nodes if n.op == "output")
    returned = list(output.args[0])
    gradients = returned[results:]
    return Joint(
        module=module,
        forward_nodes=forward_nodes,
        arguments=tuple(placeholders[:arguments]),
        tangents=tuple(placeholders[arguments : arguments + tangents]),
        outputs=tuple(returned[:results]),
        input_gradients=tuple(gradients[learning:]),
        weight_gradients=tuple(gradients[:learning]),
    )


def _strip_detach(graph: fx.Graph) -> None:
    """Autograd is over: a detach is the value itself."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
