import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.plan import Plan, Policy, stage_memory
from gpp.schedule.check import check, run_to_end
from gpp.schedule.grid import cell
from gpp.schedule.lower import lower
from gpp.schedule.task import (
    Compute,
    Direction,
    Instruction,
    Pass,
    Receive,
    Reduce,
    Samples,
    Schedule,
    ScheduleError,
    Send,
    Task,
    Transfer,
    Update,
)
from tests.strategies import FREE_DEVICE, chain, make_plan, plans

# two branches of different length into a join, the longer one with replicas
PLAN = make_plan(
    [(0, 2), (1, 3), (2, 3)],
    [4, 4, 4, 4],
    16,
    replicas=[2, 1, 1, 1],
    shared=[(1, 3)],
    global_norm=True,
    idle=1,
)
SCHEDULE = lower(PLAN)  # ranks 0 and 1 hold stage 0, rank 2 stage 1, rank 3 stage 2, rank 4 stage 3


def edit(rank: int, change: Callable[[list[Instruction]], object], schedule: Schedule = SCHEDULE) -> Schedule:
    """The schedule with one rank's program changed in place by `change`."""
    program = list(schedule.programs[rank])
    change(program)
    programs = list(schedule.programs)
    programs[rank] = tuple(program)
    return dataclasses.replace(schedule, programs=tuple(programs))


def find(program: list[Instruction], kind: type, number: int = 0, way: Direction | None = None) -> int:
    """Position of the number-th instruction of a kind (and direction)."""
    hits = [
        i
        for i, x in enumerate(program)
        if isinstance(x, kind)
        and (way is None or (isinstance(x, Send | Receive) and x.transfer.direction is way))
    ]
    return hits[number]


def drop(rank: int, kind: type, number: int = 0, way: Direction | None = None) -> Schedule:
    return edit(rank, lambda p: p.pop(find(p, kind, number, way)))


def repeat(rank: int, kind: type, number: int = 0, way: Direction | None = None) -> Schedule:
    return edit(rank, lambda p: p.insert(find(p, kind, number, way), p[find(p, kind, number, way)]))


def swap(rank: int, kind: type, first: int, second: int, schedule: Schedule = SCHEDULE) -> Schedule:
    def change(program: list[Instruction]) -> None:
        a, b = find(program, kind, first), find(program, kind, second)
        program[a], program[b] = program[b], program[a]

    return edit(rank, change, schedule)


def alter(
    rank: int, what: type, number: int = 0, way: Direction | None = None, /, **changes: object
) -> Schedule:
    """Other values in an instruction's transfer, task, or itself."""

    def change(program: list[Instruction]) -> None:
        at = find(program, what, number, way)
        old = program[at]
        if isinstance(old, Compute):
            program[at] = Compute(dataclasses.replace(old.task, **changes))
        elif isinstance(old, Send | Receive):
            program[at] = type(old)(dataclasses.replace(old.transfer, **changes))
        else:
            program[at] = dataclasses.replace(old, **changes)

    return edit(rank, change)


def slots(number: int, schedule: Schedule = SCHEDULE) -> Schedule:
    channels = tuple(dataclasses.replace(c, slots=number) for c in schedule.channels)
    return dataclasses.replace(schedule, channels=channels)


def both_ends(schedule: Schedule, source: int, target: int, **changes: object) -> Schedule:
    """Other values in the first message between two ranks, the same at both ends."""
    sends = [i for i in schedule.programs[source] if isinstance(i, Send) and i.transfer.target == target]
    old, new = sends[0].transfer, dataclasses.replace(sends[0].transfer, **changes)
    swapped: dict[Instruction, Instruction] = {Send(old): Send(new), Receive(old): Receive(new)}
    programs = tuple(tuple(swapped.get(i, i) for i in program) for program in schedule.programs)
    return dataclasses.replace(schedule, programs=programs)


A, G = Direction.ACTIVATION, Direction.GRADIENT
STRAY = Transfer(0, A, Samples(0, 2), 5, 3, 0, 16)

