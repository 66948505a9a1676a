import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from gpp.models.mmt import PADDING, Attention, MultiModalTransformer, TokenEmbedding

LENGTHS = {"name": 5, "signature": 7, "docstring": 6, "body": 9}


def tiny(lengths: dict[str, int] = LENGTHS, **changes: object) -> MultiModalTransformer:
    torch.manual_seed(0)
    sizes = {"layers": 2, "hidden": 8, "heads": 2, "ffn": 16, "classes": 3, "trigrams": 13} | changes
    return MultiModalTransformer(lengths, **sizes)


def random_batch(samples: int, lengths: dict[str, int] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {k: torch.randint(0, 256, (samples, n), generator=generator) for k, n in lengths.items()}
    return batch | {"label": torch.randint(0, 3, (samples,), generator=generator)}


def test_results_are_means_over_samples_that_do_not_see_each_other() -> None:
    model, batch = tiny().double(), random_batch(6)
    loss, metrics = model(**batch)
    alone = [model(**{key: value[i : i + 1] for key, value in batch.items()}) for i in range(6)]
    torch.testing.assert_close(loss, torch.stack([x[0] for x in alone]).mean(), rtol=0, atol=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(sum(x[1]["accuracy"].item() for x in alone) / 6)
    assert {x[1]["accuracy"].item() for x in alone} <= {0.0, 1.0}


def test_every_module_keeps_samples_in_dimension_0() -> None:
    model = tiny()
    shapes: list[torch.Size] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            shapes.append(output.shape)

    for module in model.modules():
        module.register_forward_hook(note)
    model(**random_batch(5))
    assert len(shapes) > 40
    assert all(shape[0] == 5 for shape in shapes)


def test_every_parameter_gets_a_gradient_and_a_batch_is_learnt() -> None:
    model, batch = tiny(), random_batch(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(**batch)[0].item()
    for _ in range(40):
        loss, metrics = model(**batch)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["accuracy"].item() == 1.0
    assert loss.item() < first / 4


def test_an_empty_modality_says_nothing() -> None:
    model, batch = tiny(), random_batch(4)
    batch["docstring"].fill_(PADDING)
    branch = model.branches["docstring"]
    encoded = branch(batch["docstring"])
    assert torch.equal(encoded, branch.out(branch.norm.bias).expand(4, -1))
    loss = model(**batch)[0]
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_padding_is_left_out_of_the_mean() -> None:
    branch = tiny(layers=0).branches["name"].double()
    tokens = torch.tensor([[9, 8, 7, PADDING, PADDING]])
    expected = branch.out(branch.norm(branch.embedding(tokens)[:, :3].mean(1)))
    torch.testing.assert_close(branch(tokens), expected)


def test_trigrams_are_the_token_and_the_next_two() -> None:
    embedding = TokenEmbedding(4, 2, 256, 11)
    tokens = torch.tensor([[3, 200, 5, 0], [1, 1, 1, 1]])
    rows = [
        [(3 << 16 | 200 << 8 | 5) % 11, (200 << 16 | 5 << 8) % 11, (5 << 16) % 11, 0],
        [(1 << 16 | 1 << 8 | 1) % 11] * 2 + [(1 << 16 | 1 << 8) % 11, (1 << 16) % 11],
    ]
    expected = embedding.token(tokens) + embedding.position + embedding.trigram(torch.tensor(rows))
    torch.testing.assert_close(embedding(tokens), expected)
    assert TokenEmbedding(1, 2, 256, 11)(tokens[:, :1]).shape == (2, 1, 2)


def test_attention_is_the_textbook_formula() -> None:
    attention = Attention(6, 3).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    query, key, value = attention.qkv(x).split(6, dim=-1)
    heads = []
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        scores = query[..., part] @ key[..., part].mT / 2**0.5
        heads.append(scores.softmax(-1) @ value[..., part])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, -1)))


def test_dropout_is_random_in_training_alone() -> None:
    model, batch = tiny(dropout=0.5), random_batch(4)
    assert model(**batch)[0] != model(**batch)[0]
    model.eval()
    assert model(**batch)[0] == model(**batch)[0]
    assert not any(isinstance(m, nn.Dropout) for m in tiny().modules())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lengths", [LENGTHS, {"name": 5, "body": 9}], ids=["four", "two"])
def test_it_exports_with_any_number_of_samples(device: str, lengths: dict[str, int]) -> None:
    with torch.device(device):
        model = tiny(lengths, layers=1)
    batch = {key: value.to(device) for key, value in random_batch(4, lengths).items()}
    samples = Dim("batch", min=2)
    for training in (True, False):
        shapes = {key: {0: samples} for key in batch}
        program = export(model.train(training), (), kwargs=batch, dynamic_shapes=shapes)
        assert len(program.range_constraints) == 1
    if device == "cpu":
        other = random_batch(7, lengths)
        torch.testing.assert_close(program.module()(**other), model(**other))


def test_the_papers_size_needs_no_memory_on_the_meta_device() -> None:
    with torch.device("meta"):
        lengths = dict.fromkeys(MultiModalTransformer.modalities, 256)
        model = MultiModalTransformer(lengths, layers=8, hidden=1024, heads=16, ffn=4096, classes=16)
    layer = sum(p.numel() for p in model.branches["body"].layers[0].parameters())
    assert layer == 12 * 1024**2 + 13 * 1024
    branch = 8 * layer + (256 + 256) * 1024 + 2 * 1024 + 1024 * 1025  # layers, tables, norm, out
    assert sum(p.numel() for p in model.parameters()) == 4 * branch + (4 * 1024 + 1) * 16
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("lengths", [{}, {"name": 4, "path": 4}])
def test_unknown_modalities_are_refused(lengths: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="some of name, signature, docstring, body"):
        tiny(lengths)


def test_a_batch_must_have_the_modalities_of_the_branches() -> None:
    batch = random_batch(4)
    with pytest.raises(ValueError, match="the branches are name, body; given are name, signature"):
        tiny({"name": 5, "body": 9})(**batch)
    del batch["name"]
    with pytest.raises(ValueError, match="given are signature, docstring, body"):
        tiny()(**batch)


def test_heads_divide_the_hidden_size() -> None:
    with pytest.raises(ValueError, match="3 heads, hidden size 8"):
        tiny(heads=3)
