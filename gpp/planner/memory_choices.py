"""What a stage may do to need less memory: share out its optimizer's state over its replicas, then recompute.

The first costs an all-gather a step, the second a forward a micro-batch; so they are taken in this order, and
only by stages that do not fit otherwise.
"""

from collections.abc import Sequence
from dataclasses import replace

from .draft import Draft, Part
from .options import Options


def spared(draft: Draft, parts: Sequence[Part], most: Sequence[float], options: Options) -> tuple[Part, ...]:
    """The parts with one more of these choices for those that do not fit with what 1F1B has in flight, or for
    all if each fits; the same parts if nothing is left to choose."""
    depths = draft.depths
    need = dict(zip(draft.parts, draft.memory(depths, (0,) * len(depths)), strict=True))
    have = dict(zip(draft.parts, most, strict=True))
    over = [part for part in parts if need[part] > have[part]] or list(parts)
    return tuple(_sparing(part, options) if part in over else part for part in parts)


def _sparing(part: Part, options: Options) -> Part:
    if options.shard_optimizer and part.devices > 1 and not part.shard_optimizer:
        return replace(part, shard_optimizer=True)
    if options.recompute and not part.recompute:
        return replace(part, recompute=True)
    return part
