"""Local search on drafts: small changes that are kept while the step gets shorter (threshold accepting).

Not a local optimum of one kind of move: branches that are equally long must all become shorter before the
step does, so changes that cost little are accepted for a while (Dueck and Scheuer 1990). Deterministic: a
seeded stream of changes and a budget of simulated tasks, never of seconds.
"""

import math
from dataclasses import dataclass

from .draft import Draft, Drafts
from .memory_choices import spared
from .moves import Moves, Parts
from .pace import Pace
from .rhythm import Kind, Rhythm, limits, rhythm, timed

PATIENCE = 0.02  # of the step: how much worse is accepted at first


@dataclass(frozen=True, slots=True)
class Shape:
    """A draft with its rhythm and its step; `parts` in the order of their devices."""

    parts: Parts
    draft: Draft
    rhythm: Rhythm
    pace: Pace

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.pace.seconds


def shaped(
    drafts: Drafts, parts: Parts, kind: Kind, *, spare: bool = False, within: float = math.inf
) -> Shape | None:
    """The parts as a plan; None: they are none, do not fit memory, or their step must take longer than
    `within`.

    With `spare`, stages that do not fit do what the options allow to need less, see `memory_choices`.
    """
    options, topology = drafts.problem.options, drafts.problem.topology
    while True:
        draft = drafts.draft(parts)
        if draft is None or max(drafts.rounds * b.busy + b.update for b in draft.beats) > within:
            return None
        most = limits(draft, topology)
        found = rhythm(draft, kind, drafts.rounds, most)
        if found is not None:
            break
        leaner = spared(draft, parts, most, options) if spare else parts
        if leaner == parts:
            return None
        parts = leaner
    try:
        paced = timed(draft, found, drafts.rounds, drafts.meeting)
    except ValueError:
        return None
    return Shape(parts, draft, found, paced)


def clipped(drafts: Drafts, shape: Shape) -> bool:
    """Whether memory leaves some stage less in flight than 1F1B would have."""
    pairs = zip(shape.rhythm.warms, shape.draft.depths, strict=True)
    return any(warm < min(depth, drafts.rounds) for warm, depth in pairs)


def shares(shape: Shape) -> tuple[float, ...]:
    """How much of the step each part's work is on the longest chain of waits."""
    by_part = dict(zip(shape.draft.parts, shape.pace.shares, strict=True))
    return tuple(by_part[part] for part in shape.parts)


def polish(
    drafts: Drafts, start: Shape, kind: Kind, tries: int, *, spare: bool = False, seed: int = 0
) -> Shape:
    """The best shape met in so many tries, each a draft and a simulation; never worse than `start`."""
    moves = Moves(drafts, seed, spare=spare)
    best = here = start
    weights = shares(here)
    for number in range(tries):
        slack = PATIENCE * (1 - number / tries) ** 2
        parts = moves.propose(here.parts, weights)
        if parts is None:
            continue
        most = here.seconds * (1 + slack)
        found = shaped(drafts, parts, kind, spare=spare, within=most)
        if found is not None and found.seconds <= most:
            here, weights = found, shares(found)
            if here.seconds < best.seconds * (1 - 1e-9):
                best = here
    return best
