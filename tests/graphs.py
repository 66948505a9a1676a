"""Computation graphs to test with: small ones written by hand, and random ones for hypothesis."""

from collections.abc import Callable, Mapping, Sequence

from hypothesis import strategies as st

from gpp.graph import ComputationGraph, Operator, Parameter, Tensor, Work
from gpp.topology import Device, DeviceTopology, Link


def make_graph(
    parents: Mapping[str, str] | Sequence[Sequence[int]],
    *,
    flops: float | Mapping[str, float] = 1e9,
    parameters: int | Mapping[str, int] = 1 << 20,
    stash: float | Mapping[str, float] = 1 << 16,
    width: int = 256,
    coupled: Sequence[str] = (),
    frozen: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    backward: float = 2.0,
) -> ComputationGraph:
    """A graph by the parents of each operator, in topological order: {"a": "", "b": "a", "c": "a b"}, or
    positions, which are then named o0, o1, ...

    One output of `width` float32 a sample each; a backward takes `backward` times the FLOPs of the forward,
    half of it in each half; sinks have a term. `flops`, `parameters` and `stash` are for each operator or by
    name (0 where not named). `frozen` operators have nothing to train, `tied` ones the parameter of another.
    """
    if not isinstance(parents, Mapping):
        parents = {f"o{i}": " ".join(f"o{u}" for u in us) for i, us in enumerate(parents)}
    sinks = set(parents) - {name for before in parents.values() for name in before.split()}
    learns: dict[str, bool] = {}
    operators = []
    for name, before in parents.items():
        size = _of(parameters, name)
        trainable = size > 0 and name not in frozen
        upstream = any(learns[u] for u in before.split())
        learns[name] = trainable or upstream
        work = _of(flops, name)
        owner = (tied or {}).get(name, name)
        operators.append(
            Operator(
                name=name,
                kind="linear",
                inputs=tuple(f"{u}.out" for u in before.split()),
                outputs=() if name in sinks else (Tensor(f"{name}.out", (width,), "float32", learns[name]),),
                batch_keys=() if before else (f"{name}.key",),
                parameters=(Parameter(f"{owner}.weight", int(size), trainable),) if size else (),
                forward=Work(flops=work),
                backward_input=Work(flops=work * backward / 2) if upstream else Work(),
                backward_weight=Work(flops=work * backward / 2) if trainable else Work(),
                stash=_of(stash, name) if learns[name] else 0.0,
                batch_coupled=name in coupled,
                terms=(f"{name}.loss",) if name in sinks else (),
            )
        )
    return ComputationGraph(tuple(operators))


def _of(values: float | Mapping[str, float], name: str) -> float:
    return values.get(name, 0) if isinstance(values, Mapping) else values


def make_cluster(
    devices: int,
    *,
    memory: float = 16e9,
    per_host: int = 8,
    flops: float = 1e13,
    bandwidth: float = 1e12,
    inside: Link | None = None,
    between: Link | None = None,
) -> DeviceTopology:
    """Equal devices; links that cost little unless given."""
    device = Device("test", memory, flops, bandwidth)
    inside = inside or Link(1e-6, 1e11)
    return DeviceTopology("test", (device,) * devices, per_host, inside, between or inside)


def chain(count: int) -> dict[str, str]:
    """Parents of operators one after the other."""
    return {f"o{i}": f"o{i - 1}" if i else "" for i in range(count)}


def towers(branches: int, layers: int) -> dict[str, str]:
    """Parents of equal branches "t0.l0" ... that a "join" ends."""
    parents = {f"t{b}.l{i}": f"t{b}.l{i - 1}" if i else "" for b in range(branches) for i in range(layers)}
    return parents | {"join": " ".join(f"t{b}.l{layers - 1}" for b in range(branches))}


@st.composite
def parent_lists(draw: st.DrawFn, *, max_operators: int = 12) -> list[list[int]]:
    """Any directed acyclic graph: several sources and sinks, skip edges, loose operators."""
    count = draw(st.integers(1, max_operators))
    most = draw(st.sampled_from([1, 2, 4]))
    return [sorted(draw(st.sets(st.integers(0, i - 1), max_size=most))) if i else [] for i in range(count)]


@st.composite
def series_parallel_parents(draw: st.DrawFn, *, depth: int = 3) -> list[list[int]]:
    """Series-parallel by construction, with skip edges that other paths imply."""
    parents: list[list[int]] = []

    def part(sources: list[int], level: int) -> list[int]:
        """Append a part after `sources`; returns its sinks."""
        kind = draw(st.integers(0, 2)) if level else 0
        if kind == 0:
            parents.append(list(sources))
            return [len(parents) - 1]
        if kind == 1:
            first = part(sources, level - 1)
            second = part(first, level - 1)
            if sources and draw(st.booleans()):
                skip = sorted({*parents[second[0]], sources[0]})
                parents[second[0]] = skip if second[0] not in skip else parents[second[0]]
            return second
        return [s for _ in range(draw(st.integers(2, 3))) for s in part(sources, level - 1)]

    part([], depth)
    return parents


@st.composite
def graphs(
    draw: st.DrawFn,
    *,
    max_operators: int = 12,
    parents: Callable[[], st.SearchStrategy[list[list[int]]]] | None = None,
    all_train: bool = False,
    ties: bool = True,
) -> ComputationGraph:
    """Random graphs: unequal work and sizes, batch-coupled and frozen operators, and with `ties`
    two of the same parameter."""
    found = draw(parents() if parents else parent_lists(max_operators=max_operators))
    names = [f"o{i}" for i in range(len(found))]

    def some() -> list[str]:
        return [name for name in names if draw(st.integers(0, 4)) == 0]

    parameters = {name: draw(st.sampled_from([0, 1 << 12, 1 << 20])) + all_train * 4 for name in names}
    frozen = [] if all_train else some()
    tied: dict[str, str] = {}
    if ties and len(names) > 1 and draw(st.integers(0, 3)) == 0:
        first, second = sorted(draw(st.sets(st.sampled_from(names), min_size=2, max_size=2)))
        if parameters[first] and (first in frozen) == (second in frozen):
            tied, parameters[second] = {second: first}, parameters[first]
    return make_graph(
        found,
        flops={name: 1e8 * draw(st.integers(0, 20)) for name in names},
        parameters=parameters,
        stash={name: float(draw(st.sampled_from([0, 1 << 10, 1 << 18]))) for name in names},
        width=draw(st.sampled_from([1, 256, 4096])),
        coupled=some(),
        frozen=frozen,
        tied=tied,
    )
