"""Whether a rank's gradients are finite, and what a step has changed before anybody could know."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class FiniteCheck:
    """Of a rank's stages: `sums` is the memory of all its gradients, `buffers` what its forwards write to."""

    def __init__(self, sums: Sequence[Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._sums = [memory for memory in sums if memory.numel()]
        self._buffers = buffers
        self._kept = {name: buffer.clone() for name, buffer in buffers.items()}

    def begin(self) -> None:
        """Before a step: remember the buffers."""
        for name, buffer in self._buffers.items():
            self._kept[name].copy_(buffer)

    def undo(self) -> None:
        """The buffers as they were at the beginning of the step."""
        for name, buffer in self._buffers.items():
            buffer.copy_(self._kept[name])

    def is_finite(self) -> bool:
        """Whether all gradients are. They are read once; a device is waited for once."""
        if not self._sums:
            return True
        norms = torch.stack([torch.linalg.vector_norm(memory).double() for memory in self._sums])
        if math.isfinite(float(norms.sum())):
            return True
        return all(is_finite(memory) for memory in self._sums)  # the norm of finite numbers may overflow


def is_finite(value: Tensor) -> bool:
    """Whether all elements are."""
    if not value.numel():
        return True
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(value))
