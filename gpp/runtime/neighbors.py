"""At set-up, both ends of every edge compare what they think it carries.

Each rank learns the layout of its messages from its own stage alone; an end that disagrees about a shape, a
data type or a gradient would otherwise show as a hang or as wrong numbers in the middle of a step.
"""

from collections.abc import Sequence

from gpp.plan import StageGraph
from gpp.program.stage import Port, StageFunctions, ValueSpec
from gpp.schedule.task import Channel, Direction, Schedule

from .agreement import DisagreementError, agree
from .communicator import Communicator

# what one rank thinks of the edges it shares with another: edge number to values, None for no port
Layout = dict[int, tuple[ValueSpec, ...] | None]


def check_neighbors(
    comm: Communicator, graph: StageGraph, schedule: Schedule, stages: Sequence[StageFunctions]
) -> None:
    """Raise DisagreementError on every rank unless the two ends of each edge agree.

    `stages` are the functions of this rank's stages in the schedule's mode, none for an idle rank. Called by
    all ranks. Compared are the ranks at both ends and, value by value, name, shape, data type and needs_grad.
    """
    forward = [c for c in schedule.channels if c.direction is Direction.ACTIVATION and c.source != c.target]
    receives = [port for functions in stages for port in functions.receives]
    sends = [port for functions in stages for port in functions.sends]
    incoming = _layouts([c for c in forward if c.target == comm.rank], receives, outward=False)
    outgoing = _layouts([c for c in forward if c.source == comm.rank], sends, outward=True)
    _check_adjacency(comm, sorted(incoming), sorted(outgoing))
    sources, targets = sorted(incoming), sorted(outgoing)
    producers = comm.neighbor_exchange(sources, targets, [outgoing[rank] for rank in targets])
    consumers = comm.neighbor_exchange(targets, sources, [incoming[rank] for rank in sources])
    errors = []
    for peer, theirs in zip(sources, producers, strict=True):
        errors += _compare(graph, peer, theirs, comm.rank, incoming[peer])
    for peer, theirs in zip(targets, consumers, strict=True):
        errors += _compare(graph, comm.rank, outgoing[peer], peer, theirs)
    error = agree(comm, errors[0] if errors else None)
    if error is not None:
        raise DisagreementError(error)


def _layouts(channels: Sequence[Channel], ports: Sequence[Port], outward: bool) -> dict[int, Layout]:
    values = {port.edge: port.values for port in ports}
    layouts: dict[int, Layout] = {}
    for channel in channels:
        peer = channel.target if outward else channel.source
        layouts.setdefault(peer, {})[channel.edge] = values.get(channel.edge)
    return layouts


def _check_adjacency(comm: Communicator, sources: list[int], targets: list[int]) -> None:
    """MPI takes a graph whose ends name different neighbours without a word, and then hangs."""
    everyone = comm.all_gather_object((sources, targets))
    for rank, (_, their_targets) in enumerate(everyone):
        for target in their_targets:
            if rank not in everyone[target][0]:
                raise DisagreementError(f"rank {rank} sends to rank {target}, which expects nothing from it")
    for rank, (their_sources, _) in enumerate(everyone):
        for source in their_sources:
            if rank not in everyone[source][1]:
                raise DisagreementError(f"rank {rank} expects messages of rank {source}, which sends none")


def _compare(graph: StageGraph, source: int, produced: Layout, target: int, expected: Layout) -> list[str]:
    errors = []
    for edge in sorted(produced.keys() | expected.keys()):
        where = f"edge {edge}"
        if edge < len(graph.edges):
            ends = graph.edges[edge]
            where += f" ({graph.stages[ends.source].name} -> {graph.stages[ends.target].name})"
        ours, theirs = produced.get(edge), expected.get(edge)
        if ours is None or theirs is None:
            lacking = (
                f"rank {source} does not produce it" if ours is None else f"rank {target} does not expect it"
            )
            errors.append(f"{where}: {lacking}")
            continue
        errors += [
            f"{where}, value {a.name if a else b.name if b else ''}: rank {source} produces {_text(a)}, "
            f"rank {target} expects {_text(b)}"
            for a, b in _pairs(ours, theirs)
            if a != b
        ]
    return errors


def _pairs(
    produced: Sequence[ValueSpec], expected: Sequence[ValueSpec]
) -> list[tuple[ValueSpec | None, ValueSpec | None]]:
    length = max(len(produced), len(expected))
    left: list[ValueSpec | None] = [*produced, *[None] * (length - len(produced))]
    right: list[ValueSpec | None] = [*expected, *[None] * (length - len(expected))]
    return list(zip(left, right, strict=True))


def _text(value: ValueSpec | None) -> str:
    if value is None:
        return "nothing there"
    gradient = "with" if value.needs_grad else "without"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{value.name} {dtype} {tuple(value.shape)} {gradient} gradient"
