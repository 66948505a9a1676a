"""ATen nodes into operators: one heavy node each with the cheap ones around it.

A cheap node joins the group that all its other producers come before; where two branches meet it starts a
group of its own, which the next heavy node absorbs if it is its only reader. So a join never becomes part of
one of its branches, and the groups' graph stays acyclic by construction. What cannot cross a stage border
(values that are not per-sample, tensors that share a mutated storage, buffers written by several nodes) is
merged after.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from gpp.program.autocast import is_cast, operator_called

from .dependence import Dependence, Dependences
from .export import Exported, path_of
from .mutation import is_view, mutated_buffers
from .tail import Tails

_HEAVY = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "bilinear",
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "embedding", "embedding_bag", "_embedding_bag", "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh",
    "rnn_relu", "keyed_attention",
)  # fmt: skip
_NORMS = ("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm")


@dataclass(frozen=True)
class Grouping:
    """`operator_of` names the operator of every batch-dependent call outside the tails; `attached` that of
    buffer updates without a batch input; `kinds` what each operator mainly is,
    `heavy` how many heavy nodes it has. Operators are in order."""

    names: tuple[str, ...]
    operator_of: Mapping[str, str]
    attached: Mapping[str, str]
    kinds: Mapping[str, str]
    heavy: Mapping[str, int]


def base_name(node: fx.Node) -> str:
    """The operator's plain name: "linear" of aten.linear.default."""
    target = operator_called(node)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def group(exported: Exported, facts: Dependences, tails: Tails) -> Grouping:
    """Group the calls of one mode."""
    nodes = [
        n
        for n in exported.module.graph.nodes
        if n.op == "call_function"
        and n.name not in tails.nodes
        and (facts.kind[n.name] is Dependence.SAMPLES or n.name in tails.terms)
    ]
    groups = _first_groups(nodes, facts)
    by_name = {n.name: n for n in nodes}
    for loss, count in exported.ignored.items():  # a count of labels goes with the loss that reads them
        for node in (count, count.args[0]):
            if isinstance(node, fx.Node) and node in groups and loss in by_name:
                groups[node] = groups[by_name[loss]]
    _absorb_light(nodes, groups, facts)
    _give_views_to_readers(nodes, groups, facts)
    _place_casts(nodes, groups)
    _merge(nodes, groups, _bonds(exported, facts, tails, nodes))
    return _named(exported, nodes, groups)


def _first_groups(nodes: list[fx.Node], facts: Dependences) -> dict[fx.Node, int]:
    """The rule of the module's docstring; ancestors of groups as bit sets.

    A view that moves the samples out of dimension 0 belongs to what reads it: the value before it can cross.
    """
    groups: dict[fx.Node, int] = {}
    ancestors: list[int] = []
    feeds_heavy = _feeding_heavy(nodes)

    def start(before: Iterable[int]) -> int:
        mask = 0
        for g in before:
            mask |= ancestors[g] | (1 << g)
        ancestors.append(mask)
        return len(ancestors) - 1

    for node in nodes:
        before = {groups[i] for i in node.all_input_nodes if i in groups}
        leaves = is_view(node) and node.name not in facts.per_sample and node in feeds_heavy
        if base_name(node) in (*_HEAVY, *_NORMS) or not before or (leaves and _from_samples(node, facts)):
            groups[node] = start(before)
            continue
        last = max(before)
        rest = before - {last}
        groups[node] = last if all(ancestors[last] >> g & 1 for g in rest) else start(before)
    return groups


