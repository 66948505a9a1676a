"""Plans and graphs to test with: small ones written by hand, and random ones for hypothesis."""

import math
from collections.abc import Sequence

from hypothesis import strategies as st

from gpp.graph import DTYPE_BYTES, ComputationGraph, Operator, Parameter, Tensor, Work
from gpp.plan import (
    Edge,
    Fingerprints,
    Plan,
    Policy,
    Shared,
    Stage,
    StageGraph,
    StageSeconds,
)
from gpp.planner.options import Constraints
from gpp.schedule.inflight import in_flight
from gpp.topology import Device, DeviceTopology, Link

FREE = Link(latency=0.0, bandwidth=float("inf"))
FREE_DEVICE = Device("free", memory=float("inf"), flops=1.0, bandwidth=1.0)


def make_plan(
    edges: Sequence[tuple[int, int]],
    micro_batches: Sequence[int],
    mini_batch: int,
    *,
    replicas: Sequence[int] | None = None,
    ks: Sequence[int] | None = None,
    policy: Policy | None = None,
    seconds: Sequence[StageSeconds] | None = None,
    frozen: Sequence[int] = (),
    no_grad: Sequence[tuple[int, int]] = (),
    shared: Sequence[tuple[int, ...]] = (),
    idle: int = 0,
    link: Link = FREE,
    between: Link | None = None,
    per_host: int = 10**6,
    loss_weighted: bool = False,
    global_norm: bool = False,
    orders: Sequence[tuple[int, int]] = (),
    recompute: Sequence[int] = (),
    lags: Sequence[int] | None = None,
    held: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
) -> Plan:
    """A plan over the stage graph with these edges; stages get consecutive devices.

    `frozen` stages have no backward and no parameters to train; `no_grad` edges carry no gradient and
    `orders` nothing at all; `shared` are the stages of each tied parameter; sinks have terms. A forward takes
    1 second and a backward 2 unless `seconds` says otherwise. `lags` are added to what 1F1B has in flight,
    `held` are samples in flight instead. Stages with the same number in `slots` share their devices.
    """
    count = len(micro_batches)
    policy = policy or Policy()
    replicas = replicas or [1] * count
    ks = ks or [1] * count
    pairs = sorted(edges)
    successors = [[t for s, t in pairs if s == u] for u in range(count)]
    if held is None:
        held = in_flight(successors, micro_batches, policy, mini_batch, ks=ks)
        held = [h + b * lag for h, b, lag in zip(held, micro_batches, lags or [0] * count, strict=True)]
    places: dict[int, tuple[int, ...]] = {}
    for u in range(count):
        first = sum(map(len, places.values()))
        places.setdefault(u if slots is None else slots[u], tuple(range(first, first + replicas[u])))
    stages = []
    for u in range(count):
        train = u not in frozen
        stages.append(
            Stage(
                name=f"stage{u}",
                operators=(f"operator{u}",),
                devices=places[u if slots is None else slots[u]],
                micro_batch=micro_batches[u],
                in_flight=held[u],
                seconds=seconds[u] if seconds else StageSeconds(1.0, 1.0, 1.0),
                k=ks[u],
                weight_lag=lags[u] if lags else 0,
                recompute=u in recompute,
                stash=10.0 if train else 0.0,
                parameter_bytes=100,
                trainable_bytes=100 if train else 0,
                terms=() if successors[u] else (f"loss{u}",),
                has_backward=train,
            )
        )
    joins = tuple(
        Edge(s, t, (), 0, 0)
        if (s, t) in orders
        else Edge(
            source=s,
            target=t,
            tensors=(f"value{s}to{t}",),
            bytes=8,
            gradient_bytes=0 if (s, t) in no_grad or s in frozen or t in frozen else 4,
        )
        for s, t in pairs
    )
    first = sum(map(len, places.values()))
    tied = tuple(Shared((f"tied{i}",), 40, tuple(stages_)) for i, stages_ in enumerate(shared))
    return Plan(
        stage_graph=StageGraph(tuple(stages), joins, tied),
        topology=DeviceTopology("test", (FREE_DEVICE,) * (first + idle), per_host, link, between or link),
        mini_batch=mini_batch,
        policy=policy,
        fingerprints=Fingerprints("graph", "costs", "topology"),
        planner="test",
        loss_weighted=loss_weighted,
        global_norm=global_norm,
    )


def chain(count: int) -> list[tuple[int, int]]:
    """Edges of stages one after the other."""
    return [(u, u + 1) for u in range(count - 1)]


