import dataclasses
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.plan import Plan, Policy
from gpp.schedule.check import check
from gpp.schedule.grid import cell
from gpp.schedule.lower import closing, lower, returns_gradient
from gpp.schedule.pieces import micro_batches, piece
from gpp.schedule.task import (
    Compute,
    Direction,
    Pass,
    Receive,
    Reduce,
    Reduction,
    Report,
    Schedule,
    ScheduleError,
    Send,
    Update,
)
from tests.strategies import chain, make_plan, plans


def lines(schedule: Schedule) -> list[str]:
    return ["  ".join(map(cell, program)) for program in schedule.programs]


def test_a_chain_of_two():
    schedule = lower(make_plan(chain(2), [2, 2], 4))
    assert lines(schedule) == [
        "F[0,2)  >1 a0[0,2)  F[2,4)  >1 a0[2,4)  <1 g0[0,2)  B[0,2)  <1 g0[2,4)  B[2,4)  update",
        "<0 a0[0,2)  F[0,2)  B[0,2)  >0 g0[0,2)  <0 a0[2,4)  F[2,4)  B[2,4)  >0 g0[2,4)  report  update",
    ]
    assert [(c.source, c.target, c.tag, c.slots, c.bytes) for c in schedule.channels] == [
        (0, 1, 0, 2, 16),
        (1, 0, 1, 2, 8),
    ]


def test_a_coarse_stage_receives_several_messages_and_a_fine_one_parts():
    fine_to_coarse = lower(make_plan(chain(2), [1, 2], 2))
    assert lines(fine_to_coarse)[1].startswith(
        "<0 a0[0,1)  <0 a0[1,2)  F[0,2)  B[0,2)  >0 g0[0,1)  >0 g0[1,2)"
    )
    coarse_to_fine = lower(make_plan(chain(2), [2, 1], 2))
    assert lines(coarse_to_fine)[0].startswith(
        "F[0,2)  >1 a0[0,1)  >1 a0[1,2)  <1 g0[0,1)  <1 g0[1,2)  B[0,2)"
    )


def test_replicas_exchange_the_intersections_of_their_pieces():
    schedule = lower(make_plan(chain(3), [8, 8, 8], 8, replicas=[2, 4, 1]))
    sends = [(t.source, t.target, str(t.samples)) for p in schedule.programs for t in forward_sends(p)]
    assert sends == [
        (0, 2, "[0,2)"),
        (0, 3, "[2,4)"),
        (1, 4, "[4,6)"),
        (1, 5, "[6,8)"),
        (2, 6, "[0,2)"),
        (3, 6, "[2,4)"),
        (4, 6, "[4,6)"),
        (5, 6, "[6,8)"),
    ]


def forward_sends(program):
    return [
        i.transfer for i in program if isinstance(i, Send) and i.transfer.direction is Direction.ACTIVATION
    ]


def test_ragged_evaluation_leaves_the_last_replica_without_work():
    plan = make_plan(chain(2), [4, 2], 8, replicas=[4, 1])
    schedule = lower(plan, forward_only=True, samples=3)
    assert lines(schedule) == [
        "F[0,1)  >4 a0[0,1)",
        "F[1,2)  >4 a0[1,2)",
        "F[2,3)  >4 a0[2,3)",
        "",
        "<0 a0[0,1)  <1 a0[1,2)  F[0,2)  <2 a0[2,3)  F[2,3)  report",
    ]
    assert schedule.samples == 3 and schedule.forward_only


@pytest.mark.parametrize(
    "change",
    [{"no_grad": [(0, 1)]}, {"frozen": [0]}, {"frozen": [1]}],
    ids=["no gradient", "frozen source", "frozen target"],
)
def test_no_gradient_message_without_a_gradient(change):
    schedule = lower(make_plan(chain(2), [2, 2], 4, **change))
    assert [c.direction for c in schedule.channels] == [Direction.ACTIVATION]
    kinds = Counter(i.task.kind for p in schedule.programs for i in p if isinstance(i, Compute))
    assert kinds[Pass.BACKWARD] == 2 * (2 - len(change.get("frozen", [])))


