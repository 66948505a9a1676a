"""Who did what when: the result of a simulated and of a measured step alike.

Seconds from the start of the trace; samples as (start, stop).
"""

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gpp.records import from_json, to_json

FORMAT = "gpp.trace/1"


class Activity(Enum):
    """What a rank spends time on."""

    COMPUTE = "compute"
    SEND = "send"
    WAIT = "wait"
    REDUCE = "reduce"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Span:
    """One rank busy (or waiting) from `start` to `stop`.

    `label` is short and the same in simulated and measured traces: "F", "B", "I", "W", "R" for passes, "recv"
    and "send" for messages, "reduce gradients" and so on. `step` counts optimizer steps in the trace.
    """

    rank: int
    activity: Activity
    label: str
    start: float
    stop: float
    stage: int = -1
    samples: tuple[int, int] | None = None
    edge: int = -1
    step: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Spans of one or several steps. `step_seconds` is the period between updates in the steady state."""

    name: str
    ranks: int
    spans: tuple[Span, ...]
    step_seconds: float
    mini_batch: int
    stage_names: tuple[str, ...] = ()


def trace_to_json(trace: Trace) -> str:
    """The trace as JSON, to read back; `to_chrome` is for looking at it."""
    return to_json(trace, FORMAT)


def trace_from_json(text: str) -> Trace:
    """Read `trace_to_json`'s text back. Raises RecordError naming what is malformed."""
    return from_json(Trace, text, FORMAT)


def busy_seconds(trace: Trace) -> tuple[float, ...]:
    """Seconds that each rank computes or updates in one step, on average over the steps of the trace."""
    busy = [0.0] * trace.ranks
    for span in trace.spans:
        if span.activity in (Activity.COMPUTE, Activity.UPDATE):
            busy[span.rank] += span.stop - span.start
    steps = len({span.step for span in trace.spans}) or 1
    return tuple(seconds / steps for seconds in busy)


def bubble(trace: Trace) -> tuple[float, ...]:
    """The share of a step in the steady state for which each rank is not busy: 1 - busy / step_seconds."""
    period = trace.step_seconds
    return tuple(max(0.0, 1 - busy / period) if period > 0 else 0.0 for busy in busy_seconds(trace))


def samples_per_second(trace: Trace) -> float:
    """Throughput in the steady state."""
    return trace.mini_batch / trace.step_seconds if trace.step_seconds > 0 else float("inf")


def peak_in_flight(trace: Trace) -> tuple[int, ...]:
    """The most samples each rank holds for their backward; 0 for a rank that runs none."""
    held, peak = [0] * trace.ranks, [0] * trace.ranks
    for span in sorted(trace.spans, key=lambda span: span.start):
        if span.activity is Activity.COMPUTE and span.samples is not None:
            size = span.samples[1] - span.samples[0]
            held[span.rank] += {"F": size, "B": -size, "W": -size}.get(span.label, 0)
            peak[span.rank] = max(peak[span.rank], held[span.rank])
    backward = {span.rank for span in trace.spans if span.label in ("B", "W")}
    return tuple(most if rank in backward else 0 for rank, most in enumerate(peak))


def waiting_seconds(trace: Trace) -> dict[int, float]:
    """Edge to the seconds that ranks wait for its messages, in one step, over all ranks."""
    waiting: dict[int, float] = defaultdict(float)
    for span in trace.spans:
        if span.activity is Activity.WAIT and span.edge >= 0:
            waiting[span.edge] += span.stop - span.start
    steps = len({span.step for span in trace.spans}) or 1
    return {edge: waiting[edge] / steps for edge in sorted(waiting)}


def compare(predicted: Trace, measured: Trace) -> str:
    """Both traces in a line: step time, mean bubble of the ranks that work, and the edge waited for most."""
    change = measured.step_seconds / predicted.step_seconds - 1 if predicted.step_seconds > 0 else 0.0
    idle = [_mean_bubble(trace) for trace in (predicted, measured)]
    line = (
        f"step {_time(predicted.step_seconds)} {predicted.name}, "
        f"{_time(measured.step_seconds)} {measured.name} ({change:+.1%}); "
        f"bubble {idle[0]:.1%} and {idle[1]:.1%}"
    )
    waiting = waiting_seconds(measured)
    if waiting:
        edge = max(waiting, key=lambda e: waiting[e])
        line += f"; most waiting on edge {edge}, {_time(waiting[edge])} a step"
    return line


