"""A lower bound on the time of a step over all orders with split backwards: how good an order can be.

For a stage with at most k micro-batches in flight (+1 at a forward, -1 at a weight half), m of them, and
F, I, W seconds of its passes:

    T >= head + idle + m (F + I + W)
    T >= head + idle + m (F + I) + (m - k) W + up
    T >= head + first + I + W + floor((m - 1) / k) (loop + I + W)

head is the longest way to its first forward, first the time from there until the first gradient is back in an
empty pipeline (loop: from a forward of its own), idle = max(0, first - k F) what the first k forwards do not
fill of it, and up the way of its last gradient to a source and that source's weight half: k weight halves at
most are still to come when the last input half ends.
"""

import math
from collections.abc import Sequence

from gpp.schedule.template import Pipeline


def order_bound(p: Pipeline, caps: Sequence[int]) -> float:
    """Seconds from the first forward to the last pass; no order with these caps (micro-batches) takes less.

    Where stages share devices, or micro-batches differ, only what holds there too is used: the first line
    with idle = 0 and no time on the way, over all that the devices have to do. Ways between replicas of which
    some share a host count as `Pipeline` has them, the slowest for all. O(stages + edges).
    """
    count = len(p.below)
    plain = p.uniform and len(set(p.devices)) == count
    heads, ups = [0.0] * count, [0.0] * count
    for s in range(count):
        before = (heads[u] + p.forward[u] + (_there(p, u, s) if plain else 0.0) for u, _ in p.above[s])
        heads[s] = max(before, default=0.0)
        above = [(u, back) for u, back in p.above[s] if (u, s) not in p.silent]
        ups[s] = max((back + p.input[u] + max(ups[u], p.weight[u]) for u, back in above), default=0.0)
    work = dict.fromkeys(p.devices, 0.0)
    start = dict.fromkeys(p.devices, math.inf)
    for s, device in enumerate(p.devices):
        work[device] += p.rounds[s] * (p.forward[s] + p.input[s] + p.weight[s])
        start[device] = min(start[device], heads[s])
    best = max(start[device] + work[device] for device in work)
    if not plain:
        return best
    turned, loops = [0.0] * count, [0.0] * count
    for s in reversed(range(count)):
        below = [(d, p.input[d] + _back(p, s, d)) for d, _ in p.below[s] if (s, d) not in p.silent]
        turned[s] = max([heads[s] + p.forward[s], *(turned[d] + way for d, way in below)])
        ways = (_there(p, s, d) + loops[d] + way for d, way in below)
        loops[s] = p.forward[s] + max(ways, default=0.0)
    for s in range(count):
        if s in p.frozen:
            continue  # nothing but its messages holds it back
        m, k = p.rounds[s], min(caps[s], p.rounds[s])
        forward, backward, weight = p.forward[s], p.input[s], p.weight[s]
        first = turned[s] - heads[s]
        begun = heads[s] + max(0.0, first - k * forward)
        best = max(
            best,
            begun + m * (forward + backward + weight),
            begun + m * (forward + backward) + (m - k) * weight + max(ups[s], weight),
            heads[s] + first + backward + weight + (m - 1) // k * (loops[s] + backward + weight),
        )
    return best


def _there(p: Pipeline, source: int, target: int) -> float:
    return next(seconds for s, seconds in p.below[source] if s == target)


def _back(p: Pipeline, source: int, target: int) -> float:
    return next(seconds for s, seconds in p.above[target] if s == source)