BROKEN: list[tuple[str, Schedule, str]] = [
    ("forward dropped", drop(2, Compute, 0), "comes before the forward|before they are made"),
    ("last backward dropped", drop(2, Compute, -1), r"samples \[12,16\) are never computed"),
    (
        "last forward and its sends dropped",
        edit(4, lambda p: p.pop(find(p, Compute, -2))),
        "before the forward",
    ),
    ("forward twice", repeat(2, Compute, 0), "computed twice"),
    ("backward twice", repeat(0, Compute, -1), "computed twice"),
    ("forwards swapped", swap(3, Compute, 0, 1), "are needed, received are"),
    ("source's forwards swapped", swap(2, Compute, 0, 1), "before they are made"),
    ("backwards swapped", swap(2, Compute, -1, -2), "must follow the order of the forwards"),
    ("backward before its forward", swap(4, Compute, 0, 1), "comes before the forward"),
    ("other samples", alter(2, Compute, 0, samples=Samples(0, 2)), "not a piece of this replica"),
    ("another replica's samples", alter(0, Compute, 0, samples=Samples(2, 4)), "not a piece"),
    ("another stage", alter(2, Compute, 0, stage=0), "this rank computes stage 1, not 0"),
    (
        "backward as input half",
        alter(4, Compute, 1, kind=Pass.BACKWARD_INPUT),
        "8 samples are in flight, stage stage3 may hold 4",
    ),
    ("weight half alone", alter(4, Compute, 1, kind=Pass.BACKWARD_WEIGHT), "before the input half"),
    ("receive dropped", drop(4, Receive, 0), "are needed, received are none"),
    ("gradient receive dropped", drop(3, Receive, 0, G), "are needed, received are none"),
    ("receive after its use", edit(3, lambda p: p.insert(3, p.pop(0))), r"are needed, received are \[2,4\)"),
    ("receive twice", repeat(4, Receive, 0), "are needed, received are"),
    (
        "receive never used",
        edit(4, lambda p: p.insert(len(p) - 5, p[0])),
        "received and not used|step must end",
    ),
    ("send dropped", drop(0, Send, 0), "made and not sent"),
    ("send twice", repeat(0, Send, 0), "sent twice or before they are made"),
    ("send before its pass", edit(2, lambda p: p.insert(0, p.pop(1))), "sent twice or before they are made"),
    ("sends swapped", swap(2, Send, 0, 1), "before they are made"),
    ("send and receive disagree", alter(0, Send, 0, target=4), "joins stages 0 and 2"),
    ("sent by another rank", alter(0, Send, 0, source=1), "the message is rank 1's, this is rank 0"),
    ("an edge that is not there", alter(0, Send, 0, edge=9), "the stage graph has no edge 9"),
    ("another edge", alter(0, Send, 0, edge=1), "edge 1 joins stages"),
    ("another tag", alter(0, Send, 0, tag=7), "no channel of edge 0 with tag 7"),
    ("another tag at both ends", both_ends(SCHEDULE, 3, 4, tag=7), "no channel of edge 2 with tag 7"),
    (
        "fewer samples at both ends",
        both_ends(SCHEDULE, 3, 4, samples=Samples(0, 3), bytes=24),
        "made and not sent",
    ),
    ("other samples at one end", alter(3, Send, 0, A, samples=Samples(0, 3), bytes=24), "made and not sent"),
    ("wrong bytes", alter(0, Send, 0, bytes=15), "are 16 bytes, the message has 15"),
    ("no channels", dataclasses.replace(SCHEDULE, channels=()), "there is no channel"),
    ("a channel twice", dataclasses.replace(SCHEDULE, channels=SCHEDULE.channels * 2), "two channels"),
    (
        "small buffers",
        dataclasses.replace(
            SCHEDULE, channels=tuple(dataclasses.replace(c, bytes=1) for c in SCHEDULE.channels)
        ),
        "its buffers 1",
    ),
    ("no slots", slots(0), "needs at least one slot"),
    ("too few slots", slots(1), "deadlock: .*all its 1 buffers are in use"),
    (
        "too many in flight",
        edit(2, lambda p: p.insert(4, p.pop(find(p, Compute, 3)))),
        "in flight, stage stage1",
    ),
    ("update dropped", drop(2, Update), "the step must end with"),
    ("update twice", repeat(2, Update), "must come after the last pass"),
    ("reduce dropped", drop(2, Reduce), "the step must end with"),
    ("reduces swapped", swap(2, Reduce, 0, 1), r"must end with sum gradients of tied 0 \(4,2\) here"),
    ("another group", alter(0, Reduce, 0, group=(1, 0)), r"not with sum gradients \(1,0\)"),
    ("update before the norm", edit(2, lambda p: p.insert(-2, p.pop())), "the step must end with"),
    ("wrong size of a reduction", alter(0, Reduce, 0, bytes=1), "not with Reduce.*bytes=1"),
    ("work for an idle rank", edit(5, lambda p: p.append(Send(STRAY))), "no stage is on this rank"),
    ("a rank without a program", edit(3, lambda p: p.clear()), "are never computed"),
    ("too few programs", dataclasses.replace(SCHEDULE, programs=SCHEDULE.programs[:-1]), "each of the 6"),
    ("fewer samples", dataclasses.replace(SCHEDULE, samples=12), "not a piece"),
    ("more samples", dataclasses.replace(SCHEDULE, samples=20), "the step|are never computed"),
    (
        "said to be an evaluation",
        dataclasses.replace(SCHEDULE, forward_only=True),
        "no gradient goes|no backward",
    ),
]


