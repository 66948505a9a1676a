import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.graph import ComputationGraph, Operator, Parameter, Tensor, Work
from gpp.plan import Plan, PlanError, Policy, Shared, check_plan
from gpp.planner.estimate import (
    Group,
    Problem,
    assemble,
    busy_seconds,
    estimated,
    peak_memory,
    rough_seconds,
)
from gpp.planner.options import Options
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.simulate import simulate
from gpp.topology import Device, DeviceTopology, Link
from tests.graphs import chain, graphs, make_cluster, make_graph, towers


def assembled(graph: ComputationGraph, *groups: str | tuple[str, int], **settings) -> Plan:
    """Groups as "a b" or ("a b", devices)."""
    pairs = [group if isinstance(group, tuple) else (group, 1) for group in groups]
    found = [Group(tuple(graph.index[n] for n in names.split()), count) for names, count in pairs]
    topology = settings.pop("topology", None) or make_cluster(sum(count for _, count in pairs))
    options = Options(**{"mini_batch": 16, "micro_batch": 4} | settings)
    return assemble(Problem(graph, topology, Roofline(), options), found, options.micro_batches[0], "test")


def test_a_plan_says_everything_about_its_stages():
    graph = make_graph(
        {"a": "", "b": "a", "c": "a", "d": "b c"},
        flops={"a": 1e9, "b": 2e9, "c": 3e9, "d": 4e9},
        parameters={"a": 100, "b": 200, "c": 300, "d": 400},
        stash={"a": 10, "b": 20, "c": 30, "d": 40},
        frozen=["a"],
        width=8,
    )
    plan = assembled(graph, "a b", ("c d", 2), optimizer_factor=1.5, global_norm=True, precision="bfloat16")
    check_plan(plan, graph)
    check(plan, lower(plan))
    first, second = plan.stage_graph.stages
    assert (first.name, first.operators, first.devices) == ("a…b", ("a", "b"), (0,))
    assert (second.operators, second.devices, second.micro_batch) == (("c", "d"), (1, 2), 4)
    assert (first.in_flight, second.in_flight) == (8, 4)
    assert (first.stash, second.stash) == (20, 70)  # nothing is kept for a backward that a has not
    assert (first.parameter_bytes, first.trainable_bytes, first.optimizer_bytes) == (300, 200, 300)
    assert (first.batch_keys, first.terms) == (("a.key",), ())
    assert (second.batch_keys, second.terms) == ((), ("d.loss",))
    assert first.seconds.forward == pytest.approx(4 * 3e9 / 1e13)
    assert first.seconds.backward_input == 0  # its only input is data, and a needs no gradient
    assert first.seconds.backward_weight == pytest.approx(4 * 2e9 / 1e13)
    assert first.seconds.update == pytest.approx(7 * 200 / 1e12)
    assert second.seconds.forward == pytest.approx(2 * 7e9 / 1e13)  # two samples a replica
    assert second.seconds.backward_weight == pytest.approx(2 * 7e9 / 1e13)
    (edge,) = plan.stage_graph.edges
    assert (edge.source, edge.target, edge.tensors) == (0, 1, ("a.out", "b.out"))
    assert (edge.bytes, edge.gradient_bytes) == (64, 32)
    assert (plan.mini_batch, plan.planner, plan.precision, plan.global_norm) == (16, "test", "bfloat16", True)
    assert plan.fingerprints.graph == graph.fingerprint()
    assert plan.fingerprints.topology == plan.topology.fingerprint()
    assert plan.fingerprints.costs == Roofline().fingerprint()


def test_a_tensor_that_a_stage_reads_twice_is_sent_once():
    graph = make_graph({"a": "", "b": "a", "c": "a b", "d": "a"}, width=4)
    plan = assembled(graph, "a", "b c", "d")
    assert [(e.source, e.target, e.tensors, e.bytes) for e in plan.stage_graph.edges] == [
        (0, 1, ("a.out",), 16),
        (0, 2, ("a.out",), 16),
    ]


def test_only_stages_with_a_backward_have_one():
    graph = make_graph(
        {"frozen": "", "body": "frozen", "loss": "body"},
        parameters={"frozen": 40, "body": 40},
        frozen=["frozen"],
    )
    plan = assembled(graph, "frozen", "body", "loss")
    assert [s.has_backward for s in plan.stage_graph.stages] == [False, True, True]
    assert [e.needs_grad for e in plan.stage_graph.edges] == [False, True]
    assert plan.stage_graph.stages[0].seconds.backward == 0
    assert plan.stage_graph.stages[2].trainable_bytes == 0
    assert plan.stage_graph.stages[2].seconds.update == 0
    check(plan, lower(plan))


def test_tied_parameters_are_named_with_all_their_stages():
    parents = {"a": "", "b": "a", "c": "b", "d": "c", "e": "d"}
    tied = {"c": "a", "d": "b", "e": "b"}
    graph = make_graph(parents, parameters=40, tied=tied)
    plan = assembled(graph, "a b", "c", "d e")
    assert plan.stage_graph.shared == (
        Shared(("a.weight",), 40, (0, 1)),
        Shared(("b.weight",), 40, (0, 2)),
    )
    assert [s.parameter_bytes for s in plan.stage_graph.stages] == [80, 40, 40]
    assert assembled(graph, "a b c d e").stage_graph.shared == ()
    frozen = make_graph(parents, parameters=40, tied=tied, frozen="abcde")
    assert assembled(frozen, "a b", "c", "d e").stage_graph.shared == ()  # no gradient to sum


