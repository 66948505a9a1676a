"""Initial weights that no plan can change."""

import pytest
import torch
from torch import Tensor, nn

from gpp.capture.export import CaptureError
from gpp.capture.weights import build_plain, build_recorded


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.embed = nn.Linear(6, 7), nn.Conv2d(2, 3, 3), nn.Embedding(5, 7)
        self.norm, self.tied = nn.BatchNorm1d(7), nn.Linear(7, 5, bias=False)
        self.tied.weight = self.embed.weight
        self.many = nn.ParameterList([nn.Parameter(torch.empty(8, 8)) for _ in range(7)])
        nn.init.xavier_uniform_(self.many[0])
        nn.init.kaiming_normal_(self.many[1])
        nn.init.orthogonal_(self.many[2])
        nn.init.trunc_normal_(self.many[3], std=0.1)
        nn.init.constant_(self.many[4], 3.0)
        nn.init.normal_(self.many[5], 1.0, 0.5)
        nn.init.sparse_(self.many[6], sparsity=0.5)
        nn.init.dirac_(self.conv.weight)
        self.scaled = nn.Parameter(0.02 * torch.randn(4, 4) + torch.eye(4))
        self.register_buffer("range", torch.arange(4))
        self.register_buffer("angles", torch.linspace(0, 1, 5).cos())

    def forward(self, x: Tensor) -> Tensor:
        return x


def names_of(model: nn.Module) -> list[str]:
    return [*dict(model.named_parameters()), *dict(model.named_buffers())]


def test_recorded_values_do_not_depend_on_the_stage() -> None:
    built = build_recorded(Zoo, seed=4)
    assert all(p.is_meta for p in built.model.parameters())
    names = names_of(built.model)
    whole = built.values(names)
    for name in names:
        assert torch.equal(built.values([name])[name], whole[name]), name
    other = build_recorded(Zoo, seed=5).values(names)
    assert torch.equal(
        build_recorded(Zoo, seed=4).values(names[::-1])["linear.weight"], whole["linear.weight"]
    )
    assert not torch.equal(other["linear.weight"], whole["linear.weight"])
    assert not torch.equal(whole["many.1"], whole["many.5"])


def test_recorded_values_are_what_the_initialisers_make() -> None:
    built = build_recorded(Zoo, seed=4)
    values = built.values(names_of(built.model))
    assert "tied.weight" not in values
    assert values["linear.weight"].abs().max() <= 6**-0.5 and values["linear.weight"].std() > 0.1
    assert torch.allclose(values["many.2"] @ values["many.2"].T, torch.eye(8), atol=1e-5)
    assert 0.05 < values["many.3"].std() < 0.2
    assert torch.equal(values["many.4"], torch.full((8, 8), 3.0))
    assert abs(values["many.5"].mean() - 1) < 0.3
    assert abs(values["scaled"].diagonal().mean() - 1) < 0.1
    assert (values["many.6"] == 0).sum() == 32
    assert values["conv.weight"].sum() == 2
    assert torch.equal(values["norm.running_var"], torch.ones(7))
    assert torch.equal(values["range"], torch.arange(4))
    assert torch.allclose(values["angles"], torch.linspace(0, 1, 5).cos())


def test_plain_is_the_users_own_script() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    built = build_plain(Zoo, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    own = dict(Zoo().named_parameters())
    found = built.values(own)
    assert all(torch.equal(found[n], p) for n, p in own.items())


class NeedsNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        assert float(self.a.weight.detach().abs().max()) > 0


def test_a_constructor_that_needs_numbers_is_told_to_use_plain() -> None:
    with pytest.raises(CaptureError, match=r"train\.init=plain"):
        build_recorded(NeedsNumbers, seed=0)


class Unset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(3))


def test_memory_that_nothing_writes_is_refused() -> None:
    with pytest.raises(CaptureError, match="sets no values of a on the meta device"):
        build_recorded(Unset, seed=0).values(["a"])
