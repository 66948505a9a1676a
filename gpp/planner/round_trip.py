"""A lower bound from what must follow in a row: there, all of an operator's work, and back.

Take an operator u with a parameter and an operator v that u's values reach and whose gradients come back to
u. Between two updates of u's stage: a forward of u, of each operator on the way, all r pieces of v that one
of its replicas computes, then a backward of each on the way and of u, u's all-reduce and update. None of it
overlaps: a piece of v needs a piece of every operator before it, and the last piece that u gets back has
come through v's last. Operators of one stage, or of stages that share a device, run one after the other, so
it does not matter how they are divided. A message between stages only adds to it. Where weight halves may
trail, only the input halves are on the way back and v's own r weight halves are not; but v's device does
these in the same time, with its own all-reduce and update.

Where all ranks meet at the end of a step (a global norm, a weight of the loss), the same holds from one
meeting to the next for any way there and any way back, from a parameter or not; and v's weight halves come
before the meeting.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpp.graph import ComputationGraph

from .intervals import takes_part_in_backward
from .loads import Array, Pieces


@dataclass(frozen=True)
class RoundTrips:
    """The graph's ways, and the pieces on them. `meets`: all ranks meet at the end of a step."""

    graph: ComputationGraph
    pieces: Pieces
    meets: bool

    def ways(self, step: float) -> tuple[Array, Array]:
        """Seconds [operators] before each operator's first piece and after its last, if no step takes longer
        than `step`: then no operator is split so that its own work does. Where ranks do not meet, the way
        back is counted with the way there. 0 where there is no way. O(edges + splits x operators)."""
        pieces = self.pieces
        allowed = pieces.alone <= step

        def least(seconds: Array) -> Array:
            return np.asarray(np.where(allowed, seconds, np.inf).min(0))

        anywhere = np.zeros(len(pieces.trains))
        if self.meets:
            there = self._longest(list(self.graph.edges), least(pieces.forward), anywhere)
            back = self._longest(self._gradients, least(pieces.back), anywhere)
            return np.maximum(there, 0.0), np.maximum(back, 0.0)
        both = least(pieces.forward + pieces.back)
        first = np.where(pieces.trains, least(pieces.whole + pieces.closing) - both, -np.inf)
        return np.maximum(self._longest(self._gradients, both, first), 0.0), anywhere

    def needs(self, step: float) -> Array:
        """Seconds [operators] that a step takes because of each operator, if it takes no longer than `step`:
        above `step` proves that it does."""
        pieces = self.pieces
        there, back = self.ways(step)
        need = there + pieces.rounds * (pieces.forward + pieces.back) + back
        if self.meets:
            need = np.maximum(need, there + pieces.rounds * pieces.whole)
        return np.asarray(np.maximum(need, pieces.alone).min(0))

    @cached_property
    def _gradients(self) -> list[tuple[int, int]]:
        """The edges that a gradient comes back on."""
        graph = self.graph
        return [
            (u, v)
            for (u, v), tensors in graph.edges.items()
            if any(t.needs_grad for t in tensors) and takes_part_in_backward(graph, graph.operators[v])
        ]

    def _longest(self, edges: list[tuple[int, int]], on: Array, first: Array) -> Array:
        """The most that the operators on a way before each one add up to, `first` more for where it begins:
        -inf where none may. Edges are sorted by their source, sources come before."""
        on_, first_ = on.tolist(), first.tolist()
        before = [-np.inf] * len(on_)
        for u, v in edges:
            before[v] = max(before[v], max(before[u], first_[u]) + on_[u])
        return np.array(before)
