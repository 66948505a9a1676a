from dataclasses import replace

import pytest

from gpp.cost import Roofline
from gpp.plan import Plan, Policy, device_memory, stage_memory
from gpp.plan_table import device_ranges, memory_table, plan_table, readable_bytes, readable_seconds
from gpp.planner.estimate import Group, Problem, assemble, estimated
from gpp.planner.options import Options
from gpp.simulate import simulate
from gpp.trace import busy_seconds
from tests.graphs import make_cluster, make_graph
from tests.strategies import make_plan

GRAPH = make_graph({"left": "", "right": "", "join": "left right"}, parameters=1 << 20)


def hand_made(devices: int = 6) -> Plan:
    problem = Problem(GRAPH, make_cluster(devices), Roofline(), Options(mini_batch=16, micro_batch=4))
    return assemble(problem, [Group((0,), 1), Group((1,), 2), Group((2,), 1)], 4, "by hand")


def cells(table: str) -> list[list[str]]:
    """Rows of the table proper, split where two spaces are."""
    lines = table.split("\n\n")[0].splitlines()
    return [[cell for cell in line.split("  ") if cell] for line in lines]


def test_a_row_for_every_stage():
    plan = estimated(hand_made())
    head, rule, *rows = cells(plan_table(plan))
    assert [cell.strip() for cell in head] == [
        "stage", "operators", "devices", "parameters", "memory", "in-flight", "share of time",
    ]  # fmt: skip
    assert set("".join(rule)) == {"-"}
    busy = busy_seconds(simulate(plan))
    for index, (stage, row) in enumerate(zip(plan.stage_graph.stages, rows, strict=True)):
        name, operators, devices, parameters, memory, in_flight, share = (cell.strip() for cell in row)
        assert (name, operators, parameters) == (stage.name, "1", "1 MiB")
        assert devices == device_ranges(stage.devices)
        assert memory == readable_bytes(stage_memory(plan.stage_graph, index).total)
        assert in_flight == str(stage.in_flight)
        assert share == f"{busy[stage.devices[0]] / plan.estimate:.0%}"


def test_columns_line_up():
    lines = plan_table(estimated(hand_made())).split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1


def test_what_is_below_the_table():
    plan = hand_made()
    text = plan_table(plan).split("\n\n")[1]
    assert "planner by hand: 3 stages, depth 2, mini-batch 16, micro-batch 4, schedule 1f1b" in text
    assert "idle devices: 4-5" in text
    assert "predicted" not in text
    full = replace(plan, estimate=0.02)
    assert "predicted step 20 ms, 800 samples/s\n" in plan_table(full)
    bounded = plan_table(replace(full, lower_bound=0.016))
    assert "; lower bound 16 ms (gap 25.0%)\n" in bounded
    named = plan_table(replace(full, lower_bound=0.016, bound_by="operator join"))
    assert "; lower bound 16 ms (gap 25.0%) by operator join\n" in named
    assert "idle" not in plan_table(hand_made(4))


def test_mixed_micro_batches_and_a_single_stage():
    assert "micro-batch 2 to 4" in plan_table(make_plan([(0, 1)], [2, 4], 8))
    assert ": 1 stage, depth 1" in plan_table(make_plan([], [2], 8))


@pytest.mark.parametrize(
    "devices, text",
    [((0,), "0"), ((0, 1, 2), "0-2"), ((5, 0, 1, 3), "0-1,3,5"), ((2, 4, 6), "2,4,6"), ((), "")],
)
def test_device_ranges(devices, text):
    assert device_ranges(devices) == text


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (999 * 1024, "999 KiB"),
        (1 << 20, "1 MiB"),
        (3.5 * 2**30, "3.5 GiB"),
        (5 * 2**40, "5 TiB"),
    ],
)
def test_readable_bytes(size, text):
    assert readable_bytes(size) == text


@pytest.mark.parametrize(
    "seconds, text", [(2.5, "2.5 s"), (0.0125, "12.5 ms"), (3e-5, "30 us"), (4e-9, "4 ns"), (0.0, "0 ns")]
)
def test_readable_seconds(seconds, text):
    assert readable_seconds(seconds) == text


def test_what_is_special_about_a_stage():
    plan = hand_made()
    assert "special" not in plan_table(plan)
    left, right, join = plan.stage_graph.stages
    left = replace(left, recompute=True, weight_lag=2, in_flight=16, micro_batch=2)
    right = replace(right, shard_optimizer=True, k=2)
    join = replace(join, shard_optimizer=True, devices=left.devices)  # nothing to share it out over
    table = plan_table(replace(plan, stage_graph=replace(plan.stage_graph, stages=(left, right, join))))
    head, _, *rows = table.split("\n\n")[0].splitlines()
    assert head.endswith("  special")
    assert [row[head.index("special") :] for row in rows] == [
        "micro-batch 2, forward again, weight half 4 later, device shared",
        "micro-batch 4, k 2, optimizer state shared out",
        "micro-batch 4, device shared",
    ]


def test_memory_is_that_of_the_schedule():
    plan = hand_made()
    lagging = tuple(replace(s, weight_lag=1, in_flight=s.in_flight + 4) for s in plan.stage_graph.stages)
    plan = replace(plan, stage_graph=replace(plan.stage_graph, stages=lagging))
    greedy = replace(plan, policy=Policy("greedy"))
    for each in (plan, greedy):
        shown = [row[4].strip() for row in cells(plan_table(each))[2:]]
        assert shown == [readable_bytes(device_memory(each)[s.devices[0]]) for s in lagging]
    assert device_memory(plan) != device_memory(greedy)


def test_memory_of_every_stage():
    plan = hand_made()
    head, _, *rows = cells(memory_table(plan))
    assert head[0].strip() == "stage" and head[-1].strip() == "device has"
    assert [row[0].strip() for row in rows] == [stage.name for stage in plan.stage_graph.stages]
    for index, row in enumerate(rows):
        need = stage_memory(plan.stage_graph, index)
        assert [cell.strip() for cell in row[2:4]] == [readable_bytes(need.parameters)] * 2
        assert row[-2].strip() == readable_bytes(need.total)
        assert row[-1].strip() == readable_bytes(plan.topology.devices[0].memory)
