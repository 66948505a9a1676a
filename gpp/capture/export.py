"""torch.export in training and in evaluation, and the clean-up that makes one plain ATen graph of each.

After it a graph has placeholders, ATen calls and one output; `no_grad` and autocast blocks are inlined,
in-place operators on intermediates are replaced by functional ones, random ones by keyed ones.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpp.program.carve import move_factories
from gpp.program.random import RandomNodeError, arguments, is_random, keyed
from gpp.program.traced import POSITION, symbol

from .explain import explain, quiet
from .inline import inline_blocks, wrap_autocast
from .mutation import drop_unused, make_functional

EXAMPLES = 4  # samples of the example batch: more than one, and it can be halved


class CaptureError(ValueError):
    """A model that cannot be captured or cut; the message names the module and the reason."""


@dataclass(frozen=True)
class Exported:
    """One mode's graph with the meaning of its placeholders, and the nodes that `forward` returned.

    `batch` is the symbol of the batch size. `metrics` values are (sum node, weight node | None).
    `ignored` counts, for each mean of class losses, the labels that it leaves out. `together` are groups of
    nodes that share a mutated storage and must stay in one operator. `predictions` are the values for each
    sample that evaluation gives, by name.
    """

    module: fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    constants: Mapping[str, Tensor]
    batch_keys: Mapping[str, str]
    batch: Any
    loss: tuple[fx.Node, fx.Node | None]
    metrics: Mapping[str, tuple[fx.Node, fx.Node | None]]
    ignored: Mapping[str, fx.Node] = field(default_factory=dict)
    together: tuple[frozenset[str], ...] = field(default=())
    predictions: Mapping[str, fx.Node] = field(default_factory=dict)


def export_mode(model: nn.Module, batch: Mapping[str, Tensor], *, training: bool, seed: int) -> Exported:
    """Export `model` in one mode on an example batch of EXAMPLES samples (any device, meta included).

    The model's own training flags are put back. Raises CaptureError.
    """
    check_batch(model, batch)
    flags = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        program = _export(model, batch)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return _clean(model, program, seed, training=training)


def check_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Raise CaptureError unless `forward` takes exactly these keys and samples are in dimension 0."""
    signature = inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    known = [p.name for p in named]
    open_ended = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    name = type(model).__name__
    for key in batch:
        if key not in known and not open_ended:
            raise CaptureError(
                f"the data set has a key {key!r} that {name}.forward does not take; it takes "
                f"{', '.join(known)}. Rename one of them, or choose the keys with data.keys=[...]"
            )
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in batch:
            raise CaptureError(
                f"{name}.forward needs {parameter.name!r}, which the data set does not give; it gives "
                f"{', '.join(batch)}"
            )
    for key, value in batch.items():
        if value.dim() == 0 or value.shape[0] != EXAMPLES:
            raise CaptureError(
                f"batch key {key!r} must have the samples in dimension 0: its shape is {tuple(value.shape)} "
                f"for {EXAMPLES} samples"
            )


