"""Tensors of all ranks to the first one: predictions, weights. Rare, so nothing is kept between calls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .communicator import Communicator, Request

FIRST = 0


def gathered(comm: Communicator, tag: int, named: Sequence[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    """What every rank has named, ordered by rank, on rank 0; elsewhere nothing. Called by all ranks.

    Names are anything that can be pickled, tensors are contiguous and on the host. Rank 0's own are not
    copied. `tag` is used for nothing else at the same time.
    """
    manifests = comm.all_gather_object([(name, tuple(t.shape), t.dtype) for name, t in named])
    requests: list[Request] = []
    if comm.rank != FIRST:
        requests = [comm.isend(tensor, FIRST, tag) for _, tensor in named if tensor.numel()]
        comm.wait(requests)
        return []
    found = list(named)
    for source, manifest in enumerate(manifests):
        if source == FIRST:
            continue
        for name, shape, dtype in manifest:
            tensor = torch.empty(shape, dtype=dtype)
            if tensor.numel():
                requests.append(comm.irecv(tensor, source, tag))
            found.append((name, tensor))
    comm.wait(requests)
    return found