def to_chrome(*traces: Trace) -> str:
    """JSON for ui.perfetto.dev or chrome://tracing: a process per trace, a thread per rank, an arrow per
    message from the pass that made it to the pass that used it."""
    events: list[dict[str, Any]] = []
    for process, trace in enumerate(traces):
        events += _names(process, trace)
        events += [_slice(process, span) for span in trace.spans if span.stop > span.start]
        events += _arrows(process, trace, first=len(events))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _mean_bubble(trace: Trace) -> float:
    working = {span.rank for span in trace.spans}
    shares = [share for rank, share in enumerate(bubble(trace)) if rank in working]
    return sum(shares) / len(shares) if shares else 0.0


def _time(seconds: float) -> str:
    scale, unit = next(
        (s, u) for s, u in ((1.0, "s"), (1e3, "ms"), (1e6, "us")) if seconds * s >= 1 or u == "us"
    )
    return f"{seconds * scale:.4g} {unit}"


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _names(process: int, trace: Trace) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": trace.name}}
    stages = {span.rank: span.stage for span in trace.spans if span.stage >= 0}
    for rank in range(trace.ranks):
        stage = stages.get(rank, -1)
        name = trace.stage_names[stage] if 0 <= stage < len(trace.stage_names) else "idle"
        arguments = {"name": f"rank {rank}: {name}"}
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": arguments}


def _slice(process: int, span: Span) -> dict[str, Any]:
    about: dict[str, Any] = {"step": span.step, "stage": span.stage}
    name = span.label
    if span.samples is not None:
        about["samples"] = f"[{span.samples[0]},{span.samples[1]})"
        name = f"{name} {about['samples']}"
    if span.edge >= 0:
        about["edge"] = span.edge
    return {
        "ph": "X",
        "name": name,
        "cat": span.activity.value,
        "pid": process,
        "tid": span.rank,
        "ts": _microseconds(span.start),
        "dur": _microseconds(span.stop - span.start),
        "args": about,
    }


def _arrows(process: int, trace: Trace, first: int) -> Iterator[dict[str, Any]]:
    """A flow per message. Its ends must lie in slices: a send without a duration leaves from the end of the
    pass before it, and it goes to the pass that follows the receive."""
    passes: dict[int, list[Span]] = defaultdict(list)
    received: dict[tuple[int, int, tuple[int, int] | None], list[Span]] = defaultdict(list)
    for span in sorted(trace.spans, key=lambda span: span.start):
        if span.activity is Activity.COMPUTE and span.stop > span.start:
            passes[span.rank].append(span)
        elif span.activity is Activity.WAIT and span.label == "recv":
            received[span.step, span.edge, span.samples].append(span)
    starts = {rank: [span.start for span in spans] for rank, spans in passes.items()}
    number = first
    for span in trace.spans:
        if span.activity is not Activity.SEND:
            continue
        # an activation and the gradient of the same samples differ in which stage sends
        there = [r for r in received[span.step, span.edge, span.samples] if r.stage != span.stage]
        for receive in there[:1]:
            before = bisect_left(starts.get(span.rank, []), span.start) - 1
            after = bisect_left(starts.get(receive.rank, []), receive.stop)
            if (before < 0 and span.stop == span.start) or after == len(starts.get(receive.rank, [])):
                continue
            leaves = span.start if span.stop > span.start else passes[span.rank][before].stop - 1e-9
            common = {"name": f"edge {span.edge}", "cat": "edge", "id": number, "pid": process}
            yield {**common, "ph": "s", "tid": span.rank, "ts": _microseconds(leaves)}
            arrives = passes[receive.rank][after].start
            yield {**common, "ph": "f", "bp": "e", "tid": receive.rank, "ts": _microseconds(arrives)}
            number += 1
