"""A schedule as text: what refusals show."""

from collections.abc import Sequence

from gpp.schedule.task import (
    Compute,
    Direction,
    Instruction,
    Receive,
    Reduce,
    Report,
    Schedule,
    ScheduleError,
    Send,
    Transfer,
    Update,
)

REACH = 3  # columns shown on each side of the position in question
ROWS = 16  # ranks shown at most


def cell(instruction: Instruction) -> str:
    """A few characters: F[0,4) is a forward, >1 a0[0,4) sends activations of edge 0 to rank 1, <0 g2[4,8)
    receives gradients of edge 2 from rank 0."""
    match instruction:
        case Compute(task):
            return f"{task.kind.value}{task.samples}"
        case Send(transfer):
            return f">{transfer.target} {_message(transfer)}"
        case Receive(transfer):
            return f"<{transfer.source} {_message(transfer)}"
        case Reduce(what, group, _, _, shared):
            tied = f" of tied {shared}" if shared >= 0 else ""
            members = ",".join(map(str, group)) if len(group) <= 4 else f"{len(group)} ranks"
            return f"sum {what.value}{tied} ({members})"
        case Update():
            return "update"
        case Report():
            return "report"


def grid(schedule: Schedule, positions: Sequence[int], marked: int) -> str:
    """Ranks x instructions around `positions` (one a rank), the one of rank `marked` marked."""
    offsets = range(-REACH, REACH + 1)
    first = max(0, min(marked - ROWS // 2, len(schedule.programs) - ROWS))
    ranks = range(first, min(first + ROWS, len(schedule.programs)))
    rows = [["", *(f"{offset:+d}" if offset else "here" for offset in offsets)]]
    for rank in ranks:
        program = schedule.programs[rank]
        row = [f"rank {rank} @{positions[rank]}"]
        for offset in offsets:
            at = positions[rank] + offset
            text = cell(program[at]) if 0 <= at < len(program) else "end" if at == len(program) else "."
            row.append(text + (" <-- here" if rank == marked and not offset else ""))
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def refusal(schedule: Schedule, positions: Sequence[int], marked: int, sentence: str) -> ScheduleError:
    """The error that says which rule is broken by what, and shows where."""
    where = f"rank {marked}, instruction {positions[marked]}"
    return ScheduleError(f"{where}: {sentence}\n{grid(schedule, positions, marked)}")


def _message(transfer: Transfer) -> str:
    return f"{'a' if transfer.direction is Direction.ACTIVATION else 'g'}{transfer.edge}{transfer.samples}"