def test_slots_are_the_upstream_peak_of_messages_in_flight():
    plan = make_plan([(0, 1), (1, 2), (0, 2)], [4, 4, 1], 32)
    slots = {(c.edge, c.direction): c.slots for c in lower(plan).channels}
    held = [stage.in_flight for stage in plan.stage_graph.stages]
    assert held == [12, 8, 1]
    for way in Direction:
        assert slots[0, way] == held[0] // 4
        assert slots[1, way] == held[0]  # edge 1 goes from stage 0 to stage 2 in single samples
        assert slots[2, way] == held[1]
    gpipe = dataclasses.replace(plan, policy=Policy("gpipe"))
    assert {c.slots for c in lower(gpipe).channels if c.edge == 0} == {8}


def test_evaluation_has_the_training_slots_but_no_more_than_messages():
    plan = make_plan(chain(3), [1, 1, 1], 8)
    assert [c.slots for c in lower(plan, forward_only=True).channels] == [3, 2]
    assert [c.slots for c in lower(plan, forward_only=True, samples=1).channels] == [1, 1]


def test_an_evaluation_keeps_what_its_own_order_makes_it_keep():
    # stages 1 and 2 share a device; in an evaluation the first runs on until stage 0 has its four samples
    plan = make_plan([(0, 2), (1, 2)], [4, 1, 1], 8, slots=[0, 1, 1])
    assert {c.edge: c.slots for c in lower(plan).channels if c.direction is Direction.ACTIVATION}[1] == 1
    evaluation = lower(plan, forward_only=True)
    assert {c.edge: c.slots for c in evaluation.channels}[1] == 4
    check(plan, evaluation)


def test_slots_cover_what_waits_for_its_weight_half():
    plan = make_plan(chain(3), [1, 1, 1], 16, policy=Policy("zero-bubble"), lags=[0, 1, 3])
    found = {(c.edge, c.direction): c.slots for c in lower(plan).channels}
    assert found[0, Direction.ACTIVATION] == 3 + 1 + 1  # forwards ahead, and the halves below with their own
    assert found[1, Direction.ACTIVATION] == 2 + 3 + 1
    assert found[0, Direction.GRADIENT] == 3 and found[1, Direction.GRADIENT] == 2


@pytest.mark.parametrize("forward_only, samples", [(False, 4), (True, 0), (True, 9), (False, 16)])
def test_a_wrong_number_of_samples_is_refused(forward_only, samples):
    with pytest.raises(ScheduleError, match=f"{samples} were asked for"):
        lower(make_plan(chain(2), [2, 2], 8), forward_only=forward_only, samples=samples)


