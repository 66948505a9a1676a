"""How many samples each stage may have in flight: sinks first, against the edges (GraphPipe §6, Algorithm 2).

The paper's own table is lost in its text; this formula reproduces every number that it and its published
strategy files give. In samples, so that stages may differ in micro-batch size b and in k of kFkB:

    i_sink = k b
    i_u    = the next multiple of b_u from  max over successors d of
             i_d + max(k_u b_u, b_d) + max(0, b_u - k_d b_d)

i_d samples are already inside d; u must hold another b_d (or its own burst of k_u b_u) ready before d's next
forward; and where u's micro-batch is coarser than what d gives back per round, u waits b_u - k_d b_d samples
longer for its first gradient. With equal micro-batches and k = 1 it is b times the longest path to a sink.

A stage without a backward holds nothing for one, but its number is made by the same rule: it says how many
samples it may be ahead of the *backwards* of the stages after it. Those keep the messages they got from it
until their backward, so it needs this lead to keep them busy. It needs no more either: giving such a stage a
backward that costs nothing only adds waiting, so a set of numbers that cannot deadlock with backwards
everywhere cannot deadlock without some of them, and its message buffers stay finite.
"""

from collections.abc import Sequence

from gpp.plan import Policy
from gpp.schedule.task import ScheduleError


def in_flight(
    successors: Sequence[Sequence[int]],
    micro_batches: Sequence[int],
    policy: Policy,
    mini_batch: int,
    *,
    ks: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Samples in flight of every stage over all its replicas, a multiple of its micro-batch.

    `successors[s]` are numbers greater than s (`StageGraph.successors` will do); `ks` are 1 where not given.
    "gpipe" holds the whole mini-batch. `policy.extra_warm_up` adds that many micro-batches on every hop: what
    hides slow links. No number exceeds the mini-batch. Raises ScheduleError for stages out of order.
    """
    count = len(micro_batches)
    if policy.name == "gpipe":
        return (mini_batch,) * count
    k = [1] * count if ks is None else ks
    held = [0] * count
    for u in reversed(range(count)):
        b = micro_batches[u]
        need = k[u] * b
        for d in successors[u]:
            if not u < d < count:
                raise ScheduleError(
                    f"stage {u} has the successor {d}: stages must be numbered in topological order, "
                    f"0 to {count - 1}"
                )
            need = max(need, held[d] + lead(b, k[u], micro_batches[d], k[d]))
        extra = policy.extra_warm_up * b if successors[u] else 0
        held[u] = min(-(-need // b) * b + extra, mini_batch)
    return tuple(held)


def lead(b: int, k: int, b_below: int, k_below: int) -> int:
    """Samples that a stage needs in flight beyond those of a successor, before rounding up."""
    return max(k * b, b_below) + max(0, b - k_below * b_below)
