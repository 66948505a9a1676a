"""Each replica keeps the optimizer's state of its share of a stage's parameters (ZeRO's first stage).

Whole parameters are shared out, so any optimizer works, and the bits are those of replicas that all update
everything: the gradients are summed on all of them as ever, each parameter is updated by its owner alone, and
then handed to the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpp.plan import StageGraph, shared_out
from gpp.program.stage import StageProgram

from .communicator import Communicator
from .exchange import Exchange


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


class HandRound:
    """Every owner's parameters to the other replicas, in place, as often as it is run. All make it."""

    def __init__(self, comm: Communicator, sharding: Sharding, parameters: Mapping[str, Tensor]) -> None:
        self._rank = comm.rank
        self._rounds: list[tuple[Exchange, list[tuple[int, Tensor, Tensor]]]] = []
        for dtype in dict.fromkeys(parameters[name].dtype for name in sharding.owner):
            owned: dict[int, list[Tensor]] = {rank: [] for rank in sharding.group}
            for name, rank in sharding.owner.items():
                if parameters[name].dtype == dtype:
                    owned[rank].append(parameters[name].detach())
            pieces = [torch.empty(sum(p.numel() for p in owned[r]), dtype=dtype) for r in sharding.group]
            mine = pieces[sharding.group.index(comm.rank)]
            exchange = Exchange(comm, sharding.group, [mine] * len(pieces), pieces)
            places = [
                (rank, parameter, place)
                for rank, piece in zip(sharding.group, pieces, strict=True)
                for parameter, place in _places(owned[rank], piece)
            ]
            self._rounds.append((exchange, places))

    def run(self) -> None:
        """Hand round what the parameters are now."""
        for exchange, places in self._rounds:
            for rank, parameter, place in places:
                if rank == self._rank:
                    place.copy_(parameter)
            exchange.run()
            for rank, parameter, place in places:
                if rank != self._rank:
                    parameter.copy_(place)


def _places(parameters: Sequence[Tensor], piece: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Where each parameter lies in its owner's piece."""
    start = 0
    for parameter in parameters:
        yield parameter, piece[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
