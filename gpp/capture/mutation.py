"""What writes to what: in-place calls made functional where nothing else sees them; updates of buffers."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

_FUNCTIONAL = {
    torch.ops.aten.bernoulli_.float: torch.ops.aten.bernoulli.p,
    torch.ops.aten.normal_.default: torch.ops.aten.normal_functional.default,
}


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes to, by its schema."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema
    if not schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, fx.Node):
            found.append(given)
    return found


def is_view(node: fx.Node) -> bool:
    """Whether a call's result aliases its first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default):
        return True  # may alias
    returns = node.target._schema.returns
    return len(returns) > 0 and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def make_functional(graph: fx.Graph, state: set[str]) -> list[frozenset[str]]:
    """Replace in-place calls on intermediates by functional ones; what has views stays, as a group.

    Returns the groups: nodes that share a written storage, with all that read it before the last write.
    """
    groups: list[frozenset[str]] = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        targets = written(node)
        if not targets:
            continue
        target = targets[0]
        base = _base(target)
        if base.name in state:
            continue
        aliases = _aliases(base)
        functional = _functional_overload(node)
        others = [a for a in aliases if a is not target and a is not node and order[a] < order[node]]
        if functional is None or others or is_view(target) or not _keeps_dtype(node, target):
            last = max(order[a] for a in aliases if written(a))  # what reads later sees the final value
            users = {u for a in aliases for u in a.users if order[u] < last}
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


def _base(node: fx.Node) -> fx.Node:
    while isinstance(node.args[0] if node.args else None, fx.Node) and (is_view(node) or written(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _aliases(base: fx.Node) -> set[fx.Node]:
    found, queue = {base}, [base]
    while queue:
        for user in queue.pop().users:
            if user not in found and user.args and user.args[0] in found and (is_view(user) or written(user)):
                found.add(user)
                queue.append(user)
    return found


def _keeps_dtype(node: fx.Node, target: fx.Node) -> bool:
    """Whether the functional form gives the target's dtype: writing in place rounds to it."""
    kinds = {i.meta["val"].dtype for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor)}
    return kinds <= {target.meta["val"].dtype} or node.target == torch.ops.aten.copy_.default


def _functional_overload(node: fx.Node) -> torch._ops.OpOverload | None:
    assert isinstance(node.target, torch._ops.OpOverload)
    if node.target in _FUNCTIONAL:
        return _FUNCTIONAL[node.target]
    name = node.target._schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), node.target._overloadname, None)


def drop_unused(graph: fx.Graph, buffers: set[str], kept: set[str]) -> None:
    """Erase calls that nothing uses, but for updates of buffers and the nodes named `kept`."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or node.name in kept:
            continue
        if any(_base(target).name in buffers for target in written(node)) or _norm_updates(node, buffers):
            continue
        graph.erase_node(node)


def _norm_updates(node: fx.Node, buffers: set[str]) -> bool:
    """Batch norm writes its running statistics although its schema does not say so."""
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    return ("batch_norm" in name or "instance_norm" in name) and any(
        a.name in buffers for a in node.all_input_nodes
    )


def mutated_buffers(graph: fx.Graph, buffers: Mapping[str, str]) -> dict[str, set[str]]:
    """Buffer placeholder to the nodes that write it."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        changed = [_base(target) for target in written(node)]
        if _norm_updates(node, set(buffers)) and _is_training_norm(node):
            changed += node.all_input_nodes
        for value in changed:
            if value.name in buffers:
                found.setdefault(value.name, set()).add(node.name)
    return found


def _is_training_norm(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name in ("training", "use_input_stats"):
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            return bool(given)
    return True
