"""Sums over ranks in a fixed order: the same bits on every rank, and in every run.

An MPI library's own reduction may add in any order, and adds bfloat16 as if it were bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .communicator import CommunicationError, Communicator
from .exchange import Exchange

CHUNK = 1 << 22  # elements reduced at a time: bounds the memory for the others' contributions


class Sum(Protocol):
    """A sum over ranks that was made for a tensor."""

    def run(self) -> None:
        """Sum what is in the tensor now, in place."""


MakeSum = Callable[[Communicator, tuple[int, ...], Tensor], Sum]  # of a flat tensor, over a group


class OrderedSum:
    """Replaces `flat` on each rank of the group by ((g0 + g1) + g2) + ..., the members' in group order, as
    often as it is run. All members make it.

    `flat` is one-dimensional, contiguous, float32 or float64, and as long on every member. Each member sums
    one slice and hands it to the others, so that each sends and receives 2 (n-1)/n of the data. A tensor on a
    device is summed in host memory. Raises CommunicationError for other tensors.
    """

    def __init__(self, comm: Communicator, group: tuple[int, ...], flat: Tensor, chunk: int = CHUNK) -> None:
        if flat.dtype not in (torch.float32, torch.float64):
            raise CommunicationError(
                f"sums over ranks are float32 or float64, not {flat.dtype}: its rounding would depend on the "
                "number of ranks; accumulate in float32"
            )
        if flat.dim() != 1 or not flat.is_contiguous():
            raise CommunicationError(
                f"sums over ranks need a contiguous tensor of one dimension, this one has shape "
                f"{tuple(flat.shape)} and strides {flat.stride()}"
            )
        if comm.rank not in group:
            raise CommunicationError(f"rank {comm.rank} is not in the group {group} that it sums over")
        self._flat = flat.detach()
        self._host = self._flat
        if flat.device.type != "cpu":
            self._host = torch.empty_like(self._flat, device="cpu", pin_memory=True)
        self._chunks: list[_Chunk] = []
        if len(group) > 1 and flat.numel():
            count, chunk = len(group), min(chunk, flat.numel())
            # what others send for this rank's slice, and the sum
            scratch = self._host.new_empty((count + 1, -(-chunk // count)))
            self._chunks = [
                _chunk(comm, group, self._host[start : start + chunk], scratch)
                for start in range(0, flat.numel(), chunk)
            ]

    def run(self) -> None:
        """Sum what is in `flat` now."""
        if not self._chunks:
            return
        if self._host is not self._flat:
            self._host.copy_(self._flat)
        for chunk in self._chunks:
            chunk.scatter.run()
            torch.add(chunk.parts[0], chunk.parts[1], out=chunk.total)
            for part in chunk.parts[2:]:
                chunk.total.add_(part)
            chunk.mine.copy_(chunk.total)
            chunk.gather.run()
        if self._host is not self._flat:
            self._flat.copy_(self._host)


@dataclass(frozen=True)
class _Chunk:
    """`parts` are all members' contributions to `mine`, this rank's slice."""

    scatter: Exchange
    parts: tuple[Tensor, ...]
    total: Tensor
    mine: Tensor
    gather: Exchange


def _chunk(comm: Communicator, group: tuple[int, ...], chunk: Tensor, scratch: Tensor) -> _Chunk:
    pieces = chunk.tensor_split(len(group))
    me = group.index(comm.rank)
    mine = pieces[me]
    parts = [mine if i == me else scratch[i, : mine.numel()] for i in range(len(group))]
    return _Chunk(
        scatter=Exchange(comm, group, pieces, parts),
        parts=tuple(parts),
        total=scratch[len(group), : mine.numel()],
        mine=mine,
        gather=Exchange(comm, group, [mine] * len(group), pieces),
    )


class Slots:
    """Gathers a few numbers of every rank of a group, again and again: loss weights, norms. Each rank then
    sums them by itself, in an order of its choice."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], int], tuple[list[Tensor], Exchange]] = {}

    def gather(
        self, comm: Communicator, group: tuple[int, ...], values: Sequence[float]
    ) -> list[list[float]]:
        """Every member's numbers in group order, as float64; all members have as many."""
        key = (group, len(values))
        if key not in self._made:
            pieces = [torch.empty(len(values), dtype=torch.float64) for _ in group]
            mine = pieces[group.index(comm.rank)] if comm.rank in group else pieces[0]
            self._made[key] = (pieces, Exchange(comm, group, [mine] * len(group), pieces))
        pieces, exchange = self._made[key]
        pieces[group.index(comm.rank)].numpy()[:] = values
        exchange.run()
        return [piece.tolist() for piece in pieces]
