"""What a rank says before it ends its job: whoever starts ranks may drop what it has not read by then."""

import fcntl
import os
import stat
import struct
import sys
import termios
import time
from contextlib import suppress

AT_MOST = 1.0  # seconds to wait for a launcher that does not read
FORWARDED = 0.1  # seconds that it has to pass on what it read


def spoken() -> None:
    """Return once the launcher has read what this process has written to its output and error pipes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # none, closed, or on a full disk: the others are to end all the same
            stream.flush()
    end = time.monotonic() + AT_MOST
    pipes = [descriptor for descriptor in (1, 2) if _is_pipe(descriptor)]
    while any(map(_unread, pipes)) and time.monotonic() < end:
        time.sleep(1e-3)
    if pipes:
        time.sleep(FORWARDED)


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:  # closed
        return False


def _unread(descriptor: int) -> int:
    """Bytes that wait in a pipe."""
    try:
        (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    except OSError:  # a system whose pipes do not say
        return 0
    return int(count)
