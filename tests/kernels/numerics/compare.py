"""The rule for every kernel: at most twice the error of torch's own operator at the same dtype.

Two units in the last place of float32 are added, for sums in which torch happens to round nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_NAMES = ("fp32", "fp16", "bf16")
SLACK = 2 * torch.finfo(torch.float32).eps


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor) -> list[Tensor]:
    """The result and its gradients with respect to the inputs that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def assert_as_good_as_torch(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor
) -> None:
    """Result and every gradient of `ours` against `torchs` in float64, beside `torchs` at the given dtype."""
    wide = [None if t is None else t.double() for t in inputs]
    assert_no_worse(
        gradients(ours, inputs, dy), gradients(torchs, inputs, dy), gradients(torchs, wide, dy.double())
    )


def assert_no_worse(ours: Sequence[Tensor], torchs: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Each result against the one in float64, beside torch's at the given dtype."""
    for place, (mine, theirs, exact) in enumerate(zip(ours, torchs, right, strict=True)):
        assert mine.shape == exact.shape and mine.dtype == theirs.dtype
        assert mine.isfinite().all(), f"result {place}"
        error = (mine.double() - exact).norm().item()
        allowed = 2 * (theirs.double() - exact).norm().item() + SLACK * exact.norm().item()
        assert error <= allowed, f"result {place}: error {error:.3g}, allowed {allowed:.3g}"
