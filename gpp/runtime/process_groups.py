"""Gradients of replicas summed by torch.distributed: NCCL, which goes from GPU to GPU.

Its sums are the same on all members, but their order, and so their last bits, are the library's choice;
`reduce.OrderedSum` sums in the order of the group.
"""

import os
import socket
from collections.abc import Collection
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from .communicator import CommunicationError, Communicator

PATIENCE = timedelta(minutes=5)


class ProcessGroups:
    """The process groups of some groups of ranks; made by all ranks together, once in a process."""

    def __init__(self, comm: Communicator, groups: Collection[tuple[int, ...]], backend: str) -> None:
        store: TCPStore | None = None

        def listen() -> tuple[str, int]:
            nonlocal store
            host = os.environ.get("MASTER_ADDR", socket.gethostname())
            store = TCPStore(host, 0, comm.size, True, PATIENCE, wait_for_workers=False)
            return host, store.port

        host, port = comm.broadcast_object(listen)
        store = store or TCPStore(host, port, comm.size, False, PATIENCE)
        dist.init_process_group(backend, store=store, rank=comm.rank, world_size=comm.size, timeout=PATIENCE)
        # every rank takes part in the making of every group
        self._groups = {group: dist.new_group(list(group)) for group in sorted(set(groups))}

    def make_sum(self, comm: Communicator, group: tuple[int, ...], flat: Tensor) -> "GroupSum":
        """A sum to be run many times, as `reduce.OrderedSum`."""
        if group not in self._groups:
            raise CommunicationError(f"there is no process group of the ranks {group}")
        return GroupSum(self._groups[group], flat.detach())

    def close(self) -> None:
        """Give all of them back; called by all ranks together."""
        dist.destroy_process_group()


class GroupSum:
    """Replaces `flat` on each rank of a process group by the sum of the members'."""

    def __init__(self, group: dist.ProcessGroup, flat: Tensor) -> None:
        self._group = group
        self._flat = flat

    def run(self) -> None:
        """Sum what is in `flat` now."""
        dist.all_reduce(self._flat, group=self._group)
