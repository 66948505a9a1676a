"""torch.export in training and in evaluation, and the clean-up that makes one plain ATen graph of each.

After it a graph has placeholders, ATen calls and one output; `no_grad` blocks are inlined behind a detach,
in-place operators on intermediates are replaced by functional ones, random ones by keyed ones.
"""

import inspect
import operator
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpp.program.carve import move_factories
from gpp.program.random import RandomNodeError, is_random, keyed
from gpp.program.traced import POSITION

EXAMPLES = 4  # samples of the example batch: more than one, and it can be halved


class CaptureError(ValueError):
    """A model that cannot be captured or cut; the message names the module and the reason."""


@dataclass(frozen=True)
class Exported:
    """One mode's graph with the meaning of its placeholders, and the nodes that `forward` returned.

    `batch` is the symbol of the batch size. `metrics` values are (sum node, weight node | None).
    `together` are groups of nodes that share a mutated storage and must stay in one operator.
    """

    module: fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    constants: Mapping[str, Tensor]
    batch_keys: Mapping[str, str]
    batch: Any
    loss: tuple[fx.Node, fx.Node | None]
    metrics: Mapping[str, tuple[fx.Node, fx.Node | None]]
    together: tuple[frozenset[str], ...] = field(default=())


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
    return _clean(model, program, seed)


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
    kwargs = dict(batch)
    shapes: dict[str, Any] = {key: {0: size} for key in kwargs}
    signature = inspect.signature(model.forward)
    for parameter in signature.parameters.values():
        if parameter.kind == parameter.VAR_KEYWORD:
            extra = [key for key in kwargs if key not in signature.parameters]
            shapes = {k: v for k, v in shapes.items() if k not in extra} | {
                parameter.name: {key: {0: size} for key in extra}
            }
    home = next(iter(model.parameters())).device
    try:
        # tensors that forward makes without a device (arange) belong with the model, on meta too
        with torch.device(home) if home.type == "meta" else nullcontext():
            return torch.export.export(model, (), kwargs=kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


def _explain(model: nn.Module, error: Exception) -> str:
    """One paragraph: which module, what torch said, what helps."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    place = _user_frame(model, error)
    if "specialized it to be a constant" in text or "Constraints violated" in text:
        reason = (
            "it turns the batch size into a fixed number (float(x.shape[0]), int(...), a Python branch on it)"
        )
        help_ = "keep the batch size symbolic, e.g. torch.ones_like(x[:, 0]).sum() for a count of samples"
    elif "data-dependent" in text or "Could not guard" in text or "GuardOnDataDependentSymNode" in text:
        reason = "its Python control flow depends on the values of a tensor (.item(), if on a tensor)"
        help_ = "use torch.where or masks"
    else:
        reason = f"torch.export says: {type(error).__name__}: {lines[0] if lines else 'no reason'}"
        help_ = "export it alone with torch.export.export to see more"
    return f"{type(model).__name__} cannot be captured{place}: {reason}. To help: {help_}"


def _user_frame(model: nn.Module, error: BaseException) -> str:
    """Where in the model's own code it happened: the innermost frame in a submodule's source file."""
    names = {id(module): name for name, module in model.named_modules()}
    files = {
        inspect.getsourcefile(type(m)) for m in model.modules() if not type(m).__module__.startswith("torch.")
    }
    found = ""
    seen: BaseException | None = error
    while seen is not None and not found:
        trace = seen.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            if frame.f_code.co_filename in files:
                owner = names.get(id(frame.f_locals.get("self")))
                module = f" in module {owner!r}" if owner else ""
                found = f"{module} at {frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        seen = seen.__cause__ or seen.__context__
    return found


def _clean(model: nn.Module, program: torch.export.ExportedProgram, seed: int) -> Exported:
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
    _inline_no_grad(module)
    together = _functional(module.graph, set(parameters) | set(buffers))
    _key_random_nodes(module, seed, batch)
    loss, metrics = _results(model, module, program)
    _drop_unused(module, keep=set(buffers))
    module.recompile()
    return Exported(module, parameters, buffers, constants, keys, batch, loss, metrics, tuple(together))


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


def _inline_no_grad(module: fx.GraphModule) -> None:
    """Replace `wrap_with_set_grad_enabled(False, sub, *args)` by sub's nodes and a detach of its outputs.

    Nested ones, and blocks that switch gradients on again, are inlined too: autograd sees detached outputs.
    """
    while True:
        node = next(
            (
                n
                for n in module.graph.nodes
                if n.op == "call_function"
                and getattr(n.target, "__name__", "") == "wrap_with_set_grad_enabled"
            ),
            None,
        )
        if node is None:
            return
        enabled, sub, *args = node.args
        inner = getattr(module, sub.target)
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        mapping: dict[fx.Node, Any] = dict(zip(placeholders, args, strict=True))
        mapped = mapping.__getitem__
        with module.graph.inserting_before(node):
            for n in inner.graph.nodes:
                if n.op == "placeholder":
                    continue
                if n.op == "output":
                    returned = fx.node.map_arg(n.args[0], mapped)
                    continue
                if n.op == "get_attr":
                    name = f"{sub.target}_{n.target}".replace(".", "_")
                    setattr(module, name, getattr(inner, n.target))
                    mapping[n] = module.graph.get_attr(name)
                    continue
                mapping[n] = module.graph.node_copy(n, mapped)
            outputs = list(returned) if isinstance(returned, tuple | list) else [returned]
            if not enabled:
                outputs = [_detached(module.graph, value) for value in outputs]
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise CaptureError(f"a no_grad block is used in a way that is not understood: {user}")
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not sub.users:
            module.graph.erase_node(sub)


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta.update({k: v for k, v in value.meta.items() if k in ("val", "nn_module_stack")})
    return node


def _is_in_place(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.name.endswith("_")
        and node.target._schema.is_mutable
        and not node.target._schema.name.endswith("__")
    )


def is_view(node: fx.Node) -> bool:
    """Whether a call's result aliases its first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default):
        return True  # may alias
    returns = node.target._schema.returns
    return len(returns) > 0 and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _functional(graph: fx.Graph, state: set[str]) -> list[frozenset[str]]:
    """Replace in-place calls on intermediates by functional ones; what has views stays, as a group."""
    groups: list[frozenset[str]] = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _is_in_place(node):
            continue
        target = node.args[0]
        assert isinstance(target, fx.Node)
        base = target
        while is_view(base) and isinstance(base.args[0], fx.Node):
            base = base.args[0]
        if base.name in state:
            continue
        aliases = _aliases(base)
        functional = _functional_overload(node)
        others = [a for a in aliases if a is not target and a is not node and order[a] < order[node]]
        if functional is None or others or is_view(target):
            users = {u for a in aliases for u in a.users if order[u] > order[node] and u.op != "output"}
            groups.append(frozenset(n.name for n in {*aliases, *users, node} if n.op == "call_function"))
            continue
        with graph.inserting_before(node):
            made = graph.call_function(functional, node.args, node.kwargs)
        made.meta.update(node.meta)
        order[made] = order[node]
        node.replace_all_uses_with(made)
        for user in list(target.users):
            if order.get(user, 0) > order[node]:
                user.replace_input_with(target, made)
        graph.erase_node(node)
    return groups


def _aliases(base: fx.Node) -> set[fx.Node]:
    found, queue = {base}, [base]
    while queue:
        for user in queue.pop().users:
            if (
                user not in found
                and user.args
                and user.args[0] in found
                and (is_view(user) or _is_in_place(user))
            ):
                found.add(user)
                queue.append(user)
    return found


def _functional_overload(node: fx.Node) -> Any:
    assert isinstance(node.target, torch._ops.OpOverload)
    packet = node.target._schema.name.split("::")[1].rstrip("_")
    overload = node.target._overloadname
    return getattr(getattr(torch.ops.aten, packet, None), overload, None)


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


_CONTRACT = (
    "forward must return the loss, or (loss, {name: metric}); each is a scalar tensor that is a mean over "
    "samples, or a pair (sum, weight) of scalar tensors"
)


def _results(
    model: nn.Module, module: fx.GraphModule, program: torch.export.ExportedProgram
) -> tuple[tuple[fx.Node, fx.Node | None], dict[str, tuple[fx.Node, fx.Node | None]]]:
    output = next(n for n in module.graph.nodes if n.op == "output")
    skip = len(output.args[0]) - len(program.graph_signature.user_outputs)
    returned = pytree.tree_unflatten(list(output.args[0][skip:]), program.call_spec.out_spec)
    name = type(model).__name__
    metrics: dict[str, Any] = {}
    if isinstance(returned, tuple | list) and len(returned) == 2 and isinstance(returned[1], dict):
        returned, metrics = returned
    if isinstance(returned, dict):
        raise CaptureError(
            f"{name}.forward returns a dictionary with {', '.join(map(str, returned))}: {_CONTRACT}"
        )
    return _result(name, "loss", returned), {
        str(k): _result(name, f"metric {k!r}", v) for k, v in metrics.items()
    }


def _result(model: str, what: str, value: Any) -> tuple[fx.Node, fx.Node | None]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, None)
    if len(pair) != 2:
        raise CaptureError(f"{model}.forward returns {len(pair)} values as its {what}: {_CONTRACT}")
    for item in pair:
        if item is None and item is pair[1]:
            continue
        shape = tuple(item.meta["val"].shape) if isinstance(item, fx.Node) else item
        if shape != ():
            raise CaptureError(
                f"{model}.forward returns as its {what} {shape}, not a scalar tensor: {_CONTRACT}"
            )
    return pair


