"""A plan as text: what a user reads before a run."""

from collections.abc import Sequence
from itertools import pairwise

from gpp.plan import Choice, Plan, stage_memory


def plan_table(plan: Plan) -> str:
    """A row for every stage (operators, devices, parameters, memory on each device, samples in flight, share
    of the step that its devices compute, and what is special about it if there is such a stage), then idle
    devices, predicted step time, lower bound and gap, what gives the bound, and what each of the planner's
    choices bought."""
    special = _special(plan)
    head: tuple[str, ...]
    head = ("stage", "operators", "devices", "parameters", "memory", "in-flight", "share of time")
    rows = [_row(plan, index) for index in range(len(plan.stage_graph.stages))]
    if any(special):
        width = max(map(len, special))
        head = (*head, "special".ljust(width))
        rows = [(*row, text.ljust(width)) for row, text in zip(rows, special, strict=True)]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [_line(head, widths), "  ".join("-" * width for width in widths)]
    lines += [_line(row, widths) for row in rows]
    return "\n".join([*lines, "", *_summary(plan)]) + "\n"


def _row(plan: Plan, index: int) -> tuple[str, ...]:
    stage = plan.stage_graph.stages[index]
    seconds = stage.seconds
    rounds = plan.mini_batch // stage.micro_batch
    recompute = seconds.recompute if stage.recompute else 0.0
    busy = rounds * (seconds.forward + recompute + seconds.backward) + seconds.update
    memory = stage_memory(plan.stage_graph, index, clocked=plan.clocked).total
    return (
        stage.name,
        str(len(stage.operators)),
        device_ranges(stage.devices),
        readable_bytes(stage.parameter_bytes),
        readable_bytes(memory),
        str(stage.in_flight),
        f"{busy / plan.estimate:.0%}" if plan.estimate else "",
    )


def _special(plan: Plan) -> list[str]:
    """For each stage what its schedule and memory have that not every stage has."""
    stages = plan.stage_graph.stages
    several = len({stage.micro_batch for stage in stages}) > 1
    found = []
    for stage in stages:
        trailing = stage.weight_lag * stage.micro_batch
        notes = {
            f"micro-batch {stage.micro_batch}": several,
            f"k {stage.k}": stage.k > 1,
            "forward again": stage.recompute,
            "optimizer state shared out": stage.shard_optimizer and len(stage.devices) > 1,
            f"weight half {trailing} later": trailing > 0,
            "device shared": len(plan.residents[stage.devices[0]]) > 1,
        }
        found.append(", ".join(text for text, holds in notes.items() if holds))
    return found


def _summary(plan: Plan) -> list[str]:
    graph = plan.stage_graph
    sizes = sorted({stage.micro_batch for stage in graph.stages})
    size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    lines = [
        f"planner {plan.planner}: {_count(len(graph.stages), 'stage')}, depth {graph.depth}, mini-batch "
        f"{plan.mini_batch}, micro-batch {size}, schedule {plan.policy.name}"
    ]
    if plan.idle_devices:
        lines.append(f"idle devices: {device_ranges(plan.idle_devices)}")
    if plan.estimate:
        line = (
            f"predicted step {readable_seconds(plan.estimate)}, "
            f"{plan.mini_batch / plan.estimate:.4g} samples/s"
        )
        if plan.gap is not None:
            line += f"; lower bound {readable_seconds(plan.lower_bound)} (gap {plan.gap:.1%})"
            line += f" by {plan.bound_by}" if plan.bound_by else ""
        lines.append(line)
    if plan.choices:
        lines.append(f"choices: {_choices(plan.choices)}")
    return lines


def _choices(choices: Sequence[Choice]) -> str:
    """The first with its seconds, then what every further one took off; those that took nothing are named."""
    first = choices[0]
    found = [f"{first.name} {readable_seconds(first.seconds)}"]
    for before, after in pairwise(choices):
        gain = 1 - after.seconds / before.seconds if before.seconds else 0.0
        found.append(f"{after.name} {-gain:.1%}" if gain >= 0.0005 else f"{after.name} none")
    return ", ".join(found)


def device_ranges(devices: Sequence[int]) -> str:
    """(0, 1, 2, 5) as "0-2,5"."""
    parts: list[list[int]] = []
    for device in sorted(devices):
        if parts and device == parts[-1][-1] + 1:
            parts[-1].append(device)
        else:
            parts.append([device])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)


def readable_bytes(size: float) -> str:
    """Bytes in the unit that keeps the number short."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def readable_seconds(seconds: float) -> str:
    """Seconds in the unit that keeps the number short."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first column to the left, numbers to the right."""
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def memory_table(plan: Plan) -> str:
    """A row for every stage: what it needs on each of its devices by the memory model, and what each has."""
    head = (
        *("stage", "devices", "parameters", "gradients", "optimizer", "buffers", "stash", "messages"),
        *("together", "device has"),
    )
    rows = []
    for index, stage in enumerate(plan.stage_graph.stages):
        need = stage_memory(plan.stage_graph, index, clocked=plan.clocked)
        parts = (need.parameters, need.gradients, need.optimizer, need.buffers, need.stash, need.messages)
        has = min(plan.topology.devices[device].memory for device in stage.devices)
        sizes = map(readable_bytes, (*parts, need.total, has))
        rows.append((stage.name, device_ranges(stage.devices), *sizes))
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [_line(head, widths), "  ".join("-" * width for width in widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)]) + "\n"
