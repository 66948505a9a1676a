import dataclasses
import json

import pytest
from hypothesis import given, settings

from gpp.graph import ComputationGraph, Operator, Tensor
from gpp.plan import (
    Edge,
    Plan,
    PlanError,
    Policy,
    Shared,
    Stage,
    StageGraph,
    StageSeconds,
    check_plan,
    plan_from_json,
    plan_to_json,
    stage_memory,
)
from tests.strategies import FREE_DEVICE, chain, make_plan, plans

DIAMOND = make_plan([(0, 1), (0, 2), (1, 3), (2, 3)], [2, 2, 2, 2], 8, replicas=[1, 2, 1, 1], idle=2)
STAGE = DIAMOND.stage_graph.stages[0]


def with_stage(plan: Plan, index: int, **changes: object) -> Plan:
    stages = list(plan.stage_graph.stages)
    stages[index] = dataclasses.replace(stages[index], **changes)
    return dataclasses.replace(plan, stage_graph=dataclasses.replace(plan.stage_graph, stages=tuple(stages)))


def test_what_a_plan_knows_of_itself():
    graph = DIAMOND.stage_graph
    assert graph.successors == ((1, 2), (3,), (3,), ())
    assert graph.predecessors == ((), (0,), (0,), (1, 2))
    assert graph.depth == 3
    assert make_plan([], [1, 1], 1).stage_graph.depth == 1
    assert DIAMOND.idle_devices == (5, 6)
    assert STAGE.seconds.backward == 2.0
    assert [e.needs_grad for e in make_plan(chain(3), [1] * 3, 1, no_grad=[(0, 1)]).stage_graph.edges] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dataclasses.replace(STAGE, operators=()), "stage stage0 has no operators"),
        (lambda: dataclasses.replace(STAGE, devices=()), "stage stage0 needs distinct devices"),
        (lambda: dataclasses.replace(STAGE, devices=(1, 1)), r"distinct devices, it has \(1, 1\)"),
        (lambda: dataclasses.replace(STAGE, micro_batch=0), "must be at least 1, they are 0"),
        (lambda: dataclasses.replace(STAGE, k=0), "must be at least 1"),
        (lambda: dataclasses.replace(STAGE, in_flight=0), "must be at least 1"),
        (
            lambda: dataclasses.replace(STAGE, devices=(0, 1, 2), micro_batch=4),
            "micro-batch 4 of stage stage0 does not divide over its 3 devices",
        ),
        (lambda: StageGraph((STAGE,), (Edge(0, 0, (), 1, 1),)), "edge 0 -> 0: stages must be numbered"),
        (lambda: StageGraph((STAGE,) * 2, (Edge(1, 0, (), 1, 1),)), "in topological order, 0 to 1"),
        (lambda: StageGraph((STAGE,) * 2, (Edge(0, 2, (), 1, 1),)), "edge 0 -> 2"),
        (lambda: StageGraph((STAGE,) * 2, (Edge(0, 1, (), 1, 1),) * 2), "unique and sorted"),
        (
            lambda: StageGraph((STAGE,) * 3, (Edge(1, 2, (), 1, 1), Edge(0, 1, (), 1, 1))),
            "unique and sorted",
        ),
        (lambda: StageGraph((STAGE,), (), (Shared(("w",), 4, (0, 1)),)), "names a stage that is not there"),
        (
            lambda: Policy("fastest"),
            "schedule 'fastest' is unknown; it can be 1f1b, gpipe, zero-bubble, greedy",
        ),
        (lambda: Policy(extra_warm_up=-1), "extra_warm_up must not be negative, it is -1"),
        (lambda: dataclasses.replace(DIAMOND, mini_batch=0), "mini_batch must be at least 1"),
        (lambda: dataclasses.replace(DIAMOND, mini_batch=9), "does not divide the mini-batch 9"),
        (lambda: with_stage(DIAMOND, 3, devices=(7,)), "uses device 7; the cluster has devices 0 to 6"),
        (
            lambda: with_stage(DIAMOND, 3, devices=(2,)),
            "device 2 belongs to stage stage1 and to stage stage3",
        ),
    ],
)
def test_rules_are_stated_with_the_value_that_breaks_them(make, message):
    with pytest.raises(PlanError, match=message):
        make()


