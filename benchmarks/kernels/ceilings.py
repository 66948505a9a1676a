"""What the device can do at most, measured in the same run: a copy, and products of large matrices."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from .clock import Clock
from .work import DTYPES

COPY = 1 << 30  # bytes that are copied
MATRIX = 8192  # rows and columns


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second that a copy reads and writes; FLOPs a second of products of matrices by dtype."""

    copy: float
    product: dict[str, float]


def measured(clock: Clock, dtypes: Iterable[str]) -> Ceilings:
    """Numbers of the inputs are random: products of zeros take less power and run faster."""
    with clock.scope():
        source = torch.randint(256, (COPY,), dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
    bytes_per_second = 2 * COPY / clock.gpu([partial(target.copy_, source)]).median
    del source, target
    product = {}
    for name in dtypes:
        with clock.scope():
            a, b = (torch.randn(MATRIX, MATRIX, device=clock.device).to(DTYPES[name]) for _ in range(2))
            product[name] = 2.0 * MATRIX**3 / clock.gpu([partial(torch.mm, a, b)]).median
        clock.forget()
    return Ceilings(bytes_per_second, product)
