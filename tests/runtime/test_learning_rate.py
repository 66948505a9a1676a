import pytest
import torch
from torch import nn

from gpp.runtime.learning_rate import WarmUpCosine


def test_up_in_a_line_and_down_in_half_a_cosine() -> None:
    factor = WarmUpCosine(4, 11, least=0.1)
    assert [factor(i) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(7) == pytest.approx(0.55) and factor(10) == pytest.approx(0.1)
    assert factor(50) == pytest.approx(0.1)
    values = [factor(i) for i in range(4, 11)]
    assert values == sorted(values, reverse=True)


def test_as_torch_takes_it() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmUpCosine(1, 3))
    seen = []
    for _ in range(3):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([1.0, 2.0, 0.0])


def test_impossible_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="they are -1, 3 and 0"):
        WarmUpCosine(-1, 3)
