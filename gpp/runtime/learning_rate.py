"""The learning rate of a run: what torch.optim.lr_scheduler.LambdaLR is given."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WarmUpCosine:
    """The factor of the learning rate in each step: linear up to 1 in `warm_up` steps, then half a cosine
    down to `least` in the last of `steps` (Goyal et al., arXiv 1706.02677; Loshchilov and Hutter, arXiv
    1608.03983)."""

    warm_up: int
    steps: int
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.warm_up < 0 or self.steps < 0 or not 0 <= self.least <= 1:
            raise ValueError(
                "warm_up and steps must be at least 0 and least between 0 and 1, they are "
                f"{self.warm_up}, {self.steps} and {self.least}"
            )

    def __call__(self, step: int) -> float:
        """Of step 0, 1, ..."""
        if step < self.warm_up:
            return (step + 1) / (self.warm_up + 1)
        left = max(self.steps - 1 - self.warm_up, 1)
        done = min((step - self.warm_up) / left, 1.0)
        return self.least + (1 - self.least) * 0.5 * (1 + math.cos(math.pi * done))
