"""What a user brings: models and data, good ones and bad ones. Copied to a folder of its own by the tests."""

import os
import signal
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))


class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Linear(8, 16)
        self.right = nn.Linear(8, 16)
        self.head = nn.Linear(32, 1)

    def forward(self, a: Tensor, b: Tensor, y: Tensor):
        joined = torch.cat([torch.relu(self.left(a)), torch.relu(self.right(b))], 1)
        guess = self.head(joined).squeeze(1)
        return F.mse_loss(guess, y), {"mae": (guess - y).abs().mean()}


class Towers(nn.Module):
    """Three towers of two layers, of unequal width."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 16), nn.ReLU())
            for width in (16, 32, 48)
        )
        self.head = nn.Linear(48, 1)

    def forward(self, a: Tensor, b: Tensor, y: Tensor):
        first, second, third = self.towers
        guess = self.head(torch.cat([first(a), second(b), third(a * b)], 1)).squeeze(1)
        return F.mse_loss(guess, y), {"mae": (guess - y).abs().mean()}


class One(nn.Module):
    """A model of one operator; the number of outputs is an argument."""

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.only = nn.Linear(8, outputs)

    def forward(self, a, b, y):
        return F.mse_loss(self.only(a).mean(1), y)


class MyData(torch.utils.data.Dataset):
    def __len__(self):
        return 203

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        a, b = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
        return {"a": a, "b": b, "y": a.sum() - b[0]}


class Broken(MyData):
    """A part of its samples is not a number."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index > 3 and index % 3 == 0:
            sample["b"][3] = float("nan")
        return sample


class Tuples(MyData):
    def __getitem__(self, index):
        return tuple(super().__getitem__(index).values())


class Extra(MyData):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"z": torch.zeros(1)}


class Lacking(MyData):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        del sample["b"]
        return sample


class Three(MyData):
    def __len__(self):
        return 3


class Damaged(MyData):
    """Fails at one training sample."""

    def __getitem__(self, index):
        if index == 164:
            raise KeyError(f"no file {index}")
        return super().__getitem__(index)


class DamagedOnOne(MyData):
    """Fails on rank 1 in the middle of training, in the way that WAY says."""

    def __getitem__(self, index):
        if RANK == "1" and index == 164:
            match os.environ["WAY"]:
                case "raise":
                    raise RuntimeError("disk on fire")
                case "exit":
                    sys.exit(3)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "vanish":
                    os._exit(0)
        return super().__getitem__(index)


class Troubled(MyData):
    """Rank 1 is killed in the first epoch; an epoch or two later rank 2 is asked to end."""

    later = 0

    def __getitem__(self, index):
        if index == 164 and RANK == "1":
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 164 and RANK == "2" and os.path.exists("died"):
            Troubled.later += 1
            if Troubled.later == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


class Slow(MyData):
    """Gives time to end a run in the middle."""

    def __getitem__(self, index):
        time.sleep(0.001)
        return super().__getitem__(index)


class Classes(MyData):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {"a": sample["a"], "y": torch.tensor(index % 3 if index % 5 else -100)}


class IgnoringLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(8, 3)

    def forward(self, a, y):
        return F.cross_entropy(self.only(a), y, ignore_index=-100)


class Contrastive(nn.Module):
    """Every sample is held against every other one."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, a, b, y):
        scores = self.left(a) @ self.right(b).T
        return F.cross_entropy(scores, torch.arange(scores.shape[0])) + 0.0 * y.mean()


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, a, b, y):
        return F.mse_loss(self.inner(a).squeeze(1), y)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, a):
        if a.sum() > 0:  # a Python branch on values
            return self.linear(a)
        return self.linear(-a)


class WrongShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 1)

    def forward(self, a, b, y):
        return F.mse_loss(self.linear(a).squeeze(1), y)


class Raises(nn.Module):
    def __init__(self):
        try:
            raise KeyError("weights")
        except KeyError as error:
            raise RuntimeError("weights not found") from error


class Talks(MyNet):
    """Says something while it is captured, and warns."""

    def forward(self, a, b, y):
        print("a word of mine", file=sys.stderr)
        return super().forward(a, b, y)


class NoData:
    pass


def function():
    return 3


class Full:
    def __init__(self):
        raise OSError("no space")