class TestJson:
    @settings(max_examples=50, deadline=None)
    @given(plans())
    def test_there_and_back(self, plan: Plan):
        assert plan_from_json(plan_to_json(plan)) == plan

    @pytest.mark.parametrize(
        "place, value, message",
        [
            (("mini_batch",), "8", r"not a plan: Plan\.mini_batch must be of type int, it is '8'"),
            (("mini_batch",), 7, "does not divide the mini-batch 7"),
            (("policy", "name"), "best", "schedule 'best' is unknown"),
            (("stage_graph", "stages", 1, "devices"), [0, 0], "needs distinct devices"),
            (("stage_graph", "edges", 0, "source"), None, r"edges\[0\]\.source must be of type int"),
            (
                ("topology", "per_host"),
                0,
                "not a plan: Plan.topology: cluster test: per_host must be at least 1",
            ),
        ],
    )
    def test_a_file_that_breaks_a_rule(self, place, value, message):
        data = json.loads(plan_to_json(DIAMOND))
        at = data
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        with pytest.raises(PlanError, match=message):
            plan_from_json(json.dumps(data))

    def test_something_else(self):
        with pytest.raises(PlanError, match="not a plan: malformed JSON"):
            plan_from_json("plan")


class TestMemory:
    def test_by_hand(self):
        stage = Stage(
            "s", ("op",), (0, 1), 4, 8, StageSeconds(1, 1, 1),
            stash=10.0, parameter_bytes=100, trainable_bytes=60, optimizer_bytes=120, buffer_bytes=7,
        )  # fmt: skip
        sink = dataclasses.replace(stage, name="t", devices=(2,), in_flight=4)
        graph = StageGraph((stage, sink), (Edge(0, 1, ("x",), 8, 4),))
        source, target = stage_memory(graph, 0), stage_memory(graph, 1)
        assert (source.parameters, source.gradients, source.optimizer, source.buffers) == (100, 60, 120, 7)
        assert source.stash == 10 * 8 / 2  # a replica keeps its share of the samples in flight
        assert target.stash == 10 * 4
        # both ends hold as many messages as the source has in flight
        assert source.messages == (8 + 4) * 8 / 2
        assert target.messages == (8 + 4) * 8
        assert source.total == 100 + 60 + 120 + 7 + 40 + 48

    def test_a_plan_that_does_not_fit(self):
        need = max(stage_memory(DIAMOND.stage_graph, s).total for s in range(4))

        def on(memory: float) -> Plan:
            devices = (dataclasses.replace(FREE_DEVICE, memory=memory),) * 7
            return dataclasses.replace(
                DIAMOND, topology=dataclasses.replace(DIAMOND.topology, devices=devices)
            )

        check_plan(on(need))
        with pytest.raises(PlanError, match=r"stage stage\d needs .* MiB on device \d, which has"):
            check_plan(on(need - 1))

    def test_an_estimate_below_its_bound(self):
        claimed = dataclasses.replace(DIAMOND, lower_bound=2.0, bound_by="work")
        check_plan(dataclasses.replace(claimed, estimate=2.0))
        with pytest.raises(PlanError, match=r"1\.9 s is below what no plan can beat, 2 s \(work\)"):
            check_plan(dataclasses.replace(claimed, estimate=1.9))


def operator(name: str, inputs: str, outputs: str, coupled: bool = False) -> Operator:
    tensors = tuple(Tensor(t, (1,), "float32", True) for t in outputs.split())
    return Operator(name, "k", tuple(inputs.split()), tensors, batch_coupled=coupled)


class TestAgainstTheGraph:
    graph = ComputationGraph(
        (
            operator("operator0", "", "a"),
            operator("operator1", "a", "b"),
            operator("operator2", "a", "c"),
            operator("operator3", "b c", "d"),
        )
    )

    def test_the_plan_of_this_graph(self):
        check_plan(DIAMOND, self.graph)

    @pytest.mark.parametrize(
        "plan, message",
        [
            (with_stage(DIAMOND, 1, operators=("other",)), "has operator other, which the model has not"),
            (with_stage(DIAMOND, 1, operators=("operator0",)), "operator operator0 is in two stages"),
            (
                make_plan(chain(2), [2, 2], 8),
                "operator operator2 and 1 more are in no stage",
            ),
            (
                with_stage(make_plan(chain(3), [2] * 3, 8), 0, operators=("operator0", "operator3")),
                "stage stage0 is not convex",
            ),
            (
                make_plan([(0, 1), (0, 2), (1, 3)], [2] * 4, 8),
                r"edges \[\(0, 1\), \(0, 2\), \(1, 3\)\] are not those of the model",
            ),
        ],
    )
    def test_another_graphs_plan(self, plan, message):
        with pytest.raises(PlanError, match=message):
            check_plan(plan, self.graph)

    def test_no_replicas_for_an_operator_that_mixes_samples(self):
        operators = list(self.graph.operators)
        operators[1] = operator("operator1", "a", "b", coupled=True)
        with pytest.raises(PlanError, match="stage stage1 has 2 replicas, but operator1 mixes samples"):
            check_plan(DIAMOND, ComputationGraph(tuple(operators)))