class TestClosing:
    plan = make_plan(
        chain(4),
        [2, 2, 2, 2],
        4,
        replicas=[2, 1, 2, 1],
        frozen=[2],
        shared=[(0, 3), (1, 3)],
        loss_weighted=True,
        global_norm=True,
    )

    def test_order_groups_and_bytes(self):
        everyone = (0, 1, 2, 3, 4, 5)
        assert closing(self.plan, (0,)) == (
            Reduce(Reduction.GRADIENTS, (0, 1), 0, 60),  # 100 bytes of which 40 are tied
            Reduce(Reduction.GRADIENTS, (5, 0, 1), -1, 40, shared=0),  # last stage first, as autograd sums
            Reduce(Reduction.LOSS_WEIGHT, everyone, -1, 8),
            Reduce(Reduction.NORM, everyone, -1, 8),
            Update(0),
        )
        assert closing(self.plan, (3,)) == (
            Report(3),
            Reduce(Reduction.GRADIENTS, (5, 0, 1), -1, 40, shared=0),
            Reduce(Reduction.GRADIENTS, (5, 2), -1, 40, shared=1),
            Reduce(Reduction.LOSS_WEIGHT, everyone, -1, 8),
            Reduce(Reduction.NORM, everyone, -1, 8),
            Update(3),
        )

    def test_a_rank_with_several_stages_joins_each_group_once(self):
        plan = make_plan(
            chain(4),
            [2, 2, 2, 2],
            4,
            replicas=[2, 1, 2, 1],
            slots=[0, 1, 0, 1],
            shared=[(0, 2), (0, 3), (1, 3)],
            global_norm=True,
        )
        assert closing(plan, (0, 2)) == (
            Reduce(Reduction.GRADIENTS, (0, 1), 0, 20),
            Reduce(Reduction.GRADIENTS, (0, 1), 2, 60),
            Reduce(Reduction.GRADIENTS, (0, 1), -1, 40, shared=0),
            Reduce(Reduction.GRADIENTS, (2, 0, 1), -1, 40, shared=1),
            Reduce(Reduction.NORM, (0, 1, 2), -1, 8),
            Update(0),
            Update(2),
        )
        # what its own two stages make of a tied parameter, the rank has summed itself
        assert closing(plan, (1, 3)) == (
            Report(3),
            Reduce(Reduction.GRADIENTS, (2, 0, 1), -1, 40, shared=1),
            Reduce(Reduction.NORM, (0, 1, 2), -1, 8),
            Update(1),
            Update(3),
        )

    def test_a_frozen_stage_still_joins_what_all_join(self):
        kinds = [type(i).__name__ + ":" + i.what.value for i in closing(self.plan, (2,))]
        assert kinds == ["Reduce:loss weight", "Reduce:norm"]

    def test_evaluation_only_reports(self):
        assert closing(self.plan, (3,), forward_only=True) == (Report(3),)
        assert closing(self.plan, (0,), forward_only=True) == ()

    def test_one_rank_has_nobody_to_reduce_with(self):
        alone = make_plan([], [2], 4, shared=[(0,)], loss_weighted=True, global_norm=True)
        assert closing(alone, (0,)) == (Report(0), Update(0))

    def test_tied_parameters_that_nobody_trains_are_not_summed(self):
        frozen = make_plan(chain(2), [2, 2], 4, frozen=[0, 1], shared=[(0, 1)])
        assert closing(frozen, (0,)) == ()


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_every_sample_once_and_messages_that_tile_every_edge(plan: Plan, data: st.DataObject):
    count = data.draw(st.integers(1, plan.mini_batch))
    for schedule in (lower(plan), lower(plan, forward_only=True, samples=count)):
        computed = defaultdict(list)
        messages = defaultdict(list)
        for rank, program in enumerate(schedule.programs):
            for instruction in program:
                if isinstance(instruction, Compute):
                    task = instruction.task
                    computed[task.stage, task.kind].append(task.samples)
                    stage = plan.stage_graph.stages[task.stage]
                    replica = stage.devices.index(rank)
                    assert task.samples in {
                        piece(stage, w, replica) for w in micro_batches(stage, schedule.samples)
                    }
                elif isinstance(instruction, Send):
                    t = instruction.transfer
                    messages[t.edge, t.direction].append(t)
                    assert Receive(t) in schedule.programs[t.target]
        everything = list(range(schedule.samples))
        for index, stage in enumerate(plan.stage_graph.stages):
            back = stage.has_backward and not schedule.forward_only
            for kind, wanted in ((Pass.FORWARD, everything), (Pass.BACKWARD, everything if back else [])):
                samples = sorted(i for s in computed[index, kind] for i in range(s.start, s.stop))
                assert samples == wanted
        for number, edge in enumerate(plan.stage_graph.edges):
            back = returns_gradient(plan.stage_graph, edge) and not schedule.forward_only
            for way, size in ((Direction.ACTIVATION, edge.bytes), (Direction.GRADIENT, edge.gradient_bytes)):
                sent = messages[number, way]
                samples = sorted(i for t in sent for i in range(t.samples.start, t.samples.stop))
                assert samples == (everything if way is Direction.ACTIVATION or back else [])
                assert all(t.bytes == size * len(t.samples) for t in sent)
                assert len({t.tag for t in sent}) <= 1


@settings(max_examples=60, deadline=None)
@given(plans())
def test_each_rank_receives_just_before_and_sends_just_after(plan: Plan):
    for program in lower(plan).programs:
        passes = [i for i in program if isinstance(i, Compute | Send | Receive)]
        last = None
        for at, instruction in enumerate(passes):
            if isinstance(instruction, Compute):
                last = instruction.task
            elif isinstance(instruction, Send):
                assert last is not None and last.samples.intersection(instruction.transfer.samples)
            else:
                first = next(i.task for i in passes[at:] if isinstance(i, Compute))
                assert first.samples.intersection(instruction.transfer.samples)
