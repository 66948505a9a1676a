"""Which rank writes what, and into which file: a function of the plan that every rank computes alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Owners:
    """The `writer` of each name, of `ranks` ranks."""

    writer: Mapping[str, int]
    ranks: int

    def names_of(self, rank: int) -> tuple[str, ...]:
        """What a rank writes."""
        return tuple(name for name, writer in self.writer.items() if writer == rank)

    def file(self, kind: str, rank: int) -> str:
        """The name of a rank's file, as Hugging Face numbers them: kind-00001-of-00004.safetensors."""
        return f"{kind}-{rank + 1:05d}-of-{self.ranks:05d}.safetensors"


def owners(holders: Mapping[str, Sequence[int]], sizes: Mapping[str, int], ranks: int) -> Owners:
    """Share out what several ranks hold: the largest first, each to the rank that has least to write."""
    load = [0] * ranks
    writer = {}
    for name in sorted(holders, key=lambda name: (len(set(holders[name])), -sizes[name], name)):
        rank = min(holders[name], key=lambda rank: (load[rank], rank))
        load[rank] += sizes[name]
        writer[name] = rank
    return Owners({name: writer[name] for name in holders}, ranks)
