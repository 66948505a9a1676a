import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.formats.piper import RECOMPUTED, PiperInstance, PiperNode, PiperVariant, read_piper
from gpp.plan import PlanError, check_plan
from gpp.planner.downsets import TooManyDownsets
from gpp.planner.options import Constraints, Options
from gpp.planner.piper import plan, solve
from tests.graphs import chain, graphs, make_cluster, make_graph, parent_lists, towers
from tests.planner.brute import Stages, pipelines

PROFILES = Path(os.environ.get("GPP_PROFILES", Path(__file__).parents[3] / "shared" / "profiles"))
REFERENCE = PROFILES / "piper_reference.jsonl"


def knapsack(choices: list[list[tuple[float, float]]], memory: float) -> float:
    """Piper's own choice among (seconds, bytes) of every node."""
    picked = [min(range(len(c)), key=lambda i, c=c: (c[i][0], i)) for c in choices]
    excess = sum(c[i][1] for c, i in zip(choices, picked, strict=True)) - memory
    if excess > 0:
        if sum(min(size for _, size in c) for c in choices) > memory:
            return math.inf
        swaps = []
        for v, (c, i) in enumerate(zip(choices, picked, strict=True)):
            for j, (seconds, size) in enumerate(c):
                if c[i][1] - size > 1e-9:
                    swaps.append(((seconds - c[i][0]) / (c[i][1] - size), v, j))
        for _, v, j in sorted(swaps):
            excess -= choices[v][picked[v]][1] - choices[v][j][1]
            picked[v] = j
            if excess < 1e-9:
                break
    return sum(c[i][0] for c, i in zip(choices, picked, strict=True))


