"""Memory of this process: what it holds, and the most it held since a moment of one's choice. Bytes.

Linux keeps a high-water mark that can be set back; elsewhere it covers the whole life of the process, and
what was needed before counts too.
"""

import ctypes
import gc
import math
import os
import resource
import sys
from pathlib import Path

LARGE = 1 << 18  # bytes: smaller blocks are quicker to use again
_MMAP_THRESHOLD = -3  # of mallopt(3)
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_CGROUPS = Path("/sys/fs/cgroup")


def start_of_peak() -> int:
    """Begin anew with the high-water mark; returns the resident bytes of now.

    From here on glibc gives large blocks back when they are freed. By itself it keeps more and more of them
    in its heap, where weights made after activations leave holes: up to half of a stage's memory was seen.
    """
    _give_back()
    _keep_large_blocks_apart()
    try:
        _RESET.write_text("5")  # proc(5): sets the peak resident size back to the current one
        return _status("VmRSS")
    except (OSError, KeyError):
        return peak()


def _give_back() -> None:
    """What was freed but still lies in the C library's heap would hide what is needed next."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library than glibc


def _keep_large_blocks_apart() -> None:
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return  # the user knows better
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)
    except (OSError, AttributeError):
        pass


def peak() -> int:
    """The most resident bytes since `start_of_peak`."""
    try:
        return _status("VmHWM")
    except (OSError, KeyError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)


def available() -> float:
    """What this host still has for this process: memory that is free or can be made so, and what its control
    groups allow it beyond what they hold."""
    try:
        known = [_field(Path("/proc/meminfo"), "MemAvailable")]
    except (OSError, KeyError):
        known = []
    for folder, most, held in (
        (_CGROUPS, "memory.max", "memory.current"),
        (_CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for group in _groups(folder):
            try:
                known.append(int((group / most).read_text()) - int((group / held).read_text()))
            except (OSError, ValueError):  # there is none, or it says "max"
                continue
    return min(known, default=math.inf)


def _groups(folder: Path) -> list[Path]:
    """The folder of this process's control group, and of those that it is in."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = [folder]
    for _, controllers, path in lines:
        if controllers in ("", "memory"):
            inner = folder / path.strip("/")
            found += [inner, *inner.parents]
    return [group for group in dict.fromkeys(found) if group.is_relative_to(folder)]


def _status(name: str) -> int:
    return _field(_STATUS, name)


def _field(file: Path, name: str) -> int:
    """Bytes, of a file whose lines are `name: kilobytes kB`."""
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024
