"""Names of stages, made of the module paths of their operators: short, unique, readable in a table."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from gpp.graph import ComputationGraph

LONGEST = 40


def stage_names(graph: ComputationGraph, stages: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """One name a stage: the module that it is, or "first…last" of the modules that it is made of."""
    names = [op.name for op in graph.operators]
    sizes = Counter(path for name in names for path in _paths(name))
    found = [_name([names[i] for i in sorted(stage)], sizes) for stage in stages]
    twice = {name for name, count in Counter(found).items() if count > 1}
    taken: Counter[str] = Counter()
    unique = []
    for name in found:
        taken[name] += 1
        unique.append(f"{name} ({taken[name]})" if name in twice else name)
    return tuple(unique)


def _paths(name: str) -> list[str]:
    """ "a.b.c" to "a", "a.b", "a.b.c"."""
    return list(accumulate(name.split("."), lambda path, part: f"{path}.{part}"))


def _name(operators: Sequence[str], sizes: Counter[str]) -> str:
    inside = Counter(path for name in operators for path in _paths(name))
    # the largest module around each operator that lies in this stage as a whole
    modules = [
        next((path for path in _paths(name) if inside[path] == sizes[path]), name) for name in operators
    ]
    head, tail = modules[0].split("."), modules[-1].split(".")
    if head == tail:
        return modules[0]
    same = [a == b for a, b in zip(head, tail[:-1], strict=False)]
    tail = tail[same.index(False) if False in same else len(same) :]
    for parts in (head, tail):  # what is too long loses its outer modules
        while len(parts) > 1 and len(".".join(head)) + len(".".join(tail)) >= LONGEST:
            del parts[0]
    return f"{'.'.join(head)}…{'.'.join(tail)}"