def _export(model: nn.Module, batch: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    size = torch.export.Dim("batch", min=2)
    shapes = {key: {0: size} for key in batch}
    home = next(iter(model.parameters())).device
    try:
        # tensors that forward makes without a device (arange) belong with the model, on meta too
        with (
            quiet(),
            _named_keywords(model, batch),
            torch.device(home) if home.type == "meta" else nullcontext(),
        ):
            return torch.export.export(model, (), kwargs=dict(batch), dynamic_shapes=shapes)
    except Exception as error:
        raise CaptureError(explain(model, error)) from error


@contextmanager
def _named_keywords(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a forward(**keys) the signature that this batch means: export takes no open-ended one."""
    signature = inspect.signature(model.forward)
    if not any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values()):
        yield
        return
    original = model.forward

    def forward(**given: Tensor) -> Any:
        return original(**given)

    named = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in batch]
    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    own = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _clean(model: nn.Module, program: torch.export.ExportedProgram, seed: int, *, training: bool) -> Exported:
    module = fx.GraphModule(program.graph_module, program.graph_module.graph)
    signature = program.graph_signature
    canonical = _canonical_names(model)
    parameters = {k: canonical[v] for k, v in signature.inputs_to_parameters.items()}
    buffers = {k: canonical[v] for k, v in signature.inputs_to_buffers.items()}
    constants = {k: program.constants[v] for k, v in signature.inputs_to_lifted_tensor_constants.items()}
    keys = _key_names(module, signature.user_inputs, program)
    batch = next(n.meta["val"].shape[0].node.expr for n in module.graph.nodes if n.name in keys)
    _drop_asserts(module.graph)
    move_factories(module.graph, torch.device("cpu"))
    inline_blocks(module, set(parameters))
    together = make_functional(module.graph, set(parameters) | set(buffers))
    _key_random_nodes(module, seed, batch)
    wrap_autocast(module.graph)
    loss, metrics, predictions = _results(model, module, program, training=training)
    drop_unused(module.graph, set(buffers), {name for group in together for name in group})
    ignored = _ignored_labels(module) if loss[1] is None else {}
    module.recompile()
    return Exported(
        *(module, parameters, buffers, constants, keys, batch, loss, metrics, ignored, tuple(together)),
        predictions=predictions,
    )


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every alias of a parameter or buffer to its first name (tied weights have one)."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names[name] = first.setdefault(id(value), name)
    return names


def _key_names(
    module: fx.GraphModule, user_inputs: Any, program: torch.export.ExportedProgram
) -> dict[str, str]:
    spec = program.call_spec.in_spec
    marks = pytree.tree_unflatten(list(user_inputs), spec)
    return {node: key for key, node in marks[1].items() if node in {n.name for n in module.graph.nodes}}


def _drop_asserts(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and not node.users and ("_assert" in name or "sym_constrain" in name):
            graph.erase_node(node)


def path_of(node: fx.Node) -> str:
    """The full name of the module that the node was called in; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return "" if path.startswith("_empty_nn_module") else str(path)


def _key_random_nodes(module: fx.GraphModule, seed: int, batch: Any) -> None:
    graph = module.graph
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        position = graph.placeholder(POSITION)
    position.meta["val"] = None
    names: dict[fx.Node, str] = {}
    count: dict[str, int] = {}
    for node in graph.nodes:
        if is_random(node):
            base = f"{path_of(node)}:{node.target._schema.name}"
            names[node] = f"{base}#{count.setdefault(base, 0)}"
            count[base] += 1
    try:
        keyed(module, seed, names, batch)
    except RandomNodeError as error:
        raise CaptureError(str(error)) from None


RESERVED = ("loss", "step", "step_seconds", "samples_per_second", "grad_norm", "lr")
_CLASS_LOSSES = ("aten.cross_entropy_loss", "aten.nll_loss")
_CONTRACT = (
    "forward must return the loss, (loss, {name: metric}) or (loss, {name: metric}, {name: prediction}); "
    "loss and metrics are scalar tensors that are means over samples, or pairs (sum, weight) of scalar "
    "tensors; a prediction is a tensor with the samples in dimension 0"
)


def parts_of(returned: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What forward returns as loss, metrics and predictions."""
    parts = list(returned) if isinstance(returned, tuple | list) else []
    if len(parts) in (2, 3) and all(isinstance(part, dict) for part in parts[1:]):
        return parts[0], parts[1], parts[2] if len(parts) == 3 else {}
    return returned, {}, {}


def _results(
    model: nn.Module, module: fx.GraphModule, program: torch.export.ExportedProgram, *, training: bool
) -> tuple[tuple[fx.Node, fx.Node | None], dict[str, tuple[fx.Node, fx.Node | None]], dict[str, fx.Node]]:
    output = next(n for n in module.graph.nodes if n.op == "output")
    skip = len(output.args[0]) - len(program.graph_signature.user_outputs)
    returned = pytree.tree_unflatten(list(output.args[0][skip:]), program.call_spec.out_spec)
    name = type(model).__name__
    returned, metrics, wanted = parts_of(returned)
    if isinstance(returned, dict):
        raise CaptureError(
            f"{name}.forward returns a dictionary with {', '.join(map(str, returned))}: {_CONTRACT}"
        )
    taken = [str(k) for k in metrics if str(k) in RESERVED]
    if taken:
        raise CaptureError(
            f"{name}.forward returns a metric called {taken[0]!r}, a name that results have already; call it "
            f"otherwise (taken are {', '.join(RESERVED)})"
        )
    results = (
        _result(module, name, "loss", returned),
        {str(k): _result(module, name, f"metric {k!r}", v) for k, v in metrics.items()},
    )
    # training computes no predictions; what nothing uses any more goes
    predictions = {} if training else {str(k): _prediction(module, name, k, v) for k, v in wanted.items()}
    nodes = [n for pair in (results[0], *results[1].values()) for n in pair if isinstance(n, fx.Node)]
    output.args = ((*output.args[0][:skip], *nodes, *predictions.values()),)
    return *results, predictions


def _prediction(module: fx.GraphModule, model: str, key: Any, value: Any) -> fx.Node:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
        raise CaptureError(f"{model}.forward returns as its prediction {key!r} {value!r}: {_CONTRACT}")
    if value.op != "placeholder":
        return value
    with module.graph.inserting_before(next(n for n in module.graph.nodes if n.op != "placeholder")):
        made = module.graph.call_function(torch.ops.aten.clone.default, (value,))  # some stage's own value
    made.meta["val"] = value.meta["val"]
    return made


def _result(module: fx.GraphModule, model: str, what: str, value: Any) -> tuple[fx.Node, fx.Node | None]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, None)
    if len(pair) != 2:
        raise CaptureError(f"{model}.forward returns {len(pair)} values as its {what}: {_CONTRACT}")
    total, weight = pair[0], _counted(module, pair[1])
    for item in (total, weight):
        if item is None and item is weight:
            continue
        given = item.meta["val"] if isinstance(item, fx.Node) else item
        shape = tuple(given.shape) if isinstance(given, Tensor) else given
        if shape != ():
            raise CaptureError(
                f"{model}.forward returns as its {what} {shape}, not a scalar tensor: {_CONTRACT}"
            )
    return total, weight


def _counted(module: fx.GraphModule, weight: Any) -> Any:
    """A number of samples, `x.shape[0]`, given as a weight: as a scalar tensor."""
    if not isinstance(weight, fx.Node) or symbol(weight.meta.get("val")) is None:
        return weight
    with module.graph.inserting_after(weight):
        made = module.graph.call_function(torch.ops.aten.scalar_tensor.default, (weight,))
    made.meta["val"] = torch.zeros(())
    return made


def _ignored_labels(module: fx.GraphModule) -> dict[str, fx.Node]:
    """For each mean of class losses the number of labels that it leaves out, by the loss's name.

    torch leaves out the label -100 unless told otherwise; a mean over the rest is no mean over samples.
    """
    found = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith(_CLASS_LOSSES):
            continue
        given = arguments(node)
        target = given["target"]
        if given["reduction"] != 1 or given["ignore_index"] >= 0 or target.meta["val"].is_floating_point():
            continue
        with module.graph.inserting_after(node):
            equal = module.graph.call_function(torch.ops.aten.eq.Scalar, (target, given["ignore_index"]))
        with module.graph.inserting_after(equal):
            count = module.graph.call_function(torch.ops.aten.sum.default, (equal,))
        equal.meta["val"] = target.meta["val"] == given["ignore_index"]
        count.meta["val"] = equal.meta["val"].sum()
        for made in (equal, count):
            made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        found[node.name] = count
    return found
