"""Whole models, captured and fused: the paper's three and an encoder as Hugging Face writes them.

Results and gradients are those of the plain graphs, and fewer kernels are launched.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gpp.capture.capture import Captured, capture
from gpp.models.candle_uno import CandleUno
from gpp.models.dlrm import Dlrm
from gpp.models.mmt import MultiModalTransformer
from gpp.program.build import Alone, Hooks, Roots, alone
from gpp.program.random import keyed_attention, keyed_dropout
from kernels.backward import rewrite_backward
from kernels.fuse import fuse
from kernels.launches import launches
from kernels.patterns.match import Keyed

SAMPLES = 4
KEYED = Keyed(torch.ops.gpp.keyed_bits.default, keyed_dropout, keyed_attention)
FUSED = Hooks(fuse=lambda module: fuse(module, KEYED)[0], backward=rewrite_backward)


class EncoderLayer(nn.Module):
    """Attention of separate projections, then a GELU network; norms come after the residuals."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.dense, self.attention_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden, eps=1e-12)
        self.intermediate, self.output = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.output_norm, self.dropout = nn.LayerNorm(hidden, eps=1e-12), nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed = functional.scaled_dot_product_attention(
            *(self.split(part(x)) for part in (self.query, self.key, self.value)),
            attn_mask=mask,
            dropout_p=self.p if self.training else 0.0,
        )
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        x = self.attention_norm(self.dropout(self.dense(mixed)) + x)
        made: Tensor = self.output_norm(self.dropout(self.output(functional.gelu(self.intermediate(x)))) + x)
        return made


class Encoder(nn.Module):
    """Words, positions and types of tokens; layers; a pooler with tanh; a class."""

    def __init__(self, hidden: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(30, hidden, padding_idx=0), nn.Embedding(2, hidden)
        self.positions = nn.Embedding(16, hidden)
        self.register_buffer("places", torch.arange(16)[None])
        self.norm, self.dropout = nn.LayerNorm(hidden, eps=1e-12), nn.Dropout(0.1)
        self.layers = nn.ModuleList(EncoderLayer(hidden, 2, 0.1) for _ in range(layers))
        self.pooler, self.classifier = nn.Linear(hidden, hidden), nn.Linear(hidden, 3)

    def forward(self, tokens: Tensor, token_types: Tensor, attention_mask: Tensor, label: Tensor) -> Tensor:
        places = self.places[:, : tokens.shape[1]]  # type: ignore[index]
        x = self.words(tokens) + self.types(token_types) + self.positions(places)
        x = self.dropout(self.norm(x))
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, mask)
        pooled = self.dropout(torch.tanh(self.pooler(x[:, 0])))
        return functional.cross_entropy(self.classifier(pooled), label)


@dataclass(frozen=True)
class Case:
    """A model, a batch of it, and what a micro-batch launches: the number of its plain kernels, the most that
    it may be when fused, and some of these by name."""

    model: Callable[[], nn.Module]
    batch: Mapping[str, Tensor]
    plain: int
    fused: int
    kernels: Mapping[str, int]


def tokens(*names: str) -> dict[str, Tensor]:
    return {name: torch.randint(1, 30, (SAMPLES, 6)) for name in names}


def dlrm(pooling: str, interaction: str) -> Callable[[], nn.Module]:
    sizes = {"features": 5, "dense_layers": 2, "hidden": 8, "rows": 40, "dimension": 4, "bag": 3}
    return lambda: Dlrm(dense=3, tables=4, top_layers=2, **sizes, pooling=pooling, interaction=interaction)


CLICKS = {
    **{f"dense_{i}": torch.randn(SAMPLES, 5) for i in range(3)},
    **{f"sparse_{i}": torch.randint(40, (SAMPLES, 3)) for i in range(4)},
    "label": torch.tensor([0.0, 1.0, 1.0, 0.0]),
}
LABEL = torch.tensor([0, 1, 2, 1])
FEATURES = {"dose": 1, "cell": 6, "drug": 9}
CASES = {
    "MMT": Case(
        lambda: MultiModalTransformer(
            {"name": 6, "body": 6}, layers=1, hidden=8, heads=2, ffn=16, classes=3, trigrams=31, dropout=0.1
        ),
        {**tokens("name", "body"), "label": LABEL},
        208,
        184,
        {"bag_forward_kernel": 1, "join_forward_kernel": 1, "aten.native_layer_norm.default": 0},
    ),
    "DLRM, dots of sums": Case(
        dlrm("sum", "dot"),
        CLICKS,
        113,
        76,
        {
            "bag_forward_kernel": 1,
            "interaction_forward_kernel": 1,
            "aten.bmm.default": 0,
            "bag_sum_kernel": 1,
        },
    ),
    "DLRM, bags side by side": Case(
        dlrm("concat", "concat"),
        CLICKS,
        91,
        85,
        {
            "bag_forward_kernel": 1,
            "join_forward_kernel": 1,
            "aten.embedding.default": 0,
            "aten.cat.default": 0,
        },
    ),
    "CANDLE-Uno": Case(
        lambda: CandleUno(FEATURES, branches=3, layers=2, hidden=8, top_layers=2),
        {**{k: torch.randn(SAMPLES, w) for k, w in FEATURES.items()}, "growth": torch.randn(SAMPLES)},
        74,
        69,
        {"join_forward_kernel": 1, "aten.cat.default": 0},
    ),
    "encoder": Case(
        Encoder,
        {
            **tokens("tokens"),
            "token_types": torch.randint(2, (SAMPLES, 6)),
            "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0], [1] * 6]),
            "label": LABEL,
        },
        247,
        207,
        {"aten.gelu.default": 0, "aten.native_dropout.default": 0},
    ),
}


def trained(
    stage: Alone, state: list[Tensor], inputs: list[Tensor], position: Tensor, sums: list[Tensor]
) -> Sequence[Tensor]:
    """The terms of one micro-batch, whose gradients are added to the sums."""
    count = len(stage.face.parameters)
    parameters, buffers = state[:count], state[count:]
    made = stage.functions.forward(parameters, buffers, inputs, position)
    back = stage.functions.backward_input(parameters, list(made.stash), [])
    stage.functions.backward_weight(parameters, list(back.stash), sums)
    return made.terms


def stage_of(captured: Captured, hooks: Hooks) -> Alone:
    """The whole model as one stage."""
    names = [operator.name for operator in captured.graph.operators]
    roots = Roots(captured.roots, captured.train.loss.weight is None)
    return alone(captured.traced, names, SAMPLES, roots, torch.device("cpu"), hooks)


@pytest.mark.parametrize("name", CASES)
def test_a_fused_model_trains_as_before_with_fewer_kernels(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    captured = capture(model, case.batch)
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    results: list[list[Tensor]] = []
    counts: list[Counter[str]] = []
    for hooks in (Hooks(), FUSED):
        stage = stage_of(captured, hooks)
        state = [known[n].detach() for n in (*stage.face.parameters, *stage.face.buffers)]
        inputs = [case.batch[key] for key in stage.face.batch_keys]
        sums = [torch.zeros_like(known[n]) for n in stage.face.parameters]
        given = (stage, state, inputs, torch.tensor([5, 0]), sums)
        counts.append(launches(trained, *given))
        results.append([*trained(*given), *sums])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    plain, fused = (sum(count.values()) for count in counts)
    assert plain == case.plain and fused <= case.fused, (plain, fused)
    for kernel, number in case.kernels.items():
        assert counts[1][kernel] == number, kernel
