"""Memory of this process: what it holds, and the most it held since a moment of one's choice. Bytes.

Linux keeps a high-water mark that can be set back; elsewhere it covers the whole life of the process, and
what was needed before counts too.
"""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def start_of_peak() -> int:
    """Begin anew with the high-water mark; returns the resident bytes of now."""
    try:
        _RESET.write_text("5")  # proc(5): sets the peak resident size back to the current one
        return _status("VmRSS")
    except (OSError, KeyError):
        return peak()


def peak() -> int:
    """The most resident bytes since `start_of_peak`."""
    try:
        return _status("VmHWM")
    except (OSError, KeyError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024
