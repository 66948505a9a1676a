"""Small changes of a draft: what a local search may try next.

Each takes the stages to be (in the order of their devices) and one of them that the step waits for, and makes
that one lighter, gives it more devices, or shortens the way through it. What is not a plan (a circle, too
many devices, replicas that are not allowed) is for `Drafts.draft` to refuse.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from .draft import Drafts, Part

Parts = tuple[Part, ...]


class Moves:
    """Random changes, all from one seeded stream, so that a search can be repeated."""

    def __init__(self, drafts: Drafts, seed: int, *, spare: bool = False) -> None:
        self.drafts = drafts
        self.random = Random(seed)
        units = drafts.problem.units
        self.beside = [
            tuple(sorted({*before, *after}))
            for before, after in zip(units.predecessors, units.successors, strict=True)
        ]
        self.devices = len(drafts.problem.topology.devices)
        self.mixed = len(set(drafts.problem.topology.devices)) > 1
        self.hosts = self.devices > drafts.problem.topology.per_host
        several = self.mixed or self.hosts
        self.kinds: list[Callable[[Parts, int], Parts | None]] = [
            *[self.shift] * 6,
            *[self.grow, self.merge] * 2,
            *(self.shrink, self.split, self.balance),
            *([self.swap] if several else []),
            *([self.toggle] if spare else []),
        ]

    def propose(self, parts: Parts, shares: Sequence[float]) -> Parts | None:
        """A change around one of the stages, those with large shares more often; None: it came to nothing."""
        s = self.random.choices(range(len(parts)), [share + 1e-12 for share in shares])[0]
        found = self.random.choice(self.kinds)(parts, s)
        return self.afford(found, s) if found is not None else None

    def shift(self, parts: Parts, s: int) -> Parts | None:
        """A unit at the border goes to the neighbour, or sometimes comes from there."""
        other, unit = self._border(parts, s)
        if other is None:
            return None
        if self.random.random() < 0.15:
            there = [v for v in self.beside[unit] if v in parts[other].units]
            return _moved(parts, other, s, frozenset({self.random.choice(there)}))
        return _moved(parts, s, other, frozenset({unit}))

    def balance(self, parts: Parts, s: int) -> Parts | None:
        """Two neighbours are cut anew, at a random place of their common order."""
        other, _ = self._border(parts, s)
        if other is None:
            return None
        both = sorted(parts[s].units | parts[other].units)
        cut = self.random.randrange(1, len(both))
        first = s if min(parts[s].units) < min(parts[other].units) else other
        second = other if first == s else s
        changed = dict(zip((first, second), (frozenset(both[:cut]), frozenset(both[cut:])), strict=True))
        return tuple(_with(part, units=changed.get(i, part.units)) for i, part in enumerate(parts))

    def grow(self, parts: Parts, s: int) -> Parts | None:
        """More replicas."""
        more = [d for d in self.drafts.degrees(parts[s].units) if d > parts[s].devices]
        return _replaced(parts, {s: (_with(parts[s], devices=more[0]),)}) if more else None

    def shrink(self, parts: Parts, s: int) -> Parts | None:
        """Fewer replicas: less to reduce."""
        less = [d for d in self.drafts.degrees(parts[s].units) if d < parts[s].devices]
        return _replaced(parts, {s: (_with(parts[s], devices=less[-1]),)}) if less else None

    def split(self, parts: Parts, s: int) -> Parts | None:
        """One stage becomes two."""
        part = parts[s]
        units = sorted(part.units)
        if len(units) < 2:
            return None
        cut = self.random.randrange(1, len(units))
        half = max(part.devices // 2, 1)
        first, second = self.random.choice(
            [(half, half), (part.devices, part.devices), (part.devices, 1), (1, part.devices)]
        )
        two = (
            _with(part, units=frozenset(units[:cut]), devices=first),
            _with(part, units=frozenset(units[cut:]), devices=second),
        )
        return _replaced(parts, {s: two})

    def merge(self, parts: Parts, s: int) -> Parts | None:
        """A stage and a neighbour, or any other, become one."""
        if len(parts) < 2:
            return None
        other, _ = self._border(parts, s)
        if other is None or self.random.random() < 0.2:
            other = self.random.choice([i for i in range(len(parts)) if i != s])
        together = parts[s].devices + parts[other].devices
        devices = self.random.choice([parts[s].devices, parts[other].devices, together])
        one = _with(parts[s], units=parts[s].units | parts[other].units, devices=devices)
        return _replaced(parts, {min(s, other): (one,), max(s, other): ()})

    def swap(self, parts: Parts, s: int) -> Parts | None:
        """Two stages change places in the order in which they get their devices."""
        other = self.random.randrange(len(parts))
        changed = list(parts)
        changed[s], changed[other] = changed[other], changed[s]
        return tuple(changed) if other != s else None

    def toggle(self, parts: Parts, s: int) -> Parts | None:
        """A stage, or all of them, computes its forward again or no longer does, or shares out its state."""
        options, part = self.drafts.problem.options, parts[s]
        recompute, shard = part.recompute, part.shard_optimizer
        if options.recompute and (not options.shard_optimizer or self.random.random() < 0.7):
            recompute = not recompute
        elif part.devices > 1:
            shard = not shard
        else:
            return None
        chosen = [s] if self.random.random() < 0.7 else range(len(parts))
        return tuple(
            replace(p, recompute=recompute, shard_optimizer=shard and p.devices > 1) if i in chosen else p
            for i, p in enumerate(parts)
        )

    def afford(self, parts: Parts, s: int) -> Parts | None:
        """Take what is missing from stages that are not near number s."""
        for _ in range(2):
            if sum(part.devices for part in parts) <= self.devices:
                return parts
            other = self.random.randrange(len(parts))
            if abs(other - s) <= 1:
                continue
            less = self.shrink(parts, other) if self.random.random() < 0.5 else None
            parts = less or self.merge(parts, other) or parts
        return parts if sum(part.devices for part in parts) <= self.devices else None

    def _border(self, parts: Parts, s: int) -> tuple[int | None, int]:
        """A random neighbour of a stage and the stage's unit at the border."""
        inside = parts[s].units
        edges = [(u, v) for u in sorted(inside) for v in self.beside[u] if v not in inside]
        if not edges:
            return None, -1
        unit, outside = self.random.choice(edges)
        return next(i for i, part in enumerate(parts) if outside in part.units), unit


def _with(part: Part, *, units: frozenset[int] | None = None, devices: int | None = None) -> Part:
    return Part(units or part.units, devices or part.devices, part.recompute, part.shard_optimizer)


def _moved(parts: Parts, source: int, target: int, units: frozenset[int]) -> Parts:
    """Units from one stage to another; a stage without any is gone."""
    changed = {source: parts[source].units - units, target: parts[target].units | units}
    return tuple(
        _with(part, units=changed.get(i, part.units))
        for i, part in enumerate(parts)
        if changed.get(i, part.units)
    )


def _replaced(parts: Parts, by: dict[int, Parts]) -> Parts:
    return tuple(part for i, old in enumerate(parts) for part in by.get(i, (old,)))
