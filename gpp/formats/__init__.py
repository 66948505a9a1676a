"""Published planner workloads, read as a computation graph and its measured times.

A profiled (micro-)batch is taken as `unit` samples, so that it can be split over replicas, times in
proportion; none of the formats says how many it was.
"""

from .pipedream import read_pipedream
from .piper import piper_profile, read_piper
from .profile import Profile

UNIT = 64


def read_profile(text: str, name: str, unit: int = UNIT) -> Profile:
    """The profile in a file's text, whichever format it has. Raises ProfileError, naming the place."""
    text = text.removeprefix("\ufeff")  # what some editors put first
    if text.lstrip().startswith(("{", "[")):
        return piper_profile(read_piper(text, name), unit, name)
    return read_pipedream(text, name, unit)
