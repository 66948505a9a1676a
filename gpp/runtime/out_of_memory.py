"""A device that is too small, said as a user can act on it: the plan's memory, the stage, what to turn."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpp.plan import Plan
from gpp.plan_table import memory_table, readable_bytes

_ALLOCATOR = ("can't allocate memory", "not enough memory", "out of memory")


class DeviceMemoryError(RuntimeError):
    """A stage does not fit the memory of its device."""


@contextmanager
def explained(plan: Plan, rank: int) -> Iterator[None]:
    """Inside, whatever finds no memory raises DeviceMemoryError: making weights, the optimizer's state, a
    pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, DeviceMemoryError) or not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(advice(plan, rank, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's allocator, the host's or Python has found no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR)


def advice(plan: Plan, rank: int, error: BaseException) -> str:
    """What did not fit, what the plan takes every stage to need, and what would need less."""
    stages = plan.stage_graph.stages
    own = [stages[index] for index in plan.residents.get(rank, ())]
    names = " and ".join(stage.name for stage in own) or "no stage"
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    sizes = sorted({stage.micro_batch for stage in stages})
    knobs = []
    if sizes[-1] > 1:
        knobs.append(f"a smaller train.micro_batch (it is {', '.join(map(str, sizes))})")
    if not all(stage.recompute for stage in own):
        knobs.append("planner.recompute=true (planner=gpp): forwards again instead of stashes")
    if any(len(stage.devices) > 1 and not stage.shard_optimizer for stage in own):
        knobs.append("planner.shard_optimizer=true (planner=gpp): replicas share the optimizer's state")
    knobs.append("more devices")
    if rank < len(plan.topology.devices):
        believed = readable_bytes(plan.topology.devices[rank].memory)
        knobs.append(f"cluster.memory, if a device has less than the {believed} that the plan believes in")
    listed = "".join(f"\n  - {knob}" for knob in knobs)
    return (
        f"the device of rank {rank} has no memory left for {names} ({reason}). What the plan takes each "
        f"stage to need on a device:\n{memory_table(plan)}To need less, change:{listed}"
    )
