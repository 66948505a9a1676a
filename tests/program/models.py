"""Modules as users write them, each with data: what stages are carved from in the tests of this folder."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CLASSES = 8, 5
MODELS: dict[str, tuple[type[nn.Module], Callable[[int], dict[str, Tensor]]]] = {}


def with_data(**makers: Callable[[int], Tensor]):
    def register(model: type[nn.Module]) -> type[nn.Module]:
        MODELS[model.__name__] = (model, lambda n: {key: make(n) for key, make in makers.items()})
        return model

    return register


def rows(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def tokens(*shape: int, below: int = CLASSES) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, below, (n, *shape))


def double_conv(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, padding=1), nn.GroupNorm(2, outside), nn.ReLU(inplace=True),
    )  # fmt: skip


@with_data(x=rows(3, 4, 4), target=rows(1, 4, 4))
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = double_conv(3, 4), double_conv(4, 8), double_conv(8, 4)
        self.raise_, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor, target: Tensor):
        fine = self.down(x)
        coarse = self.middle(F.max_pool2d(fine, 2))
        return F.mse_loss(self.out(self.up(torch.cat([self.raise_(coarse), fine], 1))), target)


class Basic(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside)
        self.c2, self.n2 = nn.Conv2d(outside, outside, 3, 1, 1, groups=2), nn.BatchNorm2d(outside)
        self.relu, self.side = nn.ReLU(inplace=True), nn.Conv2d(inside, outside, 1, 2)

    def forward(self, x: Tensor):
        h = self.n2(self.c2(self.relu(self.n1(self.c1(x)))))
        h += self.side(x)
        return self.relu(h)


@with_data(x=rows(2, 4, 4), y=tokens())
class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Basic(2, 4), Basic(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.c(F.adaptive_avg_pool2d(self.b(self.a(x)), 1).flatten(1)), y)


@with_data(ids=tokens(4), y=tokens())
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.gru = nn.GRU(WIDTH, 4, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, ids: Tensor, y: Tensor):
        h, _ = self.gru(self.e(ids))
        _, (last, cell) = self.lstm(h)
        return F.cross_entropy(self.o(last[-1] + cell[-1]), y)


@with_data(dense=rows(4), ids=tokens(2, 3, below=10), y=lambda n: torch.rand(n))
class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(10, WIDTH, mode="sum") for _ in range(2))
        self.bottom, self.top = nn.Linear(4, WIDTH), nn.Linear(WIDTH + 3, 1)

    def forward(self, dense: Tensor, ids: Tensor, y: Tensor):
        d = self.bottom(dense)
        t = torch.stack([d, *(bag(ids[:, i]) for i, bag in enumerate(self.bags))], 1)
        i, j = torch.tril_indices(3, 3, -1)
        p = self.top(torch.cat([d, torch.bmm(t, t.transpose(1, 2))[:, i, j]], 1)).squeeze(-1)
        right = ((p > 0) == (y > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(p, y), {"accuracy": right}


@with_data(source=tokens(4), target=tokens(3), y=tokens(3))
class Translator(nn.Module):
    """Cross attention and a causal mask, dropout everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(CLASSES, WIDTH), nn.Embedding(CLASSES, WIDTH)
        options = {"dropout": 0.1, "batch_first": True}
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, norm_first=True, **options)
        self.decoder, self.out = (
            nn.TransformerDecoderLayer(WIDTH, 2, 16, **options),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, source: Tensor, target: Tensor, y: Tensor):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        memory = self.encoder(self.source(source))
        h = self.decoder(self.target(target), memory, tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.out(h).transpose(1, 2), y)