def piper_stage(instance: PiperInstance, stage: frozenset[int], t: int, d: int, s: int) -> float:
    """Seconds of a stage whose replicas and those after it are s."""
    choices = []
    for v in sorted(stage):
        crossing = [
            sum(
                2 * (size + one.received.get(u, 0))
                for (u, w), size in instance.edges.items()
                if w == v and u not in stage
            )
            + sum(
                2 * (size + one.sent.get(w, 0))
                for (u, w), size in instance.edges.items()
                if u == v and w not in stage
            )
            for one in instance.nodes[v].variants.get(t, ())
        ]
        choices.append(
            [
                (
                    one.seconds / d
                    + (bytes_ / d + 4 * (d - 1) * one.parameter_bytes / d / instance.micro_batches)
                    / instance.bandwidth,
                    one.slope * -(-s // d) + one.base,
                )
                for one, bytes_ in zip(instance.nodes[v].variants.get(t, ()), crossing, strict=True)
            ]
        )
    return knapsack(choices, instance.memory) if all(choices) else math.inf


def piper_brute(instance: PiperInstance) -> float:
    n = len(instance.nodes)
    after = [[v for u, v in instance.edges if u == w] for w in range(n)]
    degrees = sorted({t for node in instance.nodes for t in node.variants})
    kinds = [
        (t, d) for t in degrees for d in range(1, instance.devices + 1) if instance.micro_batches % d == 0
    ]
    most = min(instance.devices, instance.micro_batches)

    def best(stages: Stages, devices: int, replicas: int) -> float:
        if not stages:
            return 0.0
        return min(
            (
                max(
                    piper_stage(instance, stages[0], t, d, replicas + d),
                    best(stages[1:], devices + t * d, replicas + d),
                )
                for t, d in kinds
                if devices + t * d <= instance.devices and replicas + d <= most
            ),
            default=math.inf,
        )

    return min(best(found, 0, 0) for found in pipelines(after, frozenset(range(n))))


@st.composite
def instances(
    draw: st.DrawFn, *, most: int = 5, kinds: int = 1, degrees: tuple[int, ...] = (1,)
) -> PiperInstance:
    parents = draw(parent_lists(max_operators=most))
    edges = {(u, v): float(draw(st.integers(0, 6))) for v, us in enumerate(parents) for u in us}

    def variant(i: int, v: int) -> PiperVariant:
        seconds = draw(st.integers(0, 9)) + 10.0 * i  # who recomputes is slower
        return PiperVariant(
            name=("vanilla", RECOMPUTED)[i],
            seconds=seconds,
            parameter_bytes=float(draw(st.integers(0, 9))),
            slope=float(draw(st.integers(0, 4)) * (2 - i)),
            base=float(draw(st.integers(0, 4))),
            received={u: float(draw(st.integers(0, 3))) for u, w in edges if w == v} if kinds > 1 else {},
            sent={w: float(draw(st.integers(0, 3))) for u, w in edges if u == v} if kinds > 1 else {},
        )

    nodes = tuple(
        PiperNode(v, f"n{v}", {t: tuple(variant(i, v) for i in range(kinds)) for t in degrees})
        for v in range(len(parents))
    )
    devices = draw(st.integers(1, 4))
    memory = draw(st.sampled_from([1e9, 12.0, 20.0, 35.0]))
    return PiperInstance(
        nodes, edges, devices, memory, draw(st.sampled_from([1.0, 4.0])), draw(st.sampled_from([3, 4, 8]))
    )


@settings(max_examples=60, deadline=None)
@given(instances())
def test_the_least_bottleneck_of_all_pipelines(instance: PiperInstance) -> None:
    found = solve(instance)
    assert found.seconds == pytest.approx(piper_brute(instance), rel=1e-9)
    check_answer(instance, found.stages, found.seconds)


@settings(max_examples=25, deadline=None)
@given(instances(most=4, kinds=2, degrees=(1, 2)), st.booleans())
def test_variants_as_piper_chooses_them(instance: PiperInstance, tensor_parallelism: bool) -> None:
    found = solve(instance, tensor_parallelism=tensor_parallelism, recompute=True)
    allowed = instance
    if not tensor_parallelism:
        nodes = tuple(replace(node, variants={1: node.variants[1]}) for node in instance.nodes)
        allowed = replace(instance, nodes=nodes)
    # Piper's states are "at most", its choice not monotone: it may be charged more in flight and gain by it
    assert found.seconds <= piper_brute(allowed) * (1 + 1e-9)
    check_answer(instance, found.stages, found.seconds)


def test_a_slower_variant_with_fewer_parameters_may_win() -> None:
    """On three replicas 10 / 3 seconds without an all-reduce; 4 / 3 and 8 / 3 of it, or 4 on one."""
    both = (
        PiperVariant("vanilla", 4.0, 3.0, 0.0, 0.0, {}, {}),
        PiperVariant(RECOMPUTED, 10.0, 0.0, 0.0, 0.0, {}, {}),
    )
    instance = PiperInstance((PiperNode(0, "n0", {1: both}),), {}, 3, 1e9, 1.0, 3)
    found = solve(instance, recompute=True)
    assert found.seconds == pytest.approx(10 / 3)
    check_answer(instance, found.stages, found.seconds)


def check_answer(instance: PiperInstance, stages: Sequence[Any], seconds: float) -> None:
    """The stages are a pipeline, which with the variants they name fits the devices, in that time."""
    if math.isinf(seconds):
        assert not stages
        return
    assert sorted(v for stage in stages for v in stage.nodes) == list(range(len(instance.nodes)))
    place = {v: i for i, stage in enumerate(stages) for v in stage.nodes}
    assert all(place[u] <= place[v] for u, v in instance.edges)
    assert sum(s.replicas * s.tensor_parallel for s in stages) <= instance.devices
    slowest = 0.0
    for i, stage in enumerate(stages):
        left = sum(s.replicas for s in stages[i:])
        picked = {
            v: next(one for one in instance.nodes[v].variants[stage.tensor_parallel] if one.name == name)
            for v, name in zip(stage.nodes, stage.variants, strict=True)
        }
        alone = tuple(
            replace(node, variants={stage.tensor_parallel: (picked[v],)}) if v in picked else node
            for v, node in enumerate(instance.nodes)
        )
        one = replace(instance, nodes=alone)
        slowest = max(
            slowest, piper_stage(one, frozenset(stage.nodes), stage.tensor_parallel, stage.replicas, left)
        )
    assert slowest <= seconds * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 3),
    st.lists(st.tuples(*[st.integers(0, 5)] * 4), min_size=1, max_size=3),
    st.integers(1, 5),
    st.sampled_from([1e9, 25.0, 60.0]),
)
def test_equal_branches_collapsed_are_the_same_answer(
    branches: int, layers: list[tuple[int, ...]], devices: int, memory: float
) -> None:
    nodes, edges = [], {}

    def add(values: Sequence[float]) -> int:
        seconds, *rest = map(float, values)
        nodes.append(PiperNode(len(nodes), "n", {1: (PiperVariant("vanilla", seconds, *rest, {}, {}),)}))
        return len(nodes) - 1

    fork = add((1, 1, 1, 1))
    ends = []
    for _ in range(branches):
        last = fork
        for i, values in enumerate(layers):
            now = add(values)
            edges[last, now] = float(i + 1)
            last = now
        ends.append(last)
    join = add((2, 1, 1, 1))
    edges |= {(end, join): 2.0 for end in ends}
    instance = PiperInstance(tuple(nodes), edges, devices, memory, 1.0, 4)
    one, all_ = solve(instance, collapse=True), solve(instance)
    assert one.seconds == pytest.approx(all_.seconds, rel=1e-9)
    assert one.downsets < all_.downsets
    check_answer(instance, one.stages, one.seconds)


def needs_profiles(*values: Any) -> Any:
    return pytest.param(
        *values, marks=pytest.mark.skipif(not REFERENCE.is_file(), reason="needs the published profiles")
    )


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in REFERENCE.read_text().splitlines()] if REFERENCE.is_file() else []


def published(name: str) -> PiperInstance:
    return read_piper((PROFILES / name).read_text(), name)


