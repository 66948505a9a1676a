"""Which stage goes where, once they are decided: heavy edges inside a host, heavy stages on fast devices.

Devices go to stages by their order (`gpp.planner.placement`), so two stages that change places in it change
devices. All such pairs are tried until none makes the step shorter: a local optimum.
"""

from itertools import combinations

from .draft import Drafts
from .moves import Parts
from .polish import Shape, shaped
from .rhythm import Kind


def matters(drafts: Drafts) -> bool:
    """Whether it makes a difference: devices differ, or there are several hosts."""
    topology = drafts.problem.topology
    return len(set(topology.devices)) > 1 or len(topology.devices) > topology.per_host


def placed(drafts: Drafts, start: Shape, kind: Kind, tries: int, *, spare: bool = False) -> Shape:
    """The best shape met in at most so many tries, each a draft and a simulation; never worse than the
    first."""
    best = start
    improved = True
    while improved and tries > 0:
        improved = False
        for i, j in combinations(range(len(best.parts)), 2):
            if tries == 0:
                break
            tries -= 1
            found = shaped(drafts, _swapped(best.parts, i, j), kind, spare=spare)
            if found is not None and found.seconds < best.seconds * (1 - 1e-9):
                best, improved = found, True
    return best


def _swapped(parts: Parts, i: int, j: int) -> Parts:
    changed = list(parts)
    changed[i], changed[j] = changed[j], changed[i]
    return tuple(changed)