@with_data(x=rows(4, WIDTH), y=tokens())
class Rotary(nn.Module):
    """Real and complex rotation tables as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        angle = torch.outer(torch.arange(4.0), 1 / 100 ** (torch.arange(4.0) / 4))
        self.register_buffer("turn", torch.polar(torch.ones_like(angle), angle))
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)

    def forward(self, x: Tensor, y: Tensor):
        q = torch.view_as_complex(self.q(x).unflatten(-1, (-1, 2))) * self.turn
        h = F.scaled_dot_product_attention(
            torch.view_as_real(q).flatten(-2), self.k(x) * self.cos, x, is_causal=True
        )
        return F.cross_entropy(self.o(h.mean(1)), y)


@with_data(x=rows(WIDTH), y=tokens())
class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.b = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.b(self.a(x).relu()), y)


@with_data(x=rows(WIDTH), y=tokens())
class InPlace(nn.Module):
    """In-place operations on values, on views of them, and on a table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        h = self.a(x)
        h.add_(1.0)
        F.relu_(h)
        kept = h.clone()
        h = self.b(h)
        h += kept
        h.mul_(2)
        h[:, 0] = 0.0
        h[:, 2:4] += 1
        joined = torch.zeros(x.shape[0], WIDTH)
        joined[:, :4] = h[:, 4:]
        joined[:, 4:] = kept[:, :4]
        return F.cross_entropy(self.c(joined), y)


@with_data(x=rows(WIDTH), y=tokens())
class Blocks(nn.Module):
    """no_grad and autocast blocks, a module called twice, a ModuleDict, values of many dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.out, self.norm = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, CLASSES),
            nn.LayerNorm(WIDTH),
        )
        self.sides = nn.ModuleDict({k: nn.Linear(WIDTH, WIDTH) for k in ("left", "right")})

    def forward(self, x: Tensor, y: Tensor):
        h = self.twice(self.norm(self.twice(x)).relu())
        with torch.no_grad():
            gate = self.sides["left"](h).sigmoid()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            right = self.sides["right"](h)
        small = (h * 10).round().clamp(-127, 127).to(torch.int8)
        return F.cross_entropy(self.out(right.float().masked_fill(h > 0, 0.0) * gate + small), y)


@with_data(x=rows(WIDTH), y=tokens())
class Spectral(nn.Module):
    """The backward of irfft writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, CLASSES),
            nn.Parameter(torch.randn(5)),
        )

    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.b(torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.w, n=WIDTH)), y)


@with_data(x=rows(WIDTH), y=tokens())
class Views(nn.Module):
    """Values cross expanded, split, transposed and sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.d, self.e = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor):
        q, k, v = self.a(x).chunk(3, -1)
        h = self.b(q) * self.c(k) + v
        wide = self.d(h).expand(-1, WIDTH)
        turned = self.c(wide).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.cross_entropy(self.e(turned.reshape(-1, WIDTH) + wide), y)


@with_data(x=rows(WIDTH), y=tokens())
class Unused(nn.Module):
    """A parameter that nothing reads, one that only a metric reads, one that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unread = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 2)
        self.probe, self.frozen = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor):
        h = self.a(self.frozen(x))
        probed = F.mse_loss(self.probe(h).squeeze(-1), y.float())
        return F.cross_entropy(self.b(h), y), {"probe": probed}


@with_data(x=rows(WIDTH), y=tokens())
class Random(nn.Module):
    """Random numbers of every kind that has a keyed form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES), nn.Dropout(0.2)

    def forward(self, x: Tensor, y: Tensor):
        h = self.drop(self.a(x))
        if self.training:
            path = h.new_empty(h.shape[0], 1).bernoulli_(0.8)
            h = h * path / 0.8 + 0.1 * torch.rand_like(h) + 0.1 * torch.randn(x.shape[0], 1)
            h = h + torch.empty_like(h).uniform_(-0.1, 0.1) + torch.empty_like(h).normal_(0, 0.1)
            h = h * torch.bernoulli(h.sigmoid()) + F.gumbel_softmax(h, dim=-1)
        return F.cross_entropy(self.b(h), y)


@with_data(x=rows(WIDTH), y=tokens())
class Averages(nn.Module):
    """Buffers written in place, assigned, and counted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("other", torch.zeros(WIDTH))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor, y: Tensor):
        h = self.a(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * h.mean(0))
                self.count += 1
            self.other = 0.5 * self.other + 0.5 * h.detach().sum(0)
        return F.cross_entropy(self.b(h - self.mean - self.other), y)
