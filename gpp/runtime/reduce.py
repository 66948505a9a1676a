"""Sums over ranks in a fixed order: the same bits on every rank, and in every run.

An MPI library's own reduction may add in any order, and adds bfloat16 as if it were bytes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .communicator import CommunicationError, Communicator

CHUNK = 1 << 22  # elements reduced at a time: bounds the memory for the others' contributions


def ordered_sum(comm: Communicator, group: tuple[int, ...], flat: Tensor, chunk: int = CHUNK) -> None:
    """Replace `flat` on each rank of the group by ((g0 + g1) + g2) + ..., the members' in group order.

    `flat` is one-dimensional, contiguous, float32 or float64, and as long on every member. Each member sums
    one slice and hands it to the others, so that each sends and receives 2 (n-1)/n of the data. Raises
    CommunicationError for other tensors.
    """
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
    if len(group) > 1:
        for start in range(0, flat.numel(), chunk):
            _sum_chunk(comm, group, flat.detach()[start : start + chunk])


def _sum_chunk(comm: Communicator, group: tuple[int, ...], chunk: Tensor) -> None:
    pieces = chunk.tensor_split(len(group))
    contributions = comm.all_to_all(group, pieces)
    total = contributions[0] + contributions[1]
    for contribution in contributions[2:]:
        total += contribution
    comm.all_gather(group, total, into=pieces)


def slot_sum(comm: Communicator, group: tuple[int, ...], values: Sequence[float]) -> list[list[float]]:
    """Every member's numbers in group order, as float64; how many there are may differ by member.

    For few numbers that each rank then sums by itself, in an order of its choice: loss weights, norms.
    """
    gathered = comm.all_gather(group, torch.tensor(list(values), dtype=torch.float64))
    return [piece.tolist() for piece in gathered]
