import dataclasses
import json

import pytest
from hypothesis import given, settings

from gpp.plan import Plan
from gpp.records import RecordError
from gpp.schedule.lower import lower
from gpp.schedule.task import Send
from gpp.simulate import simulate
from gpp.topology import Link
from gpp.trace import (
    Activity,
    Span,
    Trace,
    bubble,
    busy_seconds,
    compare,
    peak_in_flight,
    samples_per_second,
    to_chrome,
    trace_from_json,
    trace_to_json,
    waiting_seconds,
)
from tests.strategies import chain, make_plan, plans

# two steps of two ranks, by hand; rank 2 does nothing
BY_HAND = Trace(
    name="by hand",
    ranks=3,
    spans=(
        Span(0, Activity.COMPUTE, "F", 0.0, 1.0, 0, (0, 4)),
        Span(0, Activity.SEND, "send", 1.0, 1.1, 0, (0, 4), 0),
        Span(1, Activity.WAIT, "recv", 0.0, 1.5, 1, (0, 4), 0),
        Span(1, Activity.COMPUTE, "F", 1.5, 2.5, 1, (0, 4)),
        Span(1, Activity.COMPUTE, "B", 2.5, 4.5, 1, (0, 4)),
        Span(1, Activity.SEND, "send", 4.5, 4.6, 1, (0, 4), 0),
        Span(0, Activity.WAIT, "recv", 1.1, 5.0, 0, (0, 4), 0),
        Span(0, Activity.COMPUTE, "B", 5.0, 6.0, 0, (0, 4)),
        Span(0, Activity.REDUCE, "reduce norm", 6.0, 6.5, 0),
        Span(0, Activity.UPDATE, "update", 6.5, 7.0, 0),
        Span(1, Activity.UPDATE, "update", 6.5, 7.5, 1, step=0),
        Span(0, Activity.COMPUTE, "F", 7.0, 8.5, 0, (0, 4), step=1),
    ),
    step_seconds=8.0,
    mini_batch=4,
    stage_names=("tower", "join"),
)


def test_busy_seconds_are_passes_and_updates_of_one_step():
    assert busy_seconds(BY_HAND) == ((1.0 + 1.0 + 0.5 + 1.5) / 2, (1.0 + 2.0 + 1.0) / 2, 0.0)
    assert bubble(BY_HAND) == (0.75, 0.75, 1.0)


def test_throughput_waiting_and_samples_in_flight():
    assert samples_per_second(BY_HAND) == 0.5
    assert waiting_seconds(BY_HAND) == {0: (1.5 + 3.9) / 2}
    assert peak_in_flight(dataclasses.replace(BY_HAND, spans=BY_HAND.spans[:-1])) == (4, 4, 0)


@pytest.mark.parametrize("depth, m", [(2, 4), (4, 8), (4, 32)])
def test_the_bubble_of_a_balanced_pipeline(depth, m):
    plan = make_plan(chain(depth), [2] * depth, 2 * m)
    trace = simulate(plan)
    assert bubble(trace) == (pytest.approx((depth - 1) / (m + depth - 1)),) * depth
    assert peak_in_flight(trace) == tuple(2 * (depth - s) for s in range(depth))


def test_a_replica_holds_its_share_and_a_frozen_stage_nothing():
    plan = make_plan(chain(3), [4, 4, 4], 32, replicas=[1, 4, 1], frozen=[0])
    assert peak_in_flight(simulate(plan)) == (0, 2, 2, 2, 2, 4)


def test_json_and_back():
    assert trace_from_json(trace_to_json(BY_HAND)) == BY_HAND
    with pytest.raises(RecordError, match=r"Trace\.spans\[0\]\.activity must be one of 'compute'"):
        trace_from_json(trace_to_json(BY_HAND).replace('"compute"', '"computing"'))


def test_comparison_in_a_line():
    slower = dataclasses.replace(BY_HAND, name="measured", step_seconds=10.0)
    line = compare(BY_HAND, slower)
    assert line == (
        "step 8 s by hand, 10 s measured (+25.0%); bubble 75.0% and 80.0%; "
        "most waiting on edge 0, 2.7 s a step"
    )
    short = dataclasses.replace(BY_HAND, step_seconds=0.0123, spans=())
    assert compare(short, short) == "step 12.3 ms by hand, 12.3 ms by hand (+0.0%); bubble 0.0% and 0.0%"


class TestChrome:
    def test_a_process_a_trace_and_a_thread_a_rank(self):
        events = json.loads(to_chrome(BY_HAND, dataclasses.replace(BY_HAND, name="other")))["traceEvents"]
        names = [(e["pid"], e.get("tid"), e["args"]["name"]) for e in events if e["ph"] == "M"]
        assert names[:4] == [
            (0, None, "by hand"),
            (0, 0, "rank 0: tower"),
            (0, 1, "rank 1: join"),
            (0, 2, "rank 2: idle"),
        ]
        assert names[4] == (1, None, "other") and len(names) == 8

    def test_slices_are_in_microseconds(self):
        events = json.loads(to_chrome(BY_HAND))["traceEvents"]
        first = next(e for e in events if e["ph"] == "X")
        assert first == {
            "ph": "X",
            "name": "F [0,4)",
            "cat": "compute",
            "pid": 0,
            "tid": 0,
            "ts": 0.0,
            "dur": 1e6,
            "args": {"step": 0, "stage": 0, "samples": "[0,4)"},
        }

    def test_arrows_go_from_the_send_to_the_pass_that_used_it(self):
        events = json.loads(to_chrome(BY_HAND))["traceEvents"]
        arrows = [(e["ph"], e["tid"], e["ts"]) for e in events if e["ph"] in "sf"]
        assert arrows == [("s", 0, 1.0e6), ("f", 1, 1.5e6), ("s", 1, 4.5e6), ("f", 0, 5.0e6)]
        assert all(e["bp"] == "e" for e in events if e["ph"] == "f")

    @settings(max_examples=40, deadline=None)
    @given(plans())
    def test_every_message_between_passes_that_take_time_has_an_arrow_within_slices(self, plan: Plan):
        trace = simulate(plan, steps=2)
        events = json.loads(to_chrome(trace))["traceEvents"]
        slices = [(e["tid"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
        assert len(slices) == sum(s.stop > s.start for s in trace.spans)
        starts = {e["id"]: e for e in events if e["ph"] == "s"}
        finishes = {e["id"]: e for e in events if e["ph"] == "f"}
        assert starts.keys() == finishes.keys()
        for number, s in starts.items():
            f = finishes[number]
            assert s["ts"] <= f["ts"] and s["tid"] != f["tid"]
            for end in (s, f):
                assert any(r == end["tid"] and a <= end["ts"] < b for r, a, b in slices)
        if all(s.seconds.forward and s.seconds.backward for s in plan.stage_graph.stages):
            sends = [i for p in lower(plan).programs for i in p if isinstance(i, Send)]
            assert len(starts) == 2 * len(sends)


def test_no_slice_has_a_negative_duration_with_odd_times():
    plan = make_plan(chain(3), [1, 1, 1], 6, link=Link(1e-7 / 3, 1e9 / 7))
    events = json.loads(to_chrome(simulate(plan)))["traceEvents"]
    assert min(e["dur"] for e in events if e["ph"] == "X") >= 0
