import pytest
import torch

from gpp.capture.capture import capture
from gpp.models.case_study import CaseStudy
from gpp.runtime.synthetic import vectors


def tiny(branches: int = 2) -> CaseStudy:
    torch.manual_seed(0)
    return CaseStudy(branches=branches, layers=2, hidden=8, heads=2, ffn=16, classes=3)


def test_results_are_means_over_samples() -> None:
    data = vectors(50, branches=2, sequence=5, hidden=8, classes=3)
    given = data.read(range(6), data.keys)
    assert given["vectors_1"].shape == (6, 5, 8)
    model = tiny().double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    loss, metrics = model(**given)
    alone = [model(**{key: value[i : i + 1] for key, value in given.items()}) for i in range(6)]
    torch.testing.assert_close(loss, torch.stack([x[0] for x in alone]).mean(), rtol=0, atol=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(sum(x[1]["accuracy"].item() for x in alone) / 6)


def test_a_layer_is_an_attention_and_two_linear_layers() -> None:
    data = vectors(8, branches=3, sequence=5, hidden=8, classes=3)
    graph = capture(tiny(3), data.read(range(4), data.keys)).graph
    layer = ("attention.qkv", "attention", "attention.out", "ffn.0", "ffn.2")
    expected = [f"branches.{b}.{n}.{part}" for b in range(3) for n in range(2) for part in layer]
    assert [op.name for op in graph.operators] == [*expected, "head"]
    sources = [i for i, before in enumerate(graph.predecessors) if not before]
    assert sources == [0, 10, 20] and len(graph.predecessors[30]) == 3


def test_no_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one branch, it has 0"):
        tiny(0)
