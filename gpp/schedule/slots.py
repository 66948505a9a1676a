"""How many messages of a channel can be alive at once: that many slots never hold anything up.

A message and the gradient of the same samples both live between the upstream forward and the upstream input
half of these samples; the activation at its receiver until the weight half there. Where no gradient returns,
and in evaluation, the backwards are imagined: they would only add waiting, so what suffices with them
suffices without.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpp.schedule.task import INPUT_HALF, WEIGHT_HALF, Pass, Task


@dataclass(frozen=True, slots=True)
class Walk:
    """A stage's order in numbers of micro-batches: input halves that come before each forward, and weight
    halves that come before the gradient of each input half leaves."""

    returned: tuple[int, ...]
    finished: tuple[int, ...]


def walk(tasks: Iterable[Task]) -> Walk:
    """Of one stage's tasks, imagined backwards and all."""
    returned: list[int] = []
    finished: list[int] = []
    weights = 0
    for task in tasks:
        weights += task.kind in WEIGHT_HALF
        if task.kind is Pass.FORWARD:
            returned.append(len(finished))
        elif task.kind in INPUT_HALF:
            finished.append(weights)
    return Walk(tuple(returned), tuple(finished))


def activation_slots(up: Walk, down: Walk, messages: Sequence[tuple[int, int]]) -> int:
    """Of a channel whose messages go from these upstream to these downstream micro-batches, in order.

    When the upstream stage sends, it has seen some gradients come back, at first all of the step before.
    Before the last of these left, the stage below had finished some weight halves, and with them the buffers
    of what they read.
    """
    read = [below for _, below in messages]
    freed = [0, *(bisect_left(read, down.finished[below]) for below in read)]
    return _most_alive(up, [above for above, _ in messages], freed)


def gradient_slots(up: Walk, messages: Sequence[tuple[int, int]]) -> int:
    """Of the channel back: a gradient lives no longer than the input half above."""
    return _most_alive(up, [above for above, _ in messages], range(len(messages) + 1))


def forward_slots(made: Sequence[tuple[int, ...]], used: Sequence[tuple[int, ...]]) -> int:
    """Of a channel of forwards alone, by the places of each message's two forwards in an order of all: enough
    to run in that order, and so for any run of devices that follow it."""
    return max(sent + 1 - bisect_left(used, place) for sent, place in enumerate(made))


def _most_alive(up: Walk, messages: Sequence[int], freed: Sequence[int]) -> int:
    """`freed`: messages whose buffers are free again once so many of the channel's gradients came back."""
    left = len(messages) - freed[-1]  # of the step before, when the next one begins
    most = 0
    for forward, returned in enumerate(up.returned):
        sent, back = bisect_right(messages, forward), bisect_left(messages, returned)
        most = max(most, sent - freed[back] + (0 if back else left))
    return most
