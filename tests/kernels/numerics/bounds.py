"""Makes the interpreter refuse addresses outside the tensors that a kernel was given.

A block of a tensor descriptor may reach beyond the tensor: what lies outside is zero when it is read and is
never written. Its elements inside are checked like all others.
"""

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


class OutOfBoundsError(RuntimeError):
    """A kernel reads or writes memory that belongs to none of its arguments."""


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one after its last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter until the test ends."""
    allowed: list[tuple[int, int]] = []
    take = interpreter.GridExecutor._init_args_hst

    def remember(self: Any, positional: Any, keywords: Any) -> Any:
        given = [a if isinstance(a, tuple) else (a,) for a in (*positional, *keywords.values())]
        bases = [a.base if isinstance(a, TensorDescriptor) else a for group in given for a in group]
        allowed[:] = [extent(base) for base in bases if isinstance(base, torch.Tensor)]
        return take(self, positional, keywords)

    def check(action: str, pointers: Any, mask: Any) -> None:
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, stop in allowed:
            inside |= (addresses >= start) & (addresses + np.uint64(size) <= stop)
        if not inside.all():
            raise OutOfBoundsError(f"{action} of {int((~inside).sum())} elements out of bounds")

    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", remember)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)
