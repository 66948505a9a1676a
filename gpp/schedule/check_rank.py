"""What must hold of one rank's program whatever the others do: pieces, dependencies, memory, ending."""

from collections import defaultdict
from typing import NoReturn

from gpp.plan import Plan
from gpp.schedule.grid import cell, refusal
from gpp.schedule.lower import closing, returns_gradient, tag
from gpp.schedule.order import micro_batches, piece
from gpp.schedule.ready import INPUT_HALF, WEIGHT_HALF
from gpp.schedule.task import (
    Channel,
    Compute,
    Direction,
    Instruction,
    Pass,
    Receive,
    Reduce,
    Report,
    Samples,
    Schedule,
    Send,
    Task,
    Transfer,
    Update,
)


class RankWalk:
    """One walk over the program of one rank, and what it has done so far."""

    def __init__(
        self,
        plan: Plan,
        schedule: Schedule,
        channels: dict[tuple[int, int, int], Channel],
        rank: int,
        index: int,
    ) -> None:
        self.graph = plan.stage_graph
        self.schedule, self.channels, self.rank, self.index = schedule, channels, rank, index
        self.program = schedule.programs[rank]
        self.stage = self.graph.stages[index]
        self.backward = self.stage.has_backward and not schedule.forward_only
        replica = self.stage.devices.index(rank)
        wholes = micro_batches(self.stage, schedule.samples)
        self.pieces = {p for whole in wholes if (p := piece(self.stage, whole, replica)) is not None}
        tail = closing(plan, index, forward_only=schedule.forward_only)
        self.tail = tail if self.pieces else ()
        self.at = 0
        self.done: dict[Pass, set[Samples]] = {kind: set() for kind in Pass}
        self.forwards: list[Samples] = []
        self.in_flight = 0
        # (edge, direction) to samples received and not used yet, and to samples made and not sent yet
        self.received: dict[tuple[int, Direction], list[Samples]] = defaultdict(list)
        self.unsent: dict[tuple[int, Direction], list[Samples]] = defaultdict(list)
        self.needed_forward = [e for e, edge in enumerate(self.graph.edges) if edge.target == index]
        self.made_forward = [e for e, edge in enumerate(self.graph.edges) if edge.source == index]
        returned = {e for e, edge in enumerate(self.graph.edges) if returns_gradient(self.graph, edge)}
        self.needed_backward = [e for e in self.made_forward if e in returned]
        self.made_backward = [e for e in self.needed_forward if e in returned]

    def check(self) -> None:
        """Raise ScheduleError at the first wrong instruction, or at the end if something is missing."""
        passes = len(self.program) - len(self.tail)
        for at, instruction in enumerate(self.program):
            self.at = at
            self._check_place(instruction, passes)
            match instruction:
                case Compute(task):
                    self._check_task(task)
                case Receive(transfer):
                    self._check_transfer(transfer, transfer.target)
                    self.received[transfer.edge, transfer.direction].append(transfer.samples)
                case Send(transfer):
                    self._check_transfer(transfer, transfer.source)
                    self._check_made(transfer)
                case Reduce() | Update() | Report():
                    pass
        self.at = len(self.program)
        self._check_complete()

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
        if task.stage != self.index:
            self._refuse(f"this rank computes stage {self.index}, not {task.stage}")
        if task.samples not in self.pieces:
            self._refuse(f"samples {task.samples} are not a piece of this replica")
        if task.kind is Pass.FORWARD:
            self._check_once(task, (Pass.FORWARD,))
            self.forwards.append(task.samples)
            self._use(self.needed_forward, Direction.ACTIVATION, task.samples)
            self._make(self.made_forward, Direction.ACTIVATION, task.samples)
        else:
            self._check_backward(task)
        self.done[task.kind].add(task.samples)
        if self.backward:
            size = len(task.samples) * len(self.stage.devices)
            self.in_flight += size if task.kind is Pass.FORWARD else 0
            self.in_flight -= size if task.kind in WEIGHT_HALF else 0
            if self.in_flight > self.stage.in_flight:
                self._refuse(
                    f"{self.in_flight} samples are in flight, stage {self.stage.name} may hold "
                    f"{self.stage.in_flight}"
                )

    def _check_once(self, task: Task, kinds: tuple[Pass, ...]) -> None:
        if any(task.samples in self.done[kind] for kind in kinds):
            self._refuse(f"samples {task.samples} are computed twice")

    def _check_backward(self, task: Task) -> None:
        if not self.backward:
            self._refuse("there is no backward here")
        if task.samples not in self.done[Pass.FORWARD]:
            self._refuse(f"the backward of {task.samples} comes before the forward")
        if task.kind is Pass.RECOMPUTE:
            return self._check_once(task, (Pass.RECOMPUTE, *INPUT_HALF))
        for halves in (INPUT_HALF, WEIGHT_HALF):
            if task.kind in halves:
                self._check_once(task, halves)
                due = self.forwards[sum(len(self.done[kind]) for kind in halves)]
                if task.samples != due:
                    self._refuse(
                        f"backwards must follow the order of the forwards: {due} is next, not {task.samples}"
                    )
        if task.kind is Pass.BACKWARD_WEIGHT:
            if task.samples not in self.done[Pass.BACKWARD_INPUT]:
                self._refuse(f"the weight half of {task.samples} comes before the input half")
        else:
            self._use(self.needed_backward, Direction.GRADIENT, task.samples)
            self._make(self.made_backward, Direction.GRADIENT, task.samples)

    def _use(self, edges: list[int], way: Direction, samples: Samples) -> None:
        """All of `samples` must have been received on each of these edges, in messages of no others."""
        for edge in edges:
            waiting = self.received[edge, way]
            used = [r for r in waiting if r.intersection(samples)]
            if any(r.intersection(samples) != r for r in used) or not _is_cover(used, samples):
                found = ", ".join(map(str, used)) or "none"
                self._refuse(f"{way.value}s of {samples} on edge {edge} are needed, received are {found}")
            self.received[edge, way] = [r for r in waiting if not r.intersection(samples)]

    def _make(self, edges: list[int], way: Direction, samples: Samples) -> None:
        for edge in edges:
            self.unsent[edge, way].append(samples)

    def _check_made(self, transfer: Transfer) -> None:
        """What is sent must have been made and not been sent yet."""
        unsent = self.unsent[transfer.edge, transfer.direction]
        for at, made in enumerate(unsent):
            if made.intersection(transfer.samples) == transfer.samples:
                rest = ((made.start, transfer.samples.start), (transfer.samples.stop, made.stop))
                unsent[at : at + 1] = [Samples(a, b) for a, b in rest if a < b]
                return
        self._refuse(
            f"{transfer.direction.value}s of {transfer.samples} on edge {transfer.edge} are sent twice or "
            "before they are made"
        )

    def _check_transfer(self, transfer: Transfer, end: int) -> None:
        """The message goes along an edge of the plan, over its channel, with the bytes that it has."""
        if end != self.rank:
            self._refuse(f"the message is rank {end}'s, this is rank {self.rank}")
        if not 0 <= transfer.edge < len(self.graph.edges):
            self._refuse(f"the stage graph has no edge {transfer.edge}")
        edge = self.graph.edges[transfer.edge]
        forward = transfer.direction is Direction.ACTIVATION
        source, target = (edge.source, edge.target) if forward else (edge.target, edge.source)
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

    def _check_complete(self) -> None:
        """Nothing is missing and nothing is left over."""
        halves = (INPUT_HALF, WEIGHT_HALF) if self.backward else ()
        for kinds in ((Pass.FORWARD,), *halves):
            missing = self.pieces.difference(*(self.done[kind] for kind in kinds))
            if missing:
                names = " or ".join(kind.value for kind in kinds)
                self._refuse(f"samples {min(missing)} are never computed ({names})")
        for what, ledger in (("received and not used", self.received), ("made and not sent", self.unsent)):
            for (edge, way), left in ledger.items():
                if left:
                    self._refuse(f"{way.value}s of {left[0]} on edge {edge} are {what}")
        if len(self.program) < len(self.tail):
            self._refuse("the step must end with " + ", ".join(map(cell, self.tail)))


def _is_cover(parts: list[Samples], whole: Samples) -> bool:
    """Whether the parts are a partition of the whole."""
    at = whole.start
    for part in sorted(parts):
        if part.start != at:
            return False
        at = part.stop
    return at == whole.stop
