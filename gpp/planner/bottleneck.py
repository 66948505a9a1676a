"""A lower bound from the stages themselves: the least that the busiest device has to do, whatever they are.

Any partition into convex stages whose graph is acyclic is a chain of nested downsets, so a dynamic
programme over downsets finds the least maximum, over all plans, of what a device does in a step: all rounds
of its stage, its all-reduce and its update, memory left out. Of equal branches only how many of them end at
each place matters, as all of this adds up over operators: far fewer sets. Exact, so it contains the area
and every single operator; it does not hold where stages share devices.
"""

import numpy as np

from .downset_costs import UnitCosts
from .downset_line import depth_first, line
from .downset_search import DownsetSearch
from .downsets import Link, TooManyDownsets, downsets, equal_branches
from .estimate import Problem
from .loads import Shares

CLOSE = 1e-8  # what the search takes as equal, and more


def bottleneck(problem: Problem, shares: Shares, low: float, limit: int) -> float | None:
    """Seconds; `low` itself if it is no more than that, None with more than `limit` downsets.

    S sets: O(S^2 |degrees|) a pass, one if nothing is above `low`, else mostly two.
    """
    units, count = problem.units, len(problem.units.members)
    kinds = [
        (shares.load[:, u].tobytes(), units.labels[u] is not None, units.replicas[u]) for u in range(count)
    ]
    links = [Link(u, frozenset({v}), 0.0) for v, us in enumerate(units.predecessors) for u in us]
    branches = equal_branches(links, kinds)
    try:
        sets = downsets(units.successors, limit, branches)
    except TooManyDownsets:
        return None
    costs, devices = _costs(problem, shares), len(problem.topology.devices)
    known = line(costs, depth_first(units.successors), devices, None)
    if known is not None and known.seconds <= low * (1 + CLOSE):
        return low
    found = DownsetSearch(sets, costs, devices).optimum(known, low)
    return None if found is None else max(found.seconds * (1 - CLOSE), low)


def _costs(problem: Problem, shares: Shares) -> UnitCosts:
    """A step's loads as the search takes them: no messages, no memory."""
    units = problem.units
    count = len(units.members)
    barred = ~np.isfinite(shares.load)
    nothing = np.zeros(count)
    return UnitCosts(
        degrees=shares.degrees,
        seconds=np.where(barred, 0.0, shares.load),
        trains=(shares.closing[-1] > 0).astype(np.float64),
        fixed=shares.start,
        per_byte=np.zeros(len(shares.degrees)),
        latency=0.0,
        links=(),
        static=nothing,
        stash=nothing,
        barred=barred.astype(np.float64),
        wanted=np.zeros((len(shares.degrees), count)),
        only_wanted=(False,) * len(shares.degrees),
        labelled=np.array([label is not None for label in units.labels], dtype=np.float64),
    )
