"""Prove that a schedule is right before any rank runs it; refuse it with the place where it is not.

What holds of one rank (pieces, dependencies, samples in flight) is read off its program; what holds between
ranks (the two ends of every message, deadlock) is found by comparing and by running it all without a clock.
"""

from collections import defaultdict

from gpp.plan import Plan, PlanError, check_plan, stage_memory
from gpp.schedule.check_rank import RankWalk
from gpp.schedule.grid import refusal
from gpp.schedule.ready import Progress
from gpp.schedule.task import Channel, Receive, Reduce, Schedule, ScheduleError, Send, Transfer


def check(plan: Plan, schedule: Schedule) -> None:
    """Raise ScheduleError unless every rank of the plan can run the schedule and gets what a step is.

    Each replica of a stage computes its pieces once forward and, in training, once backward in the same
    order; whatever a pass reads was received before and whatever it makes is sent once; the two ends of every
    channel agree message by message; samples in flight and memory stay within the plan's bounds; the step
    ends with the plan's reductions and updates; and with the stated number of buffers no rank waits for ever.
    """
    try:
        check_plan(plan)
    except PlanError as error:
        raise ScheduleError(str(error)) from None
    if len(schedule.programs) != len(plan.topology.devices):
        raise ScheduleError(
            f"a schedule needs a program for each of the {len(plan.topology.devices)} devices, it has "
            f"{len(schedule.programs)}"
        )
    channels = _channels(schedule)
    for rank in range(len(schedule.programs)):
        RankWalk(plan, schedule, channels, rank).check()
    _check_ends(schedule)
    _check_buffers(plan, schedule)
    run_to_end(schedule)


def run_to_end(schedule: Schedule) -> None:
    """Run without a clock until nothing moves. Raises ScheduleError if some rank is not at its end then.

    One order of events is enough: every rank's order and every channel's is fixed, so running something never
    keeps another thing from running, and all orders end in the same state.
    """
    progress = Progress(schedule)
    moved = True
    while moved:
        moved = False
        for rank in range(len(schedule.programs)):
            while progress.ready(rank):
                moved = True
                instruction = progress.current(rank)
                ranks = instruction.group if isinstance(instruction, Reduce) else (rank,)
                for member in ranks:
                    for q in progress.finish(member):
                        progress.queues[q].cross()
    if progress.unfinished():
        raise progress.stuck()


def _channels(schedule: Schedule) -> dict[tuple[int, int, int], Channel]:
    found: dict[tuple[int, int, int], Channel] = {}
    for channel in schedule.channels:
        key = (channel.source, channel.target, channel.tag)
        if key in found:
            raise ScheduleError(f"two channels from rank {key[0]} to {key[1]} have the tag {key[2]}")
        if channel.slots < 1:
            raise ScheduleError(
                f"the channel of edge {channel.edge} from rank {key[0]} to {key[1]} needs at least one slot, "
                f"it has {channel.slots}"
            )
        found[key] = channel
    return found


def _check_ends(schedule: Schedule) -> None:
    """Every channel's messages are received one for one in the order they are sent in."""
    sent: dict[tuple[int, int, int], list[tuple[int, Transfer]]] = defaultdict(list)
    received: dict[tuple[int, int, int], list[tuple[int, Transfer]]] = defaultdict(list)
    for program in schedule.programs:
        for at, instruction in enumerate(program):
            if isinstance(instruction, Send | Receive):
                t = instruction.transfer
                ends = sent if isinstance(instruction, Send) else received
                ends[t.source, t.target, t.tag].append((at, t))
    for key in sorted({*sent, *received}):
        outs, ins = sent[key], received[key]
        for i in range(max(len(outs), len(ins))):
            there = outs[i][1] if i < len(outs) else None
            here = ins[i][1] if i < len(ins) else None
            if there != here:
                rank = key[1] if here is not None else key[0]
                at = ins[i][0] if here is not None else outs[i][0]
                raise refusal(
                    schedule,
                    [at] * len(schedule.programs),
                    rank,
                    f"message {i} of tag {key[2]} from rank {key[0]} to {key[1]} is sent as "
                    f"{there and there.samples} and received as {here and here.samples}",
                )


def _check_buffers(plan: Plan, schedule: Schedule) -> None:
    """The rings of buffers that the channels really have fit beside everything else on the device.

    With one micro-batch size they are at most what `stage_memory` charges for messages; where small
    micro-batches meet the replicas of a coarser stage, the peaks of the channels can add up to more.
    """
    rings: dict[int, int] = defaultdict(int)
    for channel in schedule.channels:
        for rank in (channel.source, channel.target):
            rings[rank] += channel.slots * channel.bytes
    for rank, held in plan.residents.items():
        memory = [stage_memory(plan.stage_graph, s) for s in held]
        need = sum(stage.total - stage.messages for stage in memory) + rings[rank]
        have = plan.topology.devices[rank].memory
        if need > have * (1 + 1e-9):
            raise ScheduleError(
                f"rank {rank} needs {need / 2**20:.1f} MiB and has {have / 2**20:.1f} MiB; "
                f"{rings[rank] / 2**20:.1f} MiB of it are message buffers; use a smaller train.micro_batch"
            )
