"""All processes of a job get to know those who watch over it."""

import os
import secrets
from collections.abc import Callable

from .communicator import CommunicationError, Communicator
from .sideband import Address, Exchange, call, own_addresses
from .watch import Watch, hubs_of

OFF = "GPP_WATCH"  # 0: nobody watches


def begin_watch(comm: Communicator, abort: Callable[[int], None]) -> Watch | None:
    """The watch of this rank, None in a job of one; called by all ranks together. See `Watch`.

    Raises CommunicationError where a rank cannot be reached.
    """
    if comm.size == 1 or any(comm.all_gather_object(os.environ.get(OFF) == "0")):
        return None
    secret = comm.broadcast_object(lambda: secrets.token_hex(16))
    hubs = hubs_of(comm.hosts)
    exchange = Exchange(secret) if comm.rank in hubs else None
    offers = comm.all_gather_object(None if exchange is None else (own_addresses(), exchange.port))
    watch = Watch(comm.rank, comm.hosts, comm.doing, abort, exchange)
    watch.start()
    missed = []
    for hub in hubs:
        names, port = offers[hub]
        line = call(_in_order(names, port, comm.hosts[hub] == comm.hosts[comm.rank]), secret, comm.rank)
        if line is None:
            missed.append(
                f"rank {comm.rank} on {comm.hosts[comm.rank]} cannot reach rank {hub} on "
                f"{comm.hosts[hub]} at {', '.join(names)}, port {port}"
            )
        else:
            watch.add(hub, line)
    wrong = [text for texts in comm.all_gather_object(missed) for text in texts]
    if wrong:
        watch.close()
        raise CommunicationError(
            f"{wrong[0]} ({len(wrong)} such lines in all): ranks tell each other over TCP how they are, so "
            f"that none hangs; open the ports between the job's hosts, or set {OFF}=0 and live without"
        )
    return watch


def _in_order(names: list[str], port: int, same_host: bool) -> list[Address]:
    """Where to try, the likely ones first; the loopback's address is another host's own."""
    near = [name for name in names if name.startswith("127.")]
    far = [name for name in names if not name.startswith("127.")]
    return [(name, port) for name in ([*near, *far] if same_host else far)]
