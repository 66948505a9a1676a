"""The one door through which every kernel is launched.

Nothing here asks for a device: the room can be imported on a machine without a GPU or its driver. With
TRITON_INTERPRET=1 in the environment (Triton reads it when a kernel is defined, so set it before importing)
the kernels themselves run on CPU tensors, one program after another; without it CPU tensors take the
reference implementation of each operator.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from . import interpreter

    interpreter.repair()

HOPPER = 90
# The interpreter keeps its program id and its patched language in globals.
_interpreter_lock = threading.RLock()

_counter: ContextVar[Counter[str] | None] = ContextVar("counter", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on the device of its first argument, a tensor or a descriptor; an empty grid is no
    launch at all."""
    if 0 in grid:
        return
    counter = _counter.get()
    if counter is not None:
        counter[kernel.__name__] += 1
    elif INTERPRETED:
        with _interpreter_lock, interpreter.arithmetic():
            kernel[grid](*arguments, **options)
    else:
        with _on_device(getattr(arguments[0], "base", arguments[0])):
            kernel[grid](*arguments, **options)


@contextmanager
def counting(counter: Counter[str]) -> Iterator[None]:
    """Count kernels by name in place of running them, in this thread."""
    token = _counter.set(counter)
    try:
        yield
    finally:
        _counter.reset(token)


def is_counting() -> bool:
    """Whether kernels are counted now: tensors have no addresses then."""
    return _counter.get() is not None


def _on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the device of the tensors."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def architecture(tensor: torch.Tensor) -> int:
    """The compute capability, times 10, of the device that a kernel for `tensor` runs on; for tensors that
    are nowhere, of the one that is compiled for. The interpreter can do what Hopper does, and launches are
    counted as there."""
    if INTERPRETED or _counter.get() is not None:
        return HOPPER
    if not tensor.is_cuda:
        return int(triton.runtime.driver.active.get_current_target().arch)
    device = _device(tensor.device.index)
    return int(device.major * 10 + device.minor)


def address(tensor: torch.Tensor) -> int:
    """Where the tensor begins in memory; 0 where launches are counted, of tensors that are in none."""
    return 0 if _counter.get() is not None else tensor.data_ptr()


def processors(tensor: torch.Tensor) -> int:
    """The multiprocessors of that device; of the interpreter, which runs one program at a time, 1."""
    if not tensor.is_cuda or _counter.get() is not None:
        return 1
    return int(_device(tensor.device.index).multi_processor_count)


@cache
def _device(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def blocks(size: int, block: int) -> int:
    """How many blocks of `block` cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def on_cpu(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """What runs for CPU tensors: the kernel when it is interpreted, else the reference."""
    return kernel if INTERPRETED else reference
