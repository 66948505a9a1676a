"""How large an optimizer's state is, whichever class it is."""

import torch
from torch import nn

from gpp.runtime.state import MakeOptimizer


def probe(make: MakeOptimizer) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """The optimizer of one small parameter."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    return make([("probe", parameter)]), parameter


def optimizer_factor(make: MakeOptimizer) -> float:
    """Bytes of state per byte of parameters, found by one step on a small one. Raises ValueError for an
    optimizer that evaluates the loss again."""
    optimizer, parameter = probe(make)
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except TypeError as error:
        raise ValueError(
            f"{type(optimizer).__name__}.step cannot be called without arguments ({error}): take an "
            "optimizer that does not evaluate the loss again"
        ) from error
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    size = sum(v.numel() * v.element_size() for v in state if v.numel() > 1)
    return size / (parameter.numel() * parameter.element_size())