def test_the_unbroken_schedule_is_accepted():
    check(PLAN, SCHEDULE)
    check(PLAN, lower(PLAN, forward_only=True, samples=7))


@pytest.mark.parametrize("schedule, reason", [pytest.param(s, r, id=n) for n, s, r in BROKEN])
def test_broken_schedules_are_refused(schedule, reason):
    with pytest.raises(ScheduleError, match=reason):
        check(PLAN, schedule)


def test_a_refusal_shows_the_grid_with_the_cell_marked():
    with pytest.raises(ScheduleError) as caught:
        check(PLAN, alter(2, Compute, 2, samples=Samples(0, 2)))
    sentence, header, *rows = str(caught.value).split("\n")
    assert sentence == "rank 2, instruction 5: samples [0,2) are not a piece of this replica"
    assert header.split() == ["-3", "-2", "-1", "here", "+1", "+2", "+3"]
    assert len(rows) == len(SCHEDULE.programs)
    marked = [row for row in rows if "<-- here" in row]
    assert len(marked) == 1 and marked[0].startswith("rank 2 @5") and "B[0,2) <-- here" in marked[0]


def test_a_wide_schedule_shows_the_rows_around_the_failure():
    plan = make_plan(chain(40), [1] * 40, 2)
    broken = edit(30, lambda p: p.pop(find(p, Compute)), lower(plan))
    with pytest.raises(ScheduleError) as caught:
        check(plan, broken)
    rows = str(caught.value).split("\n")[2:]
    assert len(rows) == 16 and any(row.startswith("rank 30 @1 ") for row in rows)


def test_receives_of_a_channel_must_follow_its_sends():
    plan = make_plan(chain(2), [1, 2], 4)
    swapped = swap(1, Receive, 0, 1, schedule=lower(plan))
    with pytest.raises(ScheduleError, match=r"is sent as \[0,1\) and received as \[1,2\)"):
        check(plan, swapped)


def test_every_rank_that_waits_is_named_in_a_deadlock():
    with pytest.raises(ScheduleError) as caught:
        run_to_end(slots(1, lower(make_plan(chain(3), [1, 1, 1], 4))))
    message = str(caught.value)
    assert "rank 0 waits for rank 1 to free one of 1 slots of edge 0" in message
    assert "rank 1 waits for [1,2) of edge 0, and all its 1 buffers are in use" in message
    assert "rank 2 waits for rank 1 to send [1,2) of edge 1" in message


def test_collectives_met_in_different_orders_deadlock():
    with pytest.raises(ScheduleError, match=r"waits for ranks .* to sum the norm"):
        run_to_end(swap(2, Reduce, 0, 1))


def test_in_flight_beyond_the_plan_is_refused():
    stages = tuple(dataclasses.replace(s, in_flight=4) for s in PLAN.stage_graph.stages)
    tight = dataclasses.replace(PLAN, stage_graph=dataclasses.replace(PLAN.stage_graph, stages=stages))
    with pytest.raises(ScheduleError, match="8 samples are in flight, stage stage0 may hold 4"):
        check(tight, SCHEDULE)


