"""A model that breaks in as many ways as its batch says, in stages and on replicas as a test wants it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpp.api.pipeline import Pipeline
from gpp.api.start import pipeline
from gpp.capture.capture import Captured
from gpp.plan import Plan
from tests.equality.cases import Case
from tests.equality.harness import make_plan

from .models import adam

WIDTH = 8


class Fragile(nn.Module):
    """Two branches of `base` and a head. `scale` 0: the root's backward divides by 0; `shift` -9: a logarithm
    of what is negative; `heat` 99: an exponential overflows; `mask` all 0: nothing is left of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.a, self.b, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, heat: Tensor, y: Tensor):
        x = self.norm(self.base(x))
        left = self.a(x)
        left = left / (1 + torch.sqrt((scale * left).square().sum(1, keepdim=True)))
        right = torch.log(self.b(x).sigmoid() + shift)
        right = (right + heat * 0.01).masked_fill(mask == 0, float("-inf")).softmax(-1)
        guess = self.head(left * right) + torch.log1p(torch.exp(heat))
        return F.mse_loss(guess, y), {"largest": guess.abs().amax(1).mean()}


class Weighted(nn.Module):
    """Its loss is divided by weights of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, w: Tensor):
        return (self.b(self.a(x).tanh()) * w).sum(), w.sum()


def rows(count: int = 8, seed: int = 0, **broken: tuple[int, float]) -> dict[str, Tensor]:
    """Good ones; of a key `broken` the row of that number holds that value."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "x": torch.randn(count, WIDTH, generator=generator),
        "mask": torch.randint(0, 2, (count, WIDTH), generator=generator).float(),
        "scale": torch.ones(count, 1),
        "shift": torch.full((count, 1), 0.1),
        "heat": torch.zeros(count, 1),
        "y": torch.randn(count, WIDTH, generator=generator),
        "w": torch.ones(count, 1),
    }
    made["mask"][:, 0] = 1
    for key, (row, value) in broken.items():
        made[key][row] = value
    return made


class Bad:
    """A data set whose `wrong` samples are not finite."""

    keys = ("x", "mask", "scale", "shift", "heat", "y")

    def __init__(self, wrong: tuple[int, ...]) -> None:
        self.all = rows(32)
        for index in wrong:
            self.all["x"][index] = math.nan

    def __len__(self) -> int:
        return 32

    def read(self, indices, keys) -> dict[str, Tensor]:
        return {key: self.all[key][list(indices)] for key in keys}


def in_stages(
    model: nn.Module, *prefixes: tuple[str, ...], case: dict | None = None, exact: bool = True, **more
) -> Pipeline:
    """A pipeline with these stages, mini-batch 8 and micro-batch 4 unless `case` says something else."""
    asked = {"micro_batch": 4, "mini_batch": 8, "exact": exact, **(case or {})}
    cut = Case("", nn.Module, prefixes, **asked)

    def plan(captured: Captured) -> Plan:
        return make_plan(cut, captured)

    example = {k: v for k, v in rows(4).items() if k in model.forward.__annotations__}
    more = {"optimizer": adam, "devices": cut.ranks, "verify": False, **more}
    return pipeline(model, example, mini_batch=8, plan=plan, device="cpu", **more)


def fragile(norm: bool = False) -> Fragile:
    """`norm`: with batch norm, which mixes samples and so keeps its stage from replicas."""
    torch.manual_seed(0)
    model = Fragile()
    if not norm:
        model.norm = nn.Identity()
    return model