def test_stages_are_numbered_topologically_and_otherwise_as_given():
    graph = make_graph(towers(2, 2))
    plan = assembled(graph, "join", "t1.l0 t1.l1", "t0.l0 t0.l1")
    assert [s.name for s in plan.stage_graph.stages] == ["t1", "t0", "join"]
    assert [s.devices for s in plan.stage_graph.stages] == [(0,), (1,), (2,)]


def test_bad_partitions_are_refused():
    graph = make_graph(chain(3))
    with pytest.raises(PlanError, match="2 stages depend on each other in a circle"):
        assembled(graph, "o0 o2", "o1")
    with pytest.raises(PlanError, match="the stages need 3 devices, the cluster has 2"):
        assembled(graph, "o0", ("o1 o2", 2), topology=make_cluster(2))


@pytest.mark.parametrize(
    "policy, expected",
    [(Policy(), (12, 8, 4)), (Policy("gpipe"), (16, 16, 16)), (Policy(extra_warm_up=1), (16, 12, 4))],
)
def test_samples_in_flight_follow_the_policy(policy, expected):
    plan = assembled(make_graph(chain(3)), "o0", "o1", "o2", policy=policy)
    assert tuple(s.in_flight for s in plan.stage_graph.stages) == expected


def test_of_unequal_replicas_the_slowest_counts():
    fast, slow = Device("fast", 1e9, 4e12, 1e12), Device("slow", 1e9, 1e12, 1e12)
    mixed = DeviceTopology("mixed", (fast, slow, fast), 3, Link(0, 1e9), Link(0, 1e9))
    plan = assembled(make_graph({"a": "", "b": "a"}, flops=1e9), ("a", 2), "b", topology=mixed)
    first, second = plan.stage_graph.stages
    assert first.seconds.forward == pytest.approx(2e9 / 1e12)
    assert second.seconds.forward == pytest.approx(4e9 / 4e12)


def test_buffers_and_keys_count_once():
    shared = Parameter("w", 8, True)
    out = Tensor("x", (1,), "float32", True)
    graph = ComputationGraph(
        (
            Operator("a", "k", (), (out,), batch_keys=("text",), parameters=(shared,), buffer_bytes=3),
            Operator(
                "b", "k", ("x",), (), batch_keys=("text", "label"), parameters=(shared,),
                buffer_bytes=4, backward_input=Work(1.0), terms=("loss",),
            ),
        ),
        loss_weighted=True,
    )  # fmt: skip
    plan = assembled(graph, "a b")
    (stage,) = plan.stage_graph.stages
    assert (stage.parameter_bytes, stage.trainable_bytes, stage.buffer_bytes) == (8, 8, 7)
    assert (stage.batch_keys, stage.terms) == (("text", "label"), ("loss",))
    assert plan.loss_weighted


def test_the_estimate_is_the_simulators():
    plan = estimated(assembled(make_graph(towers(2, 3)), "t0.l0 t0.l1 t0.l2", "t1.l0 t1.l1 t1.l2", "join"))
    assert plan.estimate > 0
    assert plan.estimate == pytest.approx(simulate(plan).step_seconds, rel=1e-9)


@pytest.mark.parametrize("depth, micro_batch", [(1, 4), (2, 4), (4, 1), (4, 2)])
def test_the_rough_step_time_is_exact_for_balanced_chains(depth, micro_batch):
    graph = make_graph(chain(depth), parameters=4, backward=2.0)
    operators = tuple(
        Operator(
            op.name, op.kind, op.inputs, op.outputs, parameters=op.parameters,
            forward=Work(1e9), backward_input=Work(1e9), backward_weight=Work(1e9),
        )
        for op in graph.operators
    )  # fmt: skip
    free = Link(0, float("inf"))
    cluster = make_cluster(depth, inside=free)
    groups = [f"o{i}" for i in range(depth)]
    plan = assembled(ComputationGraph(operators), *groups, micro_batch=micro_batch, topology=cluster)
    assert rough_seconds(plan) == pytest.approx(simulate(plan).step_seconds, rel=1e-6)


@settings(max_examples=80, deadline=None)
@given(graphs(max_operators=8, all_train=True), st.data())
def test_any_convex_partition_becomes_a_valid_plan(graph, data):
    """Cuts of a topological order into pieces, each on some devices."""
    count = len(graph.operators)
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=4))) if count > 1 else []
    groups = []
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        coupled = any(op.batch_coupled for op in graph.operators[start:stop])
        groups.append(Group(tuple(range(start, stop)), 1 if coupled else data.draw(st.sampled_from([1, 2]))))
    policy = data.draw(st.sampled_from([Policy(), Policy("gpipe"), Policy(extra_warm_up=1)]))
    options = Options(mini_batch=8, micro_batch=2, policy=policy)
    cluster = make_cluster(10, per_host=data.draw(st.integers(1, 4)), memory=1e12)
    plan = assemble(Problem(graph, cluster, Roofline(), options), groups, 2, "test")
    check_plan(plan, graph)
    check(plan, lower(plan))
    assert peak_memory(plan) > 0
    assert busy_seconds(plan) <= estimated(plan).estimate * (1 + 1e-9)