def test_memory_beyond_the_device_is_refused():
    small = dataclasses.replace(FREE_DEVICE, memory=300.0)
    topology = dataclasses.replace(PLAN.topology, devices=(small,) * 6)
    with pytest.raises(ScheduleError, match=r"stage0 needs .* MiB on device 0"):
        check(dataclasses.replace(PLAN, topology=topology), SCHEDULE)


def test_buffers_beyond_the_device_are_refused():
    # every second micro-batch of stage 1 goes to the same replica of stage 2: one of its channels needs 2
    # buffers and so does the other, 4 in all, though stage 1 has only 3 micro-batches in flight
    plan = make_plan(chain(3), [4, 4, 4], 32, replicas=[1, 1, 1])
    stages = list(plan.stage_graph.stages)
    stages[2] = dataclasses.replace(stages[2], devices=(2, 3), micro_batch=8, in_flight=8)
    stages[1] = dataclasses.replace(stages[1], in_flight=12)
    stages[0] = dataclasses.replace(stages[0], in_flight=16)
    graph = dataclasses.replace(plan.stage_graph, stages=tuple(stages))
    memory = stage_memory(graph, 1)
    rings = 4 * 4 * (8 + 4) + 4 * 4 * (8 + 4)  # 4 buffers of 4 samples on either side, both directions
    assert memory.messages == 16 * (8 + 4) + 12 * (8 + 4)
    need = memory.total - memory.messages + rings

    def with_memory(size: float) -> Plan:
        devices = (FREE_DEVICE, dataclasses.replace(FREE_DEVICE, memory=size), FREE_DEVICE, FREE_DEVICE)
        topology = dataclasses.replace(plan.topology, devices=devices)
        return dataclasses.replace(plan, stage_graph=graph, topology=topology)

    check(with_memory(need), lower(with_memory(need)))
    with pytest.raises(ScheduleError, match=r"rank 1 needs .* are message buffers"):
        check(with_memory(need - 1), lower(with_memory(need)))


