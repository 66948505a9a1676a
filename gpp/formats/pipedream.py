"""PipeDream's graph.txt, which DAPPLE uses too: milliseconds and bytes of one profiled batch."""

import math
import re
from dataclasses import dataclass

from gpp.cost import CostTable, Timing
from gpp.graph import ComputationGraph, Operator, Parameter, Work

from .profile import CALL, Profile, ProfileError, checked, tensor_of, topological


def read_pipedream(text: str, name: str, unit: int) -> Profile:
    """PipeDream's graph.txt (edges are indented, by a tab or by blanks). Raises ProfileError.

    What the source nodes named "Input..." hold comes from the data set, and their time is the loader's: they
    become batch keys of their readers. "__getitem__" nodes that nobody reads are left out. The stash of an
    operator is its output; the backward's time is in equal parts its two halves' where it has both. The
    optimizer is SGD with momentum, as these profiles were trained.
    """
    nodes, edges = _pipedream_lines(text, name)
    order = topological(list(nodes), edges, name)
    found = list(nodes.values())
    readers: list[list[int]] = [[] for _ in found]
    sources: list[list[int]] = [[] for _ in found]
    for u, v in edges:
        readers[u].append(v)
        sources[v].append(u)
    data = {i for i, node in enumerate(found) if node.kind.startswith("Input") and not sources[i]}
    unread = {i for i, node in enumerate(found) if node.kind.startswith("__getitem__") and not readers[i]}
    if len(data | unread) == len(found):
        raise ProfileError(f"{name}: nothing is left to compute: all of its {len(found)} nodes are inputs")
    learns: dict[int, bool] = {}
    operators, timings = [], []
    for i in order:
        if i in data | unread:
            continue
        node = found[i]
        before = [u for u in sources[i] if u not in data]
        upstream = any(learns[u] for u in before)
        weight = int(node.parameter_bytes)
        learns[i] = upstream or weight > 0 or node.backward > 0
        halves = (node.backward, 0.0)
        if weight:
            halves = (node.backward / 2,) * 2 if upstream else (0.0, node.backward)
        timings.append(Timing(node.name, (float(unit),), (node.forward,), (halves[0],), (halves[1],)))
        read = any(v not in unread for v in readers[i])
        operators.append(
            Operator(
                name=node.name,
                kind=node.kind,
                inputs=tuple(f"{found[u].name}.out" for u in before),
                outputs=(tensor_of(f"{node.name}.out", node.output_bytes, unit, learns[i]),) if read else (),
                batch_keys=tuple(found[u].name for u in sources[i] if u in data)
                or (() if before else (f"{node.name}.in",)),
                parameters=(Parameter(f"{node.name}.weight", weight, True),) if weight else (),
                forward=CALL,
                backward_input=CALL if upstream or (learns[i] and not weight) else Work(),
                backward_weight=CALL if weight else Work(),
                stash=node.output_bytes / unit if learns[i] else 0.0,
                terms=() if read else (f"{node.name}.out",),
            )
        )
    return Profile(ComputationGraph(tuple(operators)), CostTable(tuple(timings), 0.0), 1.0, unit)


@dataclass(frozen=True, slots=True)
class _Line:
    """A node of graph.txt; seconds and bytes of a profiled batch."""

    name: str
    kind: str
    forward: float
    backward: float
    output_bytes: float
    parameter_bytes: float


_FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


def _pipedream_lines(text: str, name: str) -> tuple[dict[str, _Line], dict[tuple[int, int], float]]:
    """Nodes in the order of the file by their number, and edges by positions."""
    nodes: dict[str, _Line] = {}
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}, line {number}"
        parts = [part.strip() for part in line.split(" -- ")]
        if not line.strip():
            continue
        if line[0].isspace() and len(parts) == 2:
            pairs.append((parts[0], parts[1], where))
        elif not line[0].isspace() and len(parts) >= 3:
            if parts[0] in nodes:
                raise ProfileError(f"{where}: node {parts[0]} appears twice; names must be unique")
            nodes[parts[0]] = _pipedream_node(parts[0], " -- ".join(parts[1:-1]), parts[-1], where)
        else:
            raise ProfileError(
                f"{where}: must be 'node -- description -- costs' or, indented, 'node -- node', it is "
                f"{line.strip()[:60]!r}"
            )
    if not nodes:
        raise ProfileError(f"{name} is neither Piper's JSON nor PipeDream's graph.txt: it has no node")
    position = {node: i for i, node in enumerate(nodes)}
    edges = {}
    for u, v, where in pairs:
        for end in (u, v):
            if end not in position:
                raise ProfileError(f"{where}: edge {u} -- {v} names node {end}, which is not in the file")
        edges[position[u], position[v]] = 0.0
    return nodes, edges


def _pipedream_node(node: str, description: str, costs: str, where: str) -> _Line:
    fields = dict(re.findall(r"(\w+)=(\[[^\]]*\]|[^,\s]*)", costs))
    sizes = []
    for field in _FIELDS:
        if field not in fields:
            raise ProfileError(f"{where}: node {node} has no {field}")
        # several outputs: "[a; b]"
        inside = re.fullmatch(r"\[(.*)\]", fields[field])
        numbers = [part.strip() for part in inside[1].split(";")] if inside else [fields[field]]
        sizes.append(sum(_parsed(number, field, f"{where}: node {node}") for number in numbers))
    kind = re.split(r"[^\w]", description, maxsplit=1)[0] or "operator"
    return _Line(f"{node}.{kind}", kind, sizes[0] / 1e3, sizes[1] / 1e3, sizes[2], sizes[3])


def _parsed(text: str, field: str, where: str) -> float:
    value = (
        float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) else math.nan
    )
    return checked(value, field, where, 0.0, shown=text)