def _feeding_heavy(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that some heavy node depends on."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(u in found or base_name(u) in _HEAVY for u in node.users):
            found.add(node)
    return found


def _from_samples(node: fx.Node, facts: Dependences) -> bool:
    return all(i.name in facts.per_sample for i in node.all_input_nodes if i.op == "call_function")


def _edges(nodes: list[fx.Node], groups: Mapping[fx.Node, int]) -> dict[int, set[int]]:
    """Group to the groups that read from it."""
    readers: dict[int, set[int]] = {g: set() for g in groups.values()}
    for node in nodes:
        for used in node.all_input_nodes:
            if used in groups and groups[used] != groups[node]:
                readers[groups[used]].add(groups[node])
    return readers


def _absorb_light(nodes: list[fx.Node], groups: dict[fx.Node, int], facts: Dependences) -> None:
    """A group without a heavy node joins its only reader; contracting such an edge makes no cycle.

    Not one that must stay with what it reads, because that cannot cross: it would tie its reader to it too.
    """
    tied = {
        groups[n]
        for n in nodes
        for used in n.all_input_nodes
        if groups.get(used, groups[n]) != groups[n] and used.name not in facts.per_sample
    }
    heavy = {groups[n] for n in nodes if base_name(n) in _HEAVY}
    readers = _edges(nodes, groups)
    into: dict[int, int] = {}
    for g in sorted(readers, reverse=True):
        if g in heavy or g in tied:
            continue
        targets = {into.get(r, r) for r in readers[g]}
        if len(targets) == 1:
            into[g] = targets.pop()
    for node in nodes:
        groups[node] = into.get(groups[node], groups[node])
    # A light end (an accuracy) of one group is part of it.
    readers = _edges(nodes, groups)
    sources: dict[int, list[int]] = {}
    for g, targets in readers.items():
        for target in targets:
            sources.setdefault(target, []).append(g)
    ends = {
        g: sources[g][0]
        for g in readers
        if g not in heavy and not readers[g] and len(sources.get(g, ())) == 1
    }
    for node in nodes:
        groups[node] = ends.get(groups[node], groups[node])
    # What nothing reads and reads from no group (a count of labels, say) goes with the last heavy group.
    readers = _edges(nodes, groups)
    read = {r for rs in readers.values() for r in rs}
    lonely = {g for g in readers if not readers[g] and g not in read}
    homes = [g for g in sorted(set(groups.values())) if g not in lonely]
    if homes:
        for node in nodes:
            if groups[node] in lonely and groups[node] not in heavy:
                groups[node] = homes[-1]


def _give_views_to_readers(nodes: list[fx.Node], groups: dict[fx.Node, int], facts: Dependences) -> None:
    """A view (a detach, say) read by one other group that gets the value itself too is made there: so the
    value crosses once."""
    for node in reversed(nodes):
        base = node.args[0] if node.args else None
        if not isinstance(base, fx.Node) or not is_view(node) or base not in groups:
            continue
        if base.name not in facts.per_sample:
            continue
        readers = {groups[u] for u in node.users if u in groups}
        others = {groups[u] for u in base.users if u in groups and u is not node}
        if len(readers) == 1 and readers <= others and groups[base] == groups[node]:
            groups[node] = readers.pop()


def _place_casts(nodes: list[fx.Node], groups: dict[fx.Node, int]) -> None:
    """Casts where the fewest bytes cross: a widening one with its reader, a narrowing one with the value, but
    with its reader where the value itself crosses too, or would cross narrowed several times."""
    for base in nodes:
        casts = [u for u in base.users if is_cast(u) and u in groups]
        away = {groups[u] for u in base.users if u in groups and not is_cast(u)} - {groups[base]}
        readers = {cast: groups[reader] for cast in casts for reader in cast.users if reader in groups}
        leaving = [cast for cast, reader in readers.items() if reader != groups[base]]
        for cast in leaving:
            wide, narrow = base.meta["val"].dtype.itemsize, cast.meta["val"].dtype.itemsize
            if away or narrow >= wide or len(leaving) * narrow > wide:
                groups[cast] = readers[cast]


def _bonds(exported: Exported, facts: Dependences, tails: Tails, nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Sets of nodes that must share an operator."""
    inside = set(nodes)
    bonds: list[list[fx.Node]] = []
    for node in nodes:
        if node.name not in facts.per_sample:
            readers = [u for u in node.users if u in inside]
            if readers:
                bonds.append([node, *readers])
    by_name = {n.name: n for n in nodes}
    bonds += [[by_name[name] for name in together if name in by_name] for together in exported.together]
    touched: dict[str, list[fx.Node]] = {}
    written = mutated_buffers(exported.module.graph, exported.buffers)
    for node in nodes:
        for used in node.all_input_nodes:
            if used.name in written:
                touched.setdefault(exported.buffers[used.name], []).append(node)
    bonds += list(touched.values())
    return [bond for bond in bonds if len(bond) > 1]


def _merge(nodes: list[fx.Node], groups: dict[fx.Node, int], bonds: list[list[fx.Node]]) -> None:
    """Merge bonded groups, and every group on a cycle that this makes."""
    graph = nx.DiGraph()
    graph.add_nodes_from(set(groups.values()))
    for source, targets in _edges(nodes, groups).items():
        graph.add_edges_from((source, target) for target in targets)
    for bond in bonds:
        members = [groups[n] for n in bond]
        graph.add_edges_from((members[0], m) for m in members[1:])
        graph.add_edges_from((m, members[0]) for m in members[1:])
    merged = {g: min(part) for part in nx.strongly_connected_components(graph) for g in part}
    for node in nodes:
        groups[node] = merged[groups[node]]


def _named(exported: Exported, nodes: list[fx.Node], groups: Mapping[fx.Node, int]) -> Grouping:
    members: dict[int, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(groups[node], []).append(node)
    order = _topological(nodes, groups, members)
    taken: dict[str, int] = {}
    names: dict[int, str] = {}
    kinds: dict[str, str] = {}
    heavy: dict[str, int] = {}
    for g in order:
        base, kind = _describe(members[g])
        count = taken.setdefault(base, 0)
        taken[base] += 1
        names[g] = base if count == 0 else f"{base}#{count + 1}"
        kinds[names[g]] = kind
        heavy[names[g]] = sum(base_name(n) in _HEAVY for n in members[g])
    operator_of = {node.name: names[groups[node]] for node in nodes}
    attached = _attach(exported, nodes, operator_of)
    return Grouping(tuple(names[g] for g in order), operator_of, attached, kinds, heavy)


def _topological(
    nodes: list[fx.Node], groups: Mapping[fx.Node, int], members: Mapping[int, list[fx.Node]]
) -> list[int]:
    """Groups in topological order, otherwise as their first nodes come in the model."""
    position = {node: i for i, node in enumerate(nodes)}
    first = {g: position[ms[0]] for g, ms in members.items()}
    graph = nx.DiGraph()
    graph.add_nodes_from(members)
    for source, targets in _edges(nodes, groups).items():
        graph.add_edges_from((source, target) for target in targets)
    key: Callable[[int], int] = first.__getitem__
    return list(nx.lexicographical_topological_sort(graph, key=key))


def _describe(members: list[fx.Node]) -> tuple[str, str]:
    """Name and kind after the heavy nodes: their common module path."""
    members = [n for n in members if not is_cast(n)] or members  # the same names in every precision
    heavy = [n for n in members if base_name(n) in _HEAVY] or members
    kind = "attention" if any("attention" in base_name(n) for n in heavy) else base_name(heavy[0])
    paths = [path_of(n).split(".") for n in heavy]
    common = paths[0]
    for path in paths[1:]:
        shared = 0
        while shared < min(len(common), len(path)) and common[shared] == path[shared]:
            shared += 1
        common = common[:shared]
    module = ".".join(common)
    light = base_name(heavy[0]) not in _HEAVY
    if not module:
        return base_name(heavy[0]), kind
    return (f"{module}.{base_name(heavy[0])}" if light else module), kind


def _attach(exported: Exported, nodes: list[fx.Node], operator_of: Mapping[str, str]) -> dict[str, str]:
    """Counters of batch norm and the like: with the operator of the same module, else of the next node."""
    by_path: dict[str, str] = {}
    for node in nodes:
        by_path.setdefault(path_of(node), operator_of[node.name])
    following = list(exported.module.graph.nodes)
    position = {n.name: i for i, n in enumerate(following)}
    attached: dict[str, str] = {}
    for names in mutated_buffers(exported.module.graph, exported.buffers).values():
        for name in names:
            if name in operator_of:
                continue
            node = following[position[name]]
            later = (operator_of[n.name] for n in following[position[name] :] if n.name in operator_of)
            attached[name] = by_path.get(path_of(node)) or next(later, operator_of[nodes[-1].name])
    return attached
