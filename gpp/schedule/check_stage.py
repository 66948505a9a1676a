"""What must hold of one stage on one rank: every piece once each way, in order, within the plan's bounds."""

from collections import defaultdict
from collections.abc import Callable
from typing import NoReturn

from gpp.plan import Plan
from gpp.schedule.lower import returns_gradient
from gpp.schedule.pieces import micro_batches, piece
from gpp.schedule.task import (
    INPUT_HALF,
    WEIGHT_HALF,
    Direction,
    Pass,
    Samples,
    Schedule,
    Task,
    Transfer,
)


class StageLedger:
    """What the stage has received, computed and sent so far; `refuse` raises with the place.

    Sizes are of the whole stage: all replicas hold as much as this one.
    """

    def __init__(
        self, plan: Plan, schedule: Schedule, rank: int, index: int, refuse: Callable[[str], NoReturn]
    ) -> None:
        graph = plan.stage_graph
        self.refuse = refuse
        self.stage = graph.stages[index]
        self.backward = self.stage.has_backward and not schedule.forward_only
        replica = self.stage.devices.index(rank)
        wholes = micro_batches(self.stage, schedule.samples)
        self.pieces = {p for whole in wholes if (p := piece(self.stage, whole, replica)) is not None}
        self.done: dict[Pass, set[Samples]] = {kind: set() for kind in Pass}
        self.forwards: list[Samples] = []
        self.in_flight = 0
        self.halves = 0  # samples whose input half has begun and whose weight half has not ended
        # (edge, direction) to samples received and not used yet, and to samples made and not sent yet
        self.received: dict[tuple[int, Direction], list[Samples]] = defaultdict(list)
        self.unsent: dict[tuple[int, Direction], list[Samples]] = defaultdict(list)
        self.needed_forward = [e for e, edge in enumerate(graph.edges) if edge.target == index]
        self.made_forward = [e for e, edge in enumerate(graph.edges) if edge.source == index]
        returned = {e for e, edge in enumerate(graph.edges) if returns_gradient(graph, edge)}
        self.needed_backward = [e for e in self.made_forward if e in returned]
        self.made_backward = [e for e in self.needed_forward if e in returned]

    def receive(self, transfer: Transfer) -> None:
        """A message is here."""
        self.received[transfer.edge, transfer.direction].append(transfer.samples)

    def compute(self, task: Task) -> None:
        """A pass runs: once, in order, with all that it needs, and with room for what it keeps."""
        if task.samples not in self.pieces:
            self.refuse(f"samples {task.samples} are not a piece of this replica")
        if task.kind is Pass.FORWARD:
            self._once(task, (Pass.FORWARD,))
            self.forwards.append(task.samples)
            self._use(self.needed_forward, Direction.ACTIVATION, task.samples)
            self._make(self.made_forward, Direction.ACTIVATION, task.samples)
        else:
            self._check_backward(task)
        self.done[task.kind].add(task.samples)
        if self.backward:
            self._hold(task)

    def send(self, transfer: Transfer) -> None:
        """What is sent must have been made and not been sent yet."""
        unsent = self.unsent[transfer.edge, transfer.direction]
        for at, made in enumerate(unsent):
            if made.intersection(transfer.samples) == transfer.samples:
                rest = ((made.start, transfer.samples.start), (transfer.samples.stop, made.stop))
                unsent[at : at + 1] = [Samples(a, b) for a, b in rest if a < b]
                return
        self.refuse(
            f"{transfer.direction.value}s of {transfer.samples} on edge {transfer.edge} are sent twice or "
            "before they are made"
        )

    def check_complete(self) -> None:
        """Nothing is missing and nothing is left over."""
        halves = (INPUT_HALF, WEIGHT_HALF) if self.backward else ()
        for kinds in ((Pass.FORWARD,), *halves):
            missing = self.pieces.difference(*(self.done[kind] for kind in kinds))
            if missing:
                names = " or ".join(kind.value for kind in kinds)
                self.refuse(f"samples {min(missing)} are never computed ({names})")
        for what, ledger in (("received and not used", self.received), ("made and not sent", self.unsent)):
            for (edge, way), left in ledger.items():
                if left:
                    self.refuse(f"{way.value}s of {left[0]} on edge {edge} are {what}")

    def _hold(self, task: Task) -> None:
        size = len(task.samples) * len(self.stage.devices)
        self.in_flight += size if task.kind is Pass.FORWARD else 0
        self.in_flight -= size if task.kind in WEIGHT_HALF else 0
        if self.in_flight > self.stage.in_flight:
            self.refuse(
                f"{self.in_flight} samples are in flight, stage {self.stage.name} may hold "
                f"{self.stage.in_flight}"
            )
        self.halves += size if task.kind in INPUT_HALF else 0
        most = (1 + self.stage.weight_lag) * self.stage.micro_batch
        if self.stage.recompute and self.halves > most:
            self.refuse(
                f"{self.halves} samples wait for their weight half, stage {self.stage.name} recomputes what "
                f"it needs for them and may hold {most}"
            )
        self.halves -= size if task.kind in WEIGHT_HALF else 0

    def _once(self, task: Task, kinds: tuple[Pass, ...]) -> None:
        if any(task.samples in self.done[kind] for kind in kinds):
            self.refuse(f"samples {task.samples} are computed twice")

    def _check_backward(self, task: Task) -> None:
        if not self.backward:
            self.refuse("there is no backward here")
        if task.samples not in self.done[Pass.FORWARD]:
            self.refuse(f"the backward of {task.samples} comes before the forward")
        if task.kind is Pass.RECOMPUTE:
            return self._once(task, (Pass.RECOMPUTE, *INPUT_HALF))
        for halves in (INPUT_HALF, WEIGHT_HALF):
            if task.kind in halves:
                self._once(task, halves)
                due = self.forwards[sum(len(self.done[kind]) for kind in halves)]
                if task.samples != due:
                    self.refuse(
                        f"backwards must follow the order of the forwards: {due} is next, not {task.samples}"
                    )
        if task.kind is Pass.BACKWARD_WEIGHT:
            if task.samples not in self.done[Pass.BACKWARD_INPUT]:
                self.refuse(f"the weight half of {task.samples} comes before the input half")
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
                self.refuse(f"{way.value}s of {samples} on edge {edge} are needed, received are {found}")
            self.received[edge, way] = [r for r in waiting if not r.intersection(samples)]

    def _make(self, edges: list[int], way: Direction, samples: Samples) -> None:
        for edge in edges:
            self.unsent[edge, way].append(samples)


def _is_cover(parts: list[Samples], whole: Samples) -> bool:
    """Whether the parts are a partition of the whole."""
    at = whole.start
    for part in sorted(parts):
        if part.start != at:
            return False
        at = part.stop
    return at == whole.stop