def split_backwards(schedule: Schedule) -> Schedule:
    """Each backward as its two halves; what it sends leaves between them."""

    def halves(program: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        out: list[Instruction] = []
        weight: list[Instruction] = []
        for instruction in program:
            if not isinstance(instruction, Send):
                out += weight
                weight = []
            if isinstance(instruction, Compute) and instruction.task.kind is Pass.BACKWARD:
                task = instruction.task
                out.append(Compute(Task(Pass.BACKWARD_INPUT, task.stage, task.samples)))
                weight = [Compute(Task(Pass.BACKWARD_WEIGHT, task.stage, task.samples))]
            else:
                out.append(instruction)
        return tuple(out + weight)

    return dataclasses.replace(schedule, programs=tuple(map(halves, schedule.programs)))


def test_backwards_in_halves_are_accepted_and_each_half_is_needed():
    split = split_backwards(SCHEDULE)
    check(PLAN, split)
    lacks = edit(2, lambda p: p.pop(find(p, Compute, -1)), split)
    with pytest.raises(ScheduleError, match=r"are never computed \(B or W\)"):
        check(PLAN, lacks)
    doubled = edit(2, lambda p: p.insert(find(p, Compute, -1), p[find(p, Compute, -1)]), split)
    with pytest.raises(ScheduleError, match="computed twice"):
        check(PLAN, doubled)


def test_a_recompute_comes_once_between_forward_and_backward():
    def recompute(at: int) -> Schedule:
        task = Task(Pass.RECOMPUTE, 1, Samples(0, 4))
        return edit(2, lambda p: p.insert(at, Compute(task)))

    backward = find(list(SCHEDULE.programs[2]), Compute, 2)
    check(PLAN, recompute(backward))
    with pytest.raises(ScheduleError, match="computed twice"):
        check(PLAN, recompute(backward + 1))
    with pytest.raises(ScheduleError, match="before the forward"):
        check(PLAN, recompute(0))


# stages 0 and 2 on the two devices of the first, in turned order; their halves apart
SHARED = make_plan(
    chain(3),
    [4, 2, 2],
    8,
    replicas=[2, 1, 2],
    slots=[0, 1, 0],
    policy=Policy("zero-bubble"),
    lags=[1, 1, 1],
    global_norm=True,
)
TOGETHER = lower(SHARED)


def test_stages_on_one_rank_are_accepted_and_each_keeps_its_rules():
    check(SHARED, TOGETHER)
    first = Compute(Task(Pass.FORWARD, 2, Samples(0, 1)))
    at = TOGETHER.programs[0].index(first)
    for broken, reason in (
        (edit(0, lambda p: p.pop(at), TOGETHER), "comes before the forward"),
        (edit(0, lambda p: p.insert(at, first), TOGETHER), "are computed twice"),
        (
            edit(0, lambda p: p.insert(at, Compute(Task(Pass.FORWARD, 1, Samples(0, 2)))), TOGETHER),
            "this rank computes stage 0 and 2, not 1",
        ),
        (edit(0, lambda p: p.pop(), TOGETHER), "the step must end with"),
        (
            edit(0, lambda p: p.append(p.pop(-2)), TOGETHER),
            "must end with update here, not with Update|stage=0",
        ),
    ):
        with pytest.raises(ScheduleError, match=reason):
            check(SHARED, broken)


def test_what_came_for_one_stage_is_used_before_another_stage_computes():
    program = TOGETHER.programs[0]
    receive = next(
        i
        for i, x in enumerate(program)
        if isinstance(x, Receive) and isinstance(program[i - 1], Compute | Send) and i > 2
    )
    before = max(i for i in range(receive) if isinstance(program[i], Compute))
    early = edit(0, lambda p: p.insert(before, p.pop(receive)), TOGETHER)
    with pytest.raises(ScheduleError, match=r"must be used by the next pass|needed, received are"):
        check(SHARED, early)


def test_a_stage_that_recomputes_holds_no_more_halves_than_its_lag():
    plan = make_plan([], [1], 4, policy=Policy("zero-bubble"), lags=[1], held=[3], recompute=[0])
    schedule = lower(plan)
    check(plan, schedule)
    late = edit(0, lambda p: p.insert(5, p.pop(7)), schedule)
    assert [cell(i)[0] for i in late.programs[0]][:7] == list("FFIFIIW")
    with pytest.raises(ScheduleError, match=r"3 samples wait for their weight half.*may hold 2"):
        check(plan, late)


def test_messages_of_an_order_are_empty_both_ways():
    plan = make_plan([(0, 2), (0, 1), (1, 2)], [2, 2, 2], 4, orders=[(0, 1)])
    schedule = lower(plan)
    check(plan, schedule)
    empty = [c for c in schedule.channels if c.edge == 0]
    assert [(c.direction, c.bytes) for c in empty] == [(A, 0), (G, 0)]


@settings(max_examples=150, deadline=None)
@given(plans(uniform=True, scheduled=True))
def test_buffers_are_no_more_than_the_memory_model_charges(plan: Plan):
    rings = [0.0] * len(plan.topology.devices)
    for channel in lower(plan).channels:
        for rank in (channel.source, channel.target):
            rings[rank] += channel.slots * channel.bytes
    for rank, held in plan.residents.items():
        assert rings[rank] <= sum(
            stage_memory(plan.stage_graph, s, clocked=plan.clocked).messages for s in held
        )


@settings(max_examples=150, deadline=None)
@given(plans(scheduled=True), st.data())
def test_the_checker_accepts_what_the_scheduler_makes(plan: Plan, data: st.DataObject):
    check(plan, lower(plan))
    check(plan, lower(plan, forward_only=True, samples=data.draw(st.integers(1, plan.mini_batch))))


@settings(max_examples=60, deadline=None)
@given(plans(sizes=(2, 3, 4, 6), scheduled=True))
def test_micro_batches_that_are_no_multiples_of_each_other(plan: Plan):
    check(plan, lower(plan))
    check(plan, lower(plan, forward_only=True))


@settings(max_examples=60, deadline=None)
@given(plans(scheduled=True), st.data())
def test_dropping_or_repeating_any_one_instruction_is_refused(plan: Plan, data: st.DataObject):
    schedule = lower(plan)
    places = [(r, i) for r, program in enumerate(schedule.programs) for i in range(len(program))]
    rank, at = data.draw(st.sampled_from(places))
    dropped = edit(rank, lambda p: p.pop(at), schedule)
    repeated = edit(rank, lambda p: p.insert(at, p[at]), schedule)
    for broken in (dropped, repeated):
        with pytest.raises(ScheduleError):
            check(plan, broken)
