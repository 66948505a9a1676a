"""A lower bound from how much fits on K devices in a step: weights that no device can hold more than 1 of.

A device with its replicas' share of some stages does, in a step of T seconds, the loads of all their units:
they add up to T at most. A dual feasible function f keeps that: whenever numbers add up to 1 at most, so do
their f. So with weight w = min over degrees d of d f(load_d / T), what is on d devices weighs d at most,
and if all units together weigh more than K, no step takes T. The identity gives the devices' area: all
work, with what replicas add (all-reduce, update). Rounding gives what cannot be packed: two operators of
which each takes more than half a step need two devices (Fekete and Schepers 2001, u^(k) and U^(e)). It
holds for stages that share devices and for any shape of stages.

Where stages do not share devices and backwards are not split, idle time counts too. Between a device's last
backward of a step and its first forward of the next, a micro-batch has to come back to where stage S gets
its inputs from and there: T >= L + O, with L the work of S and O the longest way outside of it (or its own
all-reduce and update, if longer). The way up(v) to an operator v of S and back is at most O and what
precedes v in S, once: up(v) <= O + q(v), and sum of load(v) q(v) <= L^2 / 2r for r rounds. So the sum over
S of load(v) (1 + up(v) / T) <= L + L O / T + L^2 / 2rT <= T (1 + 1 / 2r), as O <= T - L. Over all devices,
sum over v of d load_d(v) (1 + up(v) / T) / (1 + 1 / 2r) <= K T.
"""

import math

import numpy as np

from .loads import Array, Pieces, Shares

SAFE = 1 - 1e-9  # no rounding error shall be taken for work
KS = tuple(range(1, 17))
EPSILONS = tuple(1 / k for k in (2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 14))


def area(shares: Shares, speeds: Array, step: float) -> float:
    """Seconds that a step takes if it takes no longer than `step`: all work over all devices, as many as
    `speeds`; or without closing, each at its speed."""
    degrees = np.array(shares.degrees, dtype=np.float64)[:, None]
    fits = shares.load <= step
    everything = np.where(fits, degrees * shares.load, np.inf).min(0).sum() / len(speeds)
    compute = np.where(fits, degrees * shares.compute, np.inf).min(0).sum() / speeds.sum()
    return float(max(everything, compute)) * SAFE


def unpackable(shares: Shares, devices: int, step: float) -> bool:
    """Whether some dual feasible function proves that no step takes `step` seconds."""
    degrees = np.array(shares.degrees, dtype=np.float64)[:, None]
    parts = shares.load / step * SAFE
    parts = np.where(parts <= 1, parts, np.inf)
    for k in KS:
        weights = np.floor(parts * (k + 1)) / k
        if (degrees * weights).min(0).sum() > devices / SAFE:
            return True
    for epsilon in EPSILONS:
        weights = np.where(
            parts > 1 - epsilon, np.maximum(np.ceil(parts), 1.0), np.where(parts < epsilon, 0.0, parts)
        )
        if (degrees * weights).min(0).sum() > devices / SAFE:
            return True
    return False


def waiting(pieces: Pieces, ways: Array, devices: int, step: float) -> float:
    """Seconds that a step takes if it takes no longer than `step`, which is what `ways` are for: the T for
    which work and idle time together are K T."""
    work = pieces.replicas * pieces.rounds * pieces.whole / (1 + 1 / (2 * pieces.rounds))
    least = np.where(pieces.alone <= step, work, np.inf).min(0)
    total, idle = float(least.sum()), float((least * ways).sum())
    if not np.isfinite(total + idle):
        return float("inf")
    return (total + math.sqrt(total**2 + 4 * devices * idle)) / (2 * devices) * SAFE
