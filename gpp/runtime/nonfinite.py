"""What becomes of a step whose loss or gradients are not finite. All ranks decide alike.

By then all ranks have undone it (`executor`). It is run once more, operator by operator, to see where it
began: random numbers are keyed, so it goes the same way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gpp.plan import Plan
from gpp.program.stage import StageProgram, TermSum

from .communicator import Communicator
from .culprit import Culprits, described
from .executor import Batch, Executor, StepOutcome
from .inspection import Found, Inspection
from .reduce import Slots
from .reports import COLLECTOR
from .results import Total

OnNonfinite = Literal["stop", "skip"]
CHOICES: tuple[str, ...] = get_args(OnNonfinite)
MAX_SKIPS = 10  # in a row, unless it is said otherwise


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite, where training is to stop then. Raised on all ranks, with the
    same words; weights, optimizer and buffers are as they were before the step."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What to do: end training, or leave the step out unless it were more than `max_skips` in a row."""

    choice: OnNonfinite
    max_skips: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a step that is not finite: why, and whether training ends. Nothing has moved in it."""

    step: int
    reason: str
    ends: bool


class Guard:
    """One rank's part. `programs` are those of its stages; `skipped` is how many steps were left out."""

    def __init__(
        self,
        comm: Communicator,
        plan: Plan,
        programs: Sequence[StageProgram],
        loss: TermSum,
        policy: Policy | None,
    ) -> None:
        self.skipped = 0
        self._comm, self._plan, self._programs, self._loss, self._policy = comm, plan, programs, loss, policy
        self._in_a_row = 0
        self._everyone = tuple(range(comm.size))
        self._idle = len(plan.residents) < comm.size  # ranks without a stage have to be told
        self._slots = Slots()

    def judge(
        self,
        executor: Executor,
        step: int,
        batch: Batch,
        outcome: StepOutcome,
        loss: Callable[[], Total],
        left: int,
    ) -> Verdict | None:
        """After a step, before its stretch is closed, of which `left` steps are left: None if all is finite.
        `loss` gives the step's, on rank 0."""
        if self._policy is None:
            return None
        wrong = outcome.nonfinite is not None
        if self._idle:
            wrong = any(flag for (flag,) in self._slots.gather(self._comm, self._everyone, [float(wrong)]))
        if not wrong:
            self._in_a_row = 0
            return None
        reason = self._reason(executor, step, batch, outcome, loss)
        self._in_a_row += 1
        ends = self._policy.choice == "stop" or self._in_a_row > self._policy.max_skips
        if ends:
            left = 0
            if self._policy.choice == "skip":
                reason = f"{self._in_a_row} steps in a row are not finite; {reason}"
        else:
            self.skipped += 1
        executor.channels.open(left)
        return Verdict(step, f"step {step}: {reason}", ends)

    def _reason(
        self, executor: Executor, step: int, batch: Batch, outcome: StepOutcome, loss: Callable[[], Total]
    ) -> str:
        """In words, the same on all ranks; the stretch is closed then."""
        executor.channels.close()
        mine = _of_loss(loss()) if self._comm.rank == COLLECTOR else ""
        wrong = self._comm.all_gather_object((mine, outcome.nonfinite or ()))
        # by now all have taken back the receives that they had posted for later steps
        executor.channels.open(1)
        inspection = Inspection(self._comm.rank, self._programs, self._loss)
        executor.replay(step, batch, inspection.functions)
        executor.channels.close()
        found: list[Found] = self._comm.all_gather_object(inspection.found)
        names = list(dict.fromkeys(name for _, own in wrong for name in own))
        what = " and ".join(text for text in (wrong[COLLECTOR][0], _of_gradients(names)) if text)
        where = described(Culprits(found), self._plan.stage_graph)
        return f"{what}. " + (f"It began here: {where}" if where is not None else _NOWHERE)


_NOWHERE = (
    "Run once more, operator by operator, everything was finite: a sum over micro-batches, replicas or all "
    "gradients has overflowed, or compiled kernels compute something else"
)


def _of_loss(loss: Total) -> str:
    if loss.weight == 0:
        return "the weights of the loss add up to 0"
    return f"the loss is {loss.mean:g}"


def _of_gradients(names: Sequence[str]) -> str:
    if not names:
        return ""
    if len(names) == 1:
        return f"the gradient of {names[0]} is not finite"
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"the gradients of {', '.join(names[:2])}{more} are not finite"
