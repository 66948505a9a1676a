"""A bound program does what the program says, for any plan."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.plan import Plan
from gpp.program.stage import StageFunctions
from gpp.runtime.binding import Arrival, BoundProgram, Call, Departure, bind
from gpp.runtime.emulation import emulated_program
from gpp.schedule.lower import lower, returns_gradient
from gpp.schedule.task import (
    Compute,
    Direction,
    Pass,
    Receive,
    Report,
    Samples,
    Schedule,
    Send,
    Update,
)
from tests.strategies import chain, make_plan, plans


def faces(plan: Plan, schedule: Schedule, rank: int) -> dict[int, StageFunctions]:
    return {
        stage: emulated_program(plan, schedule, rank, stage).train for stage in plan.residents.get(rank, ())
    }


def bound(plan: Plan, schedule: Schedule, rank: int) -> BoundProgram:
    return bind(plan, schedule, rank, faces(plan, schedule, rank), {})


def test_a_chain_of_two():
    plan = make_plan(chain(2), [2, 2], 4)
    first, last = (bound(plan, lower(plan), rank) for rank in (0, 1))
    kinds = [type(instruction).__name__ for instruction in first.instructions]
    assert kinds == ["Call", "Departure", "Call", "Departure", "Arrival", "Call", "Arrival", "Call", "Update"]
    assert (first.messages, first.starts) == (2, (0, 2)) == (last.messages, last.starts)
    calls = [i for i in last.instructions if isinstance(i, Call)]
    assert [(c.piece, c.gather.ports) for c in calls] == [(0, ((0,),)), (0, ()), (1, ((1,),)), (1, ())]
    departures = [i for i in last.instructions if isinstance(i, Departure)]
    assert [(d.gradient, d.values, d.rows) for d in departures] == [(True, None, None)] * 2


def test_parts_of_a_pass_are_sent_and_several_messages_joined():
    plan = make_plan(chain(2), [2, 1], 2)
    coarse, fine = (bound(plan, lower(plan), rank) for rank in (0, 1))
    sends = [i.rows for i in coarse.instructions if isinstance(i, Departure)]
    assert sends == [slice(0, 1), slice(1, 2)]
    backward = [i for i in coarse.instructions if isinstance(i, Call)][-1]
    assert backward.gather.ports == ((0, 1),) and backward.gather.values == ((0,),)
    assert fine.starts == (0, 1)


def test_an_idle_rank_has_nothing_to_do():
    plan = make_plan(chain(2), [2, 2], 4, idle=1)
    assert bound(plan, lower(plan), 2) == BoundProgram((), 0, ())


@given(plans(), st.booleans())
def test_every_message_is_taken_once_by_the_pass_that_it_is_for(plan: Plan, forward_only: bool):
    schedule = lower(plan, forward_only=forward_only)
    edges = plan.stage_graph.edges
    for rank, program in enumerate(schedule.programs):
        own = faces(plan, schedule, rank)
        made = bind(plan, schedule, rank, own, {})
        left = [i for i in program if not isinstance(i, Report)]
        updates = [i for i in left if isinstance(i, Update)]
        left = [i for i in left if not isinstance(i, Update)] + updates[-1:]
        assert len(left) == len(made.instructions)
        arrived: dict[int, Receive] = {}
        taken: Counter[int] = Counter()
        last = None
        for plain, instruction in zip(left, made.instructions, strict=True):
            match instruction:
                case Arrival(transfer, number):
                    assert plain == Receive(transfer) and number not in arrived
                    arrived[number] = plain
                case Departure(transfer, gradient, values, rows):
                    assert plain == Send(transfer) and last is not None
                    assert gradient == (transfer.direction is Direction.GRADIENT)
                    whole = last.task.samples
                    start, stop = (rows.start, rows.stop) if rows is not None else (0, len(whole))
                    assert Samples(whole.start + start, whole.start + stop) == transfer.samples
                    face = own[last.task.stage]
                    known = [v for v in face.inputs if v.needs_grad] if gradient else list(face.outputs)
                    chosen = known if values is None else [known[number] for number in values]
                    assert {v.name.partition(".")[0] for v in chosen} <= {f"edge{transfer.edge}"}
                case Call(task=task, gather=gather):
                    assert plain == Compute(task) and made.starts[instruction.piece] == task.samples.start
                    last = instruction
                    ports = [port for port in gather.ports if port]
                    for port in ports:
                        transfers = [arrived[number].transfer for number in port]
                        taken.update(port)
                        assert transfers[0].samples.start == task.samples.start
                        assert transfers[-1].samples.stop == task.samples.stop
                        for one, other in pairwise(transfers):
                            assert one.samples.stop == other.samples.start and one.edge == other.edge
                        backward = transfers[0].direction is Direction.GRADIENT
                        assert backward == (task.kind is not Pass.FORWARD)
                        edge = edges[transfers[0].edge]
                        assert task.stage == (edge.source if backward else edge.target)
                        assert not backward or returns_gradient(plan.stage_graph, edge)
        assert set(taken) == set(arrived) == set(range(made.messages))
        assert set(taken.values()) <= {1}


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_reads_the_rows_of_its_samples(stage: int):
    plan = make_plan(chain(2), [2, 2], 4)
    schedule = lower(plan)
    (face,) = faces(plan, schedule, stage).values()
    reading = type(face)(**{name: getattr(face, name) for name in face.__slots__} | {"batch_keys": ("x",)})
    made = bind(plan, schedule, stage, {stage: reading}, {0: 5, 2: 7})
    rows = [i.rows for i in made.instructions if isinstance(i, Call) and i.task.kind is Pass.FORWARD]
    assert rows == [slice(5, 7), slice(7, 9)]
