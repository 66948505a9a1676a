"""Short messages between processes beside MPI: they arrive while MPI is stuck, and a broken line tells that a
process is gone. One JSON object a line, over TCP, after a secret that MPI has brought to all.
"""

import json
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fcntl import ioctl
from typing import Any

SIOCGIFADDR = 0x8915
REACHED_WITHIN = 2.0  # seconds for one address
WRITTEN_WITHIN = 2.0  # seconds that a reader may let us wait
CHUNK = 1 << 16
LONGEST = 1 << 24  # bytes of a message

Address = tuple[str, int]
Message = Mapping[str, Any]


class Line:
    """A connection; `partner` is the rank at its other end. Only one thread reads."""

    def __init__(self, connection: socket.socket, partner: int) -> None:
        connection.settimeout(WRITTEN_WITHIN)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.partner = partner
        self.open = True
        self._rest = b""

    def fileno(self) -> int:
        """For a selector."""
        return self.socket.fileno()

    def send(self, message: Message) -> None:
        """Send it; a line that is broken says nothing here, its reader notices."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[Message]:
        """What has come, after a selector has said that something has. `open` is False afterwards if the
        other end is gone."""
        try:
            found = self.socket.recv(CHUNK)
        except (BlockingIOError, InterruptedError, TimeoutError):
            return []
        except OSError:
            found = b""
        if not found or len(self._rest) > LONGEST:
            self.close()
            return []
        *whole, self._rest = (self._rest + found).split(b"\n")
        messages: list[Message] = []
        for line in whole:
            with suppress(ValueError):
                message = json.loads(line)
                messages += [message] if isinstance(message, dict) else []
        return messages

    def close(self) -> None:
        """Hang up."""
        self.open = False
        self.socket.close()


class Exchange:
    """Where lines end: the listening side of one rank."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._listener = socket.create_server(("", 0), backlog=1024)
        self.port = int(self._listener.getsockname()[1])

    def fileno(self) -> int:
        """For a selector."""
        return self._listener.fileno()

    def accept(self) -> Line | None:
        """Who calls, if it knows the secret: a port scanner does not."""
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return None
        connection.settimeout(REACHED_WITHIN)
        with suppress(OSError, ValueError):
            greeting = _exactly(connection, len(self._secret) + 4)
            if secrets.compare_digest(greeting[4:], self._secret):
                connection.sendall(self._secret[::-1])
                return Line(connection, struct.unpack("!I", greeting[:4])[0])
        connection.close()
        return None

    def close(self) -> None:
        """No more calls."""
        self._listener.close()


def call(addresses: Sequence[Address], secret: str, rank: int) -> Line | None:
    """A line to the exchange at one of these addresses, None if none is it: hosts may have the same address
    on a bridge of their own."""
    known = secret.encode()
    for address in addresses:
        connection = None
        try:
            connection = socket.create_connection(address, REACHED_WITHIN)
            connection.sendall(struct.pack("!I", rank) + known)
            if _exactly(connection, len(known)) == known[::-1]:
                return Line(connection, rank)
        except (OSError, ValueError):
            pass
        if connection is not None:
            connection.close()
    return None


def own_addresses() -> list[str]:
    """IPv4 addresses of this host's interfaces, the loopback's last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = ioctl(asker, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    return sorted(found, key=lambda address: address.startswith("127."))


def _exactly(connection: socket.socket, count: int) -> bytes:
    end, found = time.monotonic() + REACHED_WITHIN, b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part or time.monotonic() > end:
            raise ValueError("hung up")
        found += part
    return found


def selector() -> selectors.BaseSelector:
    """One that wakes for any of many lines."""
    return selectors.DefaultSelector()
