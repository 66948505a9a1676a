"""Small models, one for each thing that a runtime can get wrong, with data to train them on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.models.candle_uno import CandleUno
from gpp.models.dlrm import Dlrm
from gpp.runtime.synthetic import Synthetic, clicks, drug_responses

WIDTH = 8
CLASSES = 5


def block(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = block(), block(), block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        z = self.d(self.c(self.b(self.a(x))))
        return F.cross_entropy(z, y), {"accuracy": (z.argmax(-1) == y).float().mean()}


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = block(), block(), nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor, w: Tensor, y: Tensor):
        return F.cross_entropy(self.d(torch.cat([self.a(x), self.b(w)], -1)), y)


class Diamond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = block(), block(), block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        x = self.a(x)
        return F.cross_entropy(self.d(self.b(x) * self.c(x)), y)


class FanOut(nn.Module):
    """One value read by three stages: its gradients are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = block(), block(), block(), block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        x = self.a(x)
        return F.cross_entropy(self.e(self.b(x) + self.c(x) * self.d(x)), y)


class Skip(nn.Module):
    """The first stage's value is read by the next one and again by the one after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(), block(), nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        x = self.a(x)
        return F.cross_entropy(self.c(torch.cat([self.b(x), x], -1)), y)


class Residual(nn.Module):
    """The gradient of a sum is handed on as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = block(), block(), block(), block()
        self.e = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        p = self.a(x)
        q = F.gelu(self.b(p))
        return F.cross_entropy(self.e(torch.cat([p + self.c(q), self.d(q)], -1)), y)


class Unbalanced(nn.Module):
    """A branch of one stage beside a branch of three."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(), nn.ModuleList([block(), block(), block()])
        self.d = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor, w: Tensor, y: Tensor):
        a, b = self.a(x), w
        for layer in self.b:
            b = layer(b)
        return F.cross_entropy(self.d(torch.cat([a, b], -1)), y)


class IntegerEdge(nn.Module):
    """A mask and a bucket number, computed in one stage and read in later ones: no gradient goes back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = block(), nn.Embedding(4, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        h = self.a(x)
        bucket = (h.sum(-1) * 3).long().remainder(4)
        e = self.b(bucket)
        return F.cross_entropy(self.d(h * (bucket > 1).unsqueeze(-1) + e), y)


class Table(nn.Module):
    """A table without gradient that every stage uses, and a learnable one that two stages share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = block(), block(), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("angles", torch.arange(WIDTH) / WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, y: Tensor):
        table = torch.cos(self.angles)
        x = self.a(x * table)
        x = self.b(x + table * self.scale)
        return F.cross_entropy(self.d(x * table * torch.tanh(self.scale)), y)


class Tied(nn.Module):
    """The embedding is also the output projection: one parameter, two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(CLASSES, WIDTH), block()
        self.d = nn.Linear(WIDTH, CLASSES, bias=False)
        self.d.weight = self.a.weight

    def forward(self, ids: Tensor, y: Tensor):
        return F.cross_entropy(self.d(self.b(self.a(ids).mean(1))), y)


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.d = block(), nn.BatchNorm1d(WIDTH), block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.d(self.b(self.norm(self.a(x)))), y)


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = block(), block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        x = F.dropout(self.a(x), 0.3, self.training)
        return F.cross_entropy(self.d(F.dropout(self.b(x), 0.5, self.training)), y)


class Encoder(nn.Module):
    """Dropout inside nn.TransformerEncoderLayer, attention weights included."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(CLASSES, WIDTH)
        self.b = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True)
        self.c = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True, norm_first=True)
        self.d = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, y: Tensor):
        hidden = ids == 0
        x = self.b(self.a(ids), src_key_padding_mask=hidden)
        return F.cross_entropy(self.d(self.c(x).mean(1)), y)


class TwoHeads(nn.Module):
    """A weighted sum of losses, computed in different stages."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(), nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor):
        x = self.a(x)
        first = F.cross_entropy(self.b(x), y)
        second = F.mse_loss(self.c(x).squeeze(-1), y.float())
        return first + 0.3 * second, {"first": first, "second": second}


class Padded(nn.Module):
    """A loss over what is not padding, as a pair: a mean of micro-batch means would be another number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = nn.Embedding(CLASSES, WIDTH), block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, y: Tensor):
        z = self.d(self.b(self.a(ids)))
        present = (ids != 0).float()
        loss = F.cross_entropy(z.transpose(1, 2), ids.roll(1, 1), reduction="none") * present
        right = ((z.argmax(-1) == ids.roll(1, 1)) * present).sum()
        return (loss.sum() + 0.0 * y.sum(), present.sum()), {"accuracy": (right, present.sum())}


class Frozen(nn.Module):
    """A pretrained part that does not learn, before and inside what does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = block(), block(), block(), nn.Linear(WIDTH, CLASSES)
        for parameter in (*self.a.parameters(), *self.c.parameters()):
            parameter.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.d(self.c(self.b(self.a(x)))), y)


_CLICKS = {"dense": 2, "features": 5, "tables": 2, "rows": 11, "bag": 4}


class Clicks(Dlrm):
    """Two towers and two bags of embeddings side by side."""

    pooling, interaction = "concat", "concat"

    def __init__(self) -> None:
        super().__init__(
            **_CLICKS,
            dense_layers=2,
            hidden=WIDTH,
            dimension=3,
            pooling=self.pooling,
            interaction=self.interaction,
            top_layers=1,
        )

    def data(self, samples: int, seed: int) -> Synthetic:
        return clicks(samples, **_CLICKS, seed=seed)


class PooledClicks(Clicks):
    """Sums of bags, and the products of all pairs."""

    pooling, interaction = "sum", "dot"


class Drugs(CandleUno):
    """Three towers over features of different widths."""

    features: dict[str, int] = {"a": 1, "b": 6, "c": 9}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(self.features, branches=3, layers=2, hidden=WIDTH, top_layers=1)

    def data(self, samples: int, seed: int) -> Synthetic:
        return drug_responses(samples, features=self.features, branches=3, seed=seed)


def batch(model: nn.Module, samples: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random data for whatever the model's forward takes."""
    if isinstance(model, Clicks | Drugs):
        data = model.data(samples, seed)
        read = data.read(range(samples), data.keys)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in read.items()}
    names = model.forward.__code__.co_varnames[1 : model.forward.__code__.co_argcount]
    generator = torch.Generator().manual_seed(seed)
    makers: dict[str, Callable[[], Tensor]] = {
        "x": lambda: torch.randn(samples, WIDTH, generator=generator).to(dtype),
        "w": lambda: torch.randn(samples, WIDTH, generator=generator).to(dtype),
        "ids": lambda: torch.randint(0, CLASSES, (samples, 6), generator=generator),
        "y": lambda: torch.randint(0, CLASSES, (samples,), generator=generator),
    }
    return {name: makers[name]() for name in names}