@pytest.mark.parametrize(
    "row", rows(), ids=lambda r: f"{Path(r['file']).stem}-{r['k']}-{r['memGB']}-{'-'.join(r['flags'])}"
)
def test_pipers_own_answers(row: dict[str, Any]) -> None:
    found = solve(
        published(row["file"]),
        row["k"],
        memory=row["memGB"] * 2.0**30,
        bandwidth=row["bwGiBs"] * 2.0**30,
        tensor_parallelism="noTP" not in row["flags"],
        recompute="noAR" not in row["flags"],
    )
    expected = row["tps"] if row["tps"] < 1e29 else math.inf
    assert found.seconds == pytest.approx(expected, rel=1e-6) and found.downsets == row["downsets"]


@pytest.mark.parametrize(
    ("name", "devices", "seconds"),
    [
        # runs of minutes; five digits are known
        needs_profiles("piper/gnmt.json", 8, 65.057),
        needs_profiles("multibranch/mmt4x8_layers.piper.json", 8, 0.0073424),
    ],
)
def test_pipers_long_runs(name: str, devices: int, seconds: float) -> None:
    bandwidth = 25 * 2.0**30 if "gnmt" in name else 11.6 * 2.0**30
    found = solve(published(name), devices, memory=2.0**34, bandwidth=bandwidth)
    assert found.seconds == pytest.approx(seconds, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        needs_profiles("candle7x4", 797),
        needs_profiles("dlrm7x4+7", 28_517),
        needs_profiles("mmt4x8_layers", 716),
    ],
)
def test_too_many_downsets_are_refused_or_collapsed(name: str, count: int) -> None:
    instance = published(f"multibranch/{name}.piper.json")
    if count != 716:
        with pytest.raises(TooManyDownsets, match="more than 40000 downsets"):
            solve(instance)
    found = solve(instance, collapse=True)
    assert found.downsets == count
    check_answer(instance, found.stages, found.seconds)


@settings(max_examples=40, deadline=None)
@given(graphs(max_operators=8, all_train=True), st.integers(1, 5), st.sampled_from([3e6, 6e6, 1e7, 1e9]))
def test_plans_are_valid_sequential_pipelines(graph, devices, memory) -> None:
    assume(any(op.forward.flops for op in graph.operators))
    cluster = make_cluster(devices, memory=memory)
    try:
        found = plan(graph, cluster, Roofline(), Options(mini_batch=8))
    except PlanError as error:
        assert "no sequential pipeline fits" in str(error) or "by itself needs" in str(error)
        return
    check_plan(found, graph)
    stages = len(found.stage_graph.stages)
    assert found.stage_graph.depth == stages
    assert 0 < found.lower_bound <= found.estimate * (1 + 1e-9)
    held = [stage.in_flight // stage.micro_batch for stage in found.stage_graph.stages]
    rounds = 8 // found.stage_graph.stages[0].micro_batch
    assert held == [min(stages - i, rounds) for i in range(stages)]


def test_memory_moves_the_cuts() -> None:
    """The first stages of a chain hold more micro-batches: with little memory they get fewer operators."""
    graph = make_graph(chain(12), parameters=4, stash=1e6, width=1)
    options = Options(mini_batch=16, micro_batch=1, max_replicas=1)
    free = plan(graph, make_cluster(3), Roofline(), options)
    assert [len(stage.operators) for stage in free.stage_graph.stages] == [4, 4, 4]
    tight = plan(graph, make_cluster(3, memory=10.2e6), Roofline(), options)
    assert [len(stage.operators) for stage in tight.stage_graph.stages] == [3, 4, 5]
    with pytest.raises(PlanError, match="no sequential pipeline fits the 3 devices"):
        plan(graph, make_cluster(3, memory=5e6), Roofline(), options)


def test_operators_that_mix_samples_have_one_replica() -> None:
    graph = make_graph(chain(3), coupled=["o1"])
    found = plan(graph, make_cluster(8), Roofline(), Options(mini_batch=32))
    for stage in found.stage_graph.stages:
        assert len(stage.devices) == 1 or "o1" not in stage.operators


def test_constraints_are_kept() -> None:
    graph = make_graph(towers(2, 3))
    constraints = Constraints(
        together=(("t0.l0", "t0.l1"),), pins=(("t1.l0", "a"), ("t1.l1", "b")), replicas=(("join", 3),)
    )
    options = Options(mini_batch=12, micro_batch=6, constraints=constraints)
    found = plan(graph, make_cluster(8), Roofline(), options)
    stage_of = {name: stage for stage in found.stage_graph.stages for name in stage.operators}
    assert stage_of["t0.l0"] is stage_of["t0.l1"]
    assert stage_of["t1.l0"] is not stage_of["t1.l1"]
    assert len(stage_of["join"].devices) == 3
    check_plan(found, graph)


def test_equal_branches_collapsed_make_a_large_model_small_enough() -> None:
    graph = make_graph(towers(12, 4))
    found = plan(graph, make_cluster(8), Roofline(), Options(mini_batch=8, collapse=True))
    check_plan(found, graph)


def test_too_many_downsets_are_refused_at_once() -> None:
    graph = make_graph(towers(12, 4))
    with pytest.raises(PlanError, match=r"more than 40000 downsets: .* of its 49 operators.*collapse=true"):
        plan(graph, make_cluster(8), Roofline(), Options(mini_batch=8))