@st.composite
def plans(
    draw: st.DrawFn,
    *,
    max_stages: int = 8,
    uniform: bool | None = None,
    max_replicas: int = 4,
    all_gradients: bool = False,
    sizes: tuple[int, ...] = (1, 2, 4, 8),
    scheduled: bool = False,
) -> Plan:
    """Random stage DAGs: skips, several sources and sinks, mixed micro-batches, k, replicas, frozen stages,
    edges without gradient, tied parameters, links and times of any kind, fused policies.

    `uniform` fixes whether all micro-batches are equal; with `all_gradients` every stage has a backward and
    every edge a gradient; `sizes` are the micro-batches to draw from. `scheduled` plans also have every other
    policy, control edges, stages that recompute and stages that share devices.
    """
    count = draw(st.integers(2, max_stages))
    pairs = [(u, v) for v in range(count) for u in range(v)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=2 * count))
    if draw(st.booleans()):  # no stage on its own, as in most models
        lonely = [v for v in range(1, count) if not any(v in pair for pair in edges)]
        edges += [(draw(st.integers(0, v - 1)), v) for v in lonely]
    same = draw(st.booleans()) if uniform is None else uniform
    size = draw(st.sampled_from(sizes))
    micro_batches = [size if same else draw(st.sampled_from(sizes)) for _ in range(count)]
    replicas = [
        draw(st.sampled_from([d for d in (1, 2, 4) if b % d == 0 and d <= max_replicas]))
        for b in micro_batches
    ]
    ks = draw(st.sampled_from([[1] * count, [draw(st.sampled_from([1, 2])) for _ in range(count)]]))
    frozen: list[int] = []
    no_grad: list[tuple[int, int]] = []
    if not all_gradients:
        frozen = [u for u in range(count) if draw(st.integers(0, 4)) == 0]
        no_grad = [pair for pair in edges if draw(st.integers(0, 4)) == 0]
    tied = st.lists(st.integers(0, count - 1), min_size=2, max_size=3, unique=True).map(tuple)
    times = st.integers(0, 8).map(float)
    link = st.builds(Link, st.integers(0, 4).map(float), st.sampled_from([1.0, 10.0, float("inf")]))
    mini_batch = math.lcm(*micro_batches) * draw(st.integers(1, 6))
    policies = [Policy(), Policy(extra_warm_up=1), Policy("gpipe")]
    if scheduled:
        policies += [Policy("zero-bubble"), Policy("greedy"), Policy("greedy", patience=0.5)]
    policy = draw(st.sampled_from(policies))
    splits = policy.name in ("zero-bubble", "greedy")
    return make_plan(
        edges,
        micro_batches,
        mini_batch,
        replicas=replicas,
        ks=ks,
        policy=policy,
        seconds=[
            StageSeconds(
                draw(times), draw(times), draw(times), draw(times) if scheduled else 0.0, draw(times)
            )
            for _ in range(count)
        ],
        frozen=frozen,
        no_grad=no_grad,
        shared=draw(st.lists(tied, max_size=2)),
        idle=draw(st.integers(0, 2)),
        link=draw(link),
        between=draw(link),
        per_host=draw(st.integers(1, 4)),
        loss_weighted=draw(st.booleans()),
        global_norm=draw(st.booleans()),
        orders=[pair for pair in edges if draw(st.integers(0, 3)) == 0] if scheduled else (),
        recompute=[u for u in range(count) if draw(st.booleans())] if scheduled else (),
        lags=[draw(st.integers(0, 3)) if u not in frozen else 0 for u in range(count)] if splits else None,
        slots=draw(_slots(replicas)) if scheduled and draw(st.booleans()) else None,
    )


@st.composite
def _slots(draw: st.DrawFn, replicas: Sequence[int]) -> list[int]:
    """Which stages share devices: each has its own, or those of one before it with as many."""
    found: list[int] = []
    for u, count in enumerate(replicas):
        same = [found[v] for v in range(u) if replicas[v] == count]
        found.append(draw(st.sampled_from([u, *same])))
    return found


@st.composite
def computation_graphs(draw: st.DrawFn, *, max_operators: int = 8) -> ComputationGraph:
    """Random operators in topological order, with several outputs, unused ones, and any edges."""
    count = draw(st.integers(1, max_operators))
    operators: list[Operator] = []
    tensors: list[str] = []
    for i in range(count):
        inputs = draw(st.lists(st.sampled_from(tensors), unique=True, max_size=3)) if tensors else []
        outputs = tuple(
            Tensor(
                f"t{i}.{j}",
                tuple(draw(st.lists(st.integers(0, 5), max_size=3))),
                draw(st.sampled_from(sorted(DTYPE_BYTES))),
                draw(st.booleans()),
            )
            for j in range(draw(st.integers(0, 2)))
        )
        tensors += [t.name for t in outputs]
        parameters = (Parameter(f"w{i}", draw(st.integers(0, 64)), draw(st.booleans())),)
        operators.append(
            Operator(
                name=f"op{i}",
                kind=draw(st.sampled_from(["linear", "norm"])),
                inputs=tuple(inputs),
                outputs=outputs,
                parameters=parameters if draw(st.booleans()) else (),
                forward=Work(flops=draw(st.integers(0, 9)), bytes=draw(st.integers(0, 9)), kernels=1),
                stash=float(draw(st.integers(0, 9))),
                batch_coupled=draw(st.booleans()),
            )
        )
    return ComputationGraph(tuple(operators), loss_weighted=draw(st.booleans()))


@st.composite
def constraints(draw: st.DrawFn, count: int) -> Constraints:
    """About the operators o0, o1, ...: some contradict each other."""
    names = st.integers(0, count - 1).map(lambda i: f"o{i}")
    return Constraints(
        together=tuple(draw(st.lists(st.tuples(names, names), max_size=2))),
        pins=tuple(draw(st.lists(st.tuples(names, st.sampled_from("AB")), max_size=2))),
        replicas=tuple(draw(st.lists(st.tuples(names, st.sampled_from([1, 2, 3])), max_size=2))),
    )
