"""Each replica keeps the optimizer's state of its share of a stage's parameters (ZeRO's first stage).

Whole parameters are shared out, so any optimizer works, and the bits are those of replicas that all update
everything: the gradients are summed on all of them as ever, each parameter is updated by its owner alone, and
then handed to the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpp.plan import StageGraph, shared_out
from gpp.program.stage import StageProgram

from .communicator import Communicator


@dataclass(frozen=True)
class Sharding:
    """The replicas that share parameters out, and who owns which."""

    group: tuple[int, ...]
    owner: Mapping[str, int]


def share_out(
    graph: StageGraph, programs: Sequence[StageProgram], values: Mapping[str, Tensor]
) -> Sharding | None:
    """Owners of the trainable parameters of a rank's stages that shard, the same on every replica; None where
    there is nothing to share."""
    stages = [graph.stages[p.stage] for p in programs]
    sharing = [
        (s, p) for s, p in zip(stages, programs, strict=True) if s.shard_optimizer and len(s.devices) > 1
    ]
    if not sharing:
        return None
    group = sharing[0][0].devices
    owner: dict[str, int] = {}
    for _, program in sharing:
        learning = [n for n, trains in zip(program.parameters, program.trainable, strict=True) if trains]
        shares = shared_out({name: values[name].nbytes for name in learning}, len(group))
        owner |= {name: group[share] for name, share in shares.items()}
    return Sharding(group, owner)


def hand_round(comm: Communicator, sharding: Sharding, parameters: Mapping[str, Tensor]) -> None:
    """Every owner's parameters to the other replicas, in place. Called by all of the group."""
    for dtype in dict.fromkeys(parameters[name].dtype for name in sharding.owner):
        owned: dict[int, list[Tensor]] = {rank: [] for rank in sharding.group}
        for name, rank in sharding.owner.items():
            if parameters[name].dtype == dtype:
                owned[rank].append(parameters[name].detach())
        mine = torch.cat([torch.empty(0, dtype=dtype), *(p.flatten().cpu() for p in owned[comm.rank])])
        pieces = [torch.empty(sum(p.numel() for p in owned[rank]), dtype=dtype) for rank in sharding.group]
        arrived = comm.all_gather(sharding.group, mine, into=pieces)
        for rank, piece in zip(sharding.group, arrived, strict=True):
            start = 0
            for p in owned[rank]:
                if rank != comm.rank:
                    p.copy_(piece[start : start + p.numel()].view(p.shape))
                start += p.numel()
