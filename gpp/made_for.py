"""What a plan was made for, operator by operator, and how that differs from a model as it is now."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from gpp.graph import ComputationGraph, Operator

SHOWN = 4  # names in a message


@dataclass(frozen=True, slots=True)
class Note:
    """An operator as a plan was made for it: bytes of its parameters, bytes a sample of what it gives, and a
    digest of everything that its graph says of it."""

    name: str
    parameter_bytes: int
    output_bytes: int
    digest: str


def notes(graph: ComputationGraph) -> tuple[Note, ...]:
    """Of every operator, in their order."""
    return tuple(map(_note, graph.operators))


def differences(planned: Sequence[Note], graph: ComputationGraph) -> list[str]:
    """How the model's operators differ from those that a plan was made for, a clause each; none where they do
    not."""
    before, now = {note.name: note for note in planned}, {note.name: note for note in notes(graph)}
    added, removed = [n for n in now if n not in before], [n for n in before if n not in now]
    found = []
    if added:
        found.append(f"the model has {_counted(added)} that the plan lacks ({_some(added)})")
    if removed:
        found.append(f"the plan has {_counted(removed)} that the model lacks ({_some(removed)})")
    changed = [n for n in now if n in before and now[n] != before[n]]
    sizes = [text for name in changed for text in _sizes(before[name], now[name])]
    if sizes:
        found.append(_some(sizes, "; "))
    same = [n for n in changed if not _sizes(before[n], now[n])]
    if same:
        found.append(
            f"{_counted(same)} of the same sizes read, compute or keep something else ({_some(same)})"
        )
    if not found and list(before) != list(now):
        found.append("its operators come in another order")
    return found


def _note(op: Operator) -> Note:
    return Note(
        op.name,
        sum(parameter.bytes for parameter in op.parameters),
        sum(tensor.bytes for tensor in op.outputs),
        hashlib.sha256(repr(op).encode()).hexdigest()[:8],
    )


def _sizes(before: Note, now: Note) -> list[str]:
    found = []
    if before.parameter_bytes != now.parameter_bytes:
        found.append(
            f"{now.name} has {now.parameter_bytes} bytes of parameters, {before.parameter_bytes} in the plan"
        )
    if before.output_bytes != now.output_bytes:
        found.append(f"{now.name} gives {now.output_bytes} bytes a sample, {before.output_bytes} in the plan")
    return found


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} operator{'' if len(names) == 1 else 's'}"


def _some(items: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return between.join(items[:SHOWN]) + more
