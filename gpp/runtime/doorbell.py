"""Wakes a rank of the same host that waits for a message: MPI itself can only be polled.

A waiting rank that polls burns a processor or notices late. So a rank that goes to sleep says so in memory
that its host's ranks share, and who sends to it then rings: an empty datagram to an address that the kernel
forgets with the process. A lost ring only makes a rank notice as late as its own next look: nothing depends
on rings but time.
"""

import select
import socket
import struct
from collections.abc import MutableSequence
from mmap import mmap

AWAKE, ASLEEP = 0, 1
LONG = 5e-3  # seconds: the sleep that takes one system call; the kernel counts it in its ticks


class Doorbell:
    """This rank's bell, and the way to those of others of its host.

    `asleep` has a byte for each rank, shared by all ranks of the host; `job` tells jobs on one machine apart.
    Raises OSError where the system has no such addresses (they are Linux's).
    """

    def __init__(self, job: str, rank: int, asleep: MutableSequence[int] | mmap) -> None:
        self._rank, self._asleep = rank, asleep
        self._own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, int(LONG * 1e6)))
        self._addresses = tuple(f"\0gpp-{job}-{other}".encode() for other in range(len(asleep)))
        self._own.bind(self._addresses[rank])

    def ring(self, rank: int) -> None:
        """Wake a rank of this host, if it sleeps. One that has not woken from ten rings needs no more."""
        if self._asleep[rank]:
            try:
                self._own.sendto(b"", socket.MSG_DONTWAIT, self._addresses[rank])
            except (BlockingIOError, ConnectionRefusedError):
                pass

    def lie_down(self) -> None:
        """From now on others ring. Whoever waits looks once more before it sleeps, see `sleep`."""
        self._asleep[self._rank] = ASLEEP

    def sleep(self, seconds: float) -> None:
        """Until it rings, or about so long, at most LONG."""
        if seconds < LONG and not select.select([self._own], [], [], seconds)[0]:
            return
        try:
            self._own.recv(1)
        except BlockingIOError:  # it did not ring
            pass

    def get_up(self) -> None:
        """Others need not ring any more."""
        self._asleep[self._rank] = AWAKE

    def close(self) -> None:
        """Be no longer reachable."""
        self._own.close()
        if isinstance(self._asleep, mmap):
            self._asleep.close()