def _drop_unused(module: fx.GraphModule, keep: set[str]) -> None:
    """Erase calls that nothing uses, but for updates of buffers."""
    for node in reversed(list(module.graph.nodes)):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if _is_in_place(node) and isinstance(node.args[0], fx.Node) and node.args[0].name in keep:
            continue
        if node.op == "call_function" and _mutates_state(node, keep):
            continue
        module.graph.erase_node(node)


def _mutates_state(node: fx.Node, buffers: set[str]) -> bool:
    """Batch norm in training writes its running statistics although its schema does not say so."""
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    return "batch_norm" in name and any(a.name in buffers for a in node.all_input_nodes)


def mutated_buffers(exported: Exported) -> dict[str, set[str]]:
    """Buffer placeholder to the nodes that write it."""
    found: dict[str, set[str]] = {}
    for node in exported.module.graph.nodes:
        if node.op != "call_function":
            continue
        written: list[fx.Node] = []
        if _is_in_place(node) and isinstance(node.args[0], fx.Node):
            written = [node.args[0]]
        elif _mutates_state(node, set(exported.buffers)) and _is_training_norm(node):
            written = list(node.all_input_nodes)
        for value in written:
            if value.name in exported.buffers:
                found.setdefault(value.name, set()).add(node.name)
    return found


def _is_training_norm(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name in ("training", "use_input_stats"):
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            return bool(given)
    return True
