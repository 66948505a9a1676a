"""Blocks of a model that run under autocast: each of their calls switches it on for itself."""

from typing import Any

import torch
from torch import fx


def under_autocast(device: str, dtype: torch.dtype | None, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an ATen operator as it runs inside `torch.autocast(device, dtype)`."""
    with torch.autocast(device, dtype=dtype, cache_enabled=False):
        return target(*args, **kwargs)


def operator_called(node: fx.Node) -> Any:
    """What a call node calls in the end: a callable, mostly an ATen overload."""
    return node.args[2] if node.target is under_autocast else node.target
