"""What must hold of one rank's program whatever the others do: places, messages, ending."""

from typing import NoReturn

from gpp.plan import Plan
from gpp.schedule.check_stage import StageLedger
from gpp.schedule.grid import cell, refusal
from gpp.schedule.lower import closing, returns_gradient, tag
from gpp.schedule.task import (
    Channel,
    Compute,
    Direction,
    Instruction,
    Receive,
    Reduce,
    Report,
    Schedule,
    Send,
    Task,
    Transfer,
    Update,
)


class RankWalk:
    """One walk over the program of one rank, and what its stages have done so far."""

    def __init__(
        self, plan: Plan, schedule: Schedule, channels: dict[tuple[int, int, int], Channel], rank: int
    ) -> None:
        self.graph = plan.stage_graph
        self.schedule, self.channels, self.rank = schedule, channels, rank
        self.program = schedule.programs[rank]
        self.ledgers = {
            s: StageLedger(plan, schedule, rank, s, self._refuse) for s in plan.residents.get(rank, ())
        }
        working = [s for s, ledger in self.ledgers.items() if ledger.pieces]
        self.tail = closing(plan, working, forward_only=schedule.forward_only) if working else ()
        self.at = 0

    def check(self) -> None:
        """Raise ScheduleError at the first wrong instruction, or at the end if something is missing."""
        if not self.ledgers and self.program:
            self._refuse("no stage is on this rank")
        passes = len(self.program) - len(self.tail)
        for at, instruction in enumerate(self.program):
            self.at = at
            self._check_place(instruction, passes)
            match instruction:
                case Compute(task):
                    self._check_task(task)
                case Receive(transfer):
                    self._check_transfer(transfer, transfer.target)
                    self.ledgers[self._end(transfer, receiving=True)].receive(transfer)
                case Send(transfer):
                    self._check_transfer(transfer, transfer.source)
                    self.ledgers[self._end(transfer, receiving=False)].send(transfer)
                case Reduce() | Update() | Report():
                    pass
        self.at = len(self.program)
        for ledger in self.ledgers.values():
            ledger.check_complete()
        if len(self.program) < len(self.tail):
            self._refuse("the step must end with " + ", ".join(map(cell, self.tail)))

    def _refuse(self, sentence: str) -> NoReturn:
        raise refusal(self.schedule, [self.at] * len(self.schedule.programs), self.rank, sentence)

    def _check_place(self, instruction: Instruction, passes: int) -> None:
        """Passes and messages first, then exactly the plan's closing."""
        if self.at >= passes >= 0:
            wanted = self.tail[self.at - passes]
            if instruction != wanted:
                show = cell if cell(instruction) != cell(wanted) else repr
                self._refuse(f"the step must end with {show(wanted)} here, not with {show(instruction)}")
        elif isinstance(instruction, Reduce | Update | Report):
            self._refuse(f"{cell(instruction)} must come after the last pass, and only if the plan says so")

    def _check_task(self, task: Task) -> None:
        if task.stage not in self.ledgers:
            mine = " and ".join(map(str, self.ledgers))
            self._refuse(f"this rank computes stage {mine}, not {task.stage}")
        # buffers are given back by samples, so what is for one stage must not lie about during another's pass
        for s, ledger in self.ledgers.items():
            waiting = [edge for (edge, _), samples in ledger.received.items() if samples]
            if s != task.stage and waiting:
                self._refuse(f"what came for stage {s} on edge {waiting[0]} must be used by the next pass")
        self.ledgers[task.stage].compute(task)

    def _end(self, transfer: Transfer, *, receiving: bool) -> int:
        """The stage at which a message ends (or begins)."""
        edge = self.graph.edges[transfer.edge]
        return edge.target if (transfer.direction is Direction.ACTIVATION) is receiving else edge.source

    def _check_transfer(self, transfer: Transfer, end: int) -> None:
        """The message goes along an edge of the plan, over its channel, with the bytes that it has."""
        if end != self.rank:
            self._refuse(f"the message is rank {end}'s, this is rank {self.rank}")
        if not 0 <= transfer.edge < len(self.graph.edges):
            self._refuse(f"the stage graph has no edge {transfer.edge}")
        edge = self.graph.edges[transfer.edge]
        forward = transfer.direction is Direction.ACTIVATION
        source, target = (self._end(transfer, receiving=receiving) for receiving in (False, True))
        devices = [self.graph.stages[s].devices for s in (source, target)]
        if transfer.source not in devices[0] or transfer.target not in devices[1]:
            self._refuse(
                f"edge {transfer.edge} joins stages {source} and {target} in this direction, on ranks "
                f"{devices[0]} and {devices[1]}, not {transfer.source} and {transfer.target}"
            )
        if not forward and (self.schedule.forward_only or not returns_gradient(self.graph, edge)):
            self._refuse(f"no gradient goes back along edge {transfer.edge}")
        channel = self.channels.get((transfer.source, transfer.target, transfer.tag))
        if (
            channel is None
            or (channel.edge, channel.direction) != (transfer.edge, transfer.direction)
            or transfer.tag != tag(transfer.edge, transfer.direction)
        ):
            self._refuse(f"there is no channel of edge {transfer.edge} with tag {transfer.tag} for it")
        size = (edge.bytes if forward else edge.gradient_bytes) * len(transfer.samples)
        if transfer.bytes != size or size > channel.bytes:
            self._refuse(
                f"{transfer.samples} of edge {transfer.edge} are {size} bytes, the message has "
                f"{transfer.bytes} and its buffers {channel.bytes}"
            )
