"""How far each stage of a draft runs ahead, and by how much its weight halves trail, within its memory.

The templates of zero-bubble schedules on a graph of stages: what GraphPipe leaves fixed (GraphPipe §6 always
has the depth in flight). Counts are micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpp.plan import Policy
from gpp.topology import DeviceTopology

from .draft import Draft
from .pace import Pace, pace


@dataclass(frozen=True, slots=True)
class Rhythm:
    """A schedule of a draft: `warms` forwards before the first backward, weight halves trail by `lags`."""

    policy: Policy
    warms: tuple[int, ...]
    lags: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of rhythms: 1F1B with `extra` micro-batches a hop ahead, or with `reach` the zero-bubble
    template in which a stage may hold `reach` times as much as the first stage of 1F1B does; GPipe."""

    extra: int = 0
    reach: float = 0.0
    gpipe: bool = False


def limits(draft: Draft, topology: DeviceTopology) -> tuple[float, ...]:
    """Bytes that each stage may take on its smallest device."""
    return tuple(min(topology.devices[d].memory for d in place) for place in draft.places)


def fits(draft: Draft, rhythm: Rhythm, most: Sequence[float]) -> bool:
    """Whether every stage stays within its devices' memory."""
    return all(need <= have for need, have in zip(draft.memory(rhythm.warms, rhythm.lags), most, strict=True))


def rhythm(draft: Draft, kind: Kind, rounds: int, most: Sequence[float]) -> Rhythm | None:
    """The family's rhythm that fits memory; where the family has none, 1F1B with as little in flight as it
    takes. None: not even one micro-batch fits. O(stages x edges) at worst."""
    depths = draft.depths
    none = (0,) * len(depths)
    if kind.gpipe:
        found = Rhythm(Policy("gpipe"), (rounds,) * len(depths), none)
        return found if fits(draft, found, most) else None
    if kind.reach:
        depth = max(depths)
        for reach in range(math.ceil(kind.reach * depth), depth - 1, -1):
            trailing = _trailing(draft, reach, rounds, most)
            if trailing is not None:
                return trailing
    for extra in range(kind.extra, -1, -1):
        ahead = Rhythm(
            Policy(extra_warm_up=extra), tuple(min(d + extra * (d - 1), rounds) for d in depths), none
        )
        if fits(draft, ahead, most):
            return ahead
    for found in (delayed(draft, rounds), *(_scarce(draft, part, rounds) for part in (3, 2, 1, 0))):
        if fits(draft, found, most):
            return found
    return None


def delayed(draft: Draft, rounds: int) -> Rhythm:
    """1F1B in which a light branch holds no more than keeps the slowest stage busy: as many micro-batches as
    the slowest stage works off while one goes from here to the sinks and back; and one more than the stage
    after it, unless that has time to wait until its gradient has become the next forward."""
    period = max(beat.busy for beat in draft.beats)
    loops = [beat.forward for beat in draft.beats]
    for hop in reversed(draft.hops):  # sorted by source
        after = draft.beats[hop.target]
        below = hop.there + loops[hop.target] + after.input + after.weight + (hop.back or 0.0)
        loops[hop.source] = max(loops[hop.source], draft.beats[hop.source].forward + below)
    warms = []
    for depth, loop, beat in zip(draft.depths, loops, draft.beats, strict=True):
        needed = math.ceil((loop + beat.input + beat.weight) / period * (1 - 1e-9)) if period > 0 else depth
        warms.append(max(min(depth, needed, rounds), 1))
    for hop in reversed(draft.hops):
        here = draft.beats[hop.source]
        turn = (hop.back or 0.0) + here.busy + hop.there
        ahead = warms[hop.target] + (turn > period - draft.beats[hop.target].busy)
        warms[hop.source] = min(max(warms[hop.source], ahead), draft.depths[hop.source], rounds)
    return Rhythm(Policy(), tuple(warms), (0,) * len(warms))


def _scarce(draft: Draft, quarters: int, rounds: int) -> Rhythm:
    """1F1B with a part of the depth in flight: slower, but it never falls along an edge, so it runs."""
    warms = tuple(min(1 + (d - 1) * quarters // 4, rounds) for d in draft.depths)
    return Rhythm(Policy(), warms, (0,) * len(warms))


def timed(draft: Draft, found: Rhythm, rounds: int, meeting: float | None) -> Pace:
    """The draft's step in this rhythm."""
    return pace(draft.beats, draft.hops, found.warms, found.lags, rounds, meeting=meeting)


def _trailing(draft: Draft, reach: int, rounds: int, most: Sequence[float]) -> Rhythm | None:
    """The template for `reach` micro-batches: warm-ups fall by at least one along every edge, from `reach` at
    the deepest stage, for clipped ones are slower than none; the rest of a stage's `reach` is its lag, if it
    would otherwise wait that long at the end of a step."""
    depth = max(draft.depths)
    slope = max(depth - 1, 1)
    warms = tuple(min(d + (reach - depth) * (d - 1) // slope, rounds) for d in draft.depths)
    policy = Policy("zero-bubble")
    if not fits(draft, Rhythm(policy, warms, (0,) * len(warms)), most):
        return None
    lags = []
    for s, (beat, idle) in enumerate(zip(draft.beats, _idle(draft), strict=True)):
        useful = math.ceil(idle / beat.weight) if beat.weight > 0 else 0
        lags.append(max(min(reach - warms[s], useful, rounds - warms[s]), 0))
    while True:
        need = draft.memory(warms, lags)
        over = [s for s, (n, have) in enumerate(zip(need, most, strict=True)) if n > have]
        if not over:
            return Rhythm(policy, warms, tuple(lags))
        for s in over:
            below = [hop.target for hop in draft.hops if hop.source == s and lags[hop.target]]
            for t in [s] if lags[s] else below:
                lags[t] = max(lags[t] - 1, 0)


def _idle(draft: Draft) -> list[float]:
    """Seconds that each stage waits at the end of a step: while its last gradient goes up to a source and the
    update's first forward comes down; 0 for sources, which have nobody waiting for their input half."""
    up, down = [0.0] * len(draft.parts), [0.0] * len(draft.parts)
    ends = [beat.reduce + beat.update for beat in draft.beats]
    first = [True] * len(draft.parts)
    for hop in draft.hops:
        first[hop.target] = False
    for hop in draft.hops:  # sorted by source
        u, v = hop.source, hop.target
        here = draft.beats[u]
        if hop.back is not None:
            home = here.weight + ends[u] if first[u] else 0.0
            up[v] = max(up[v], up[u] + here.input + hop.back + home)
        down[v] = max(down[v], down[u] + here.forward + hop.there)
    return [0.0 if first[s] else max(up[s] + down[s] - ends[s], 0.0) for s in range(len(draft.parts))]
