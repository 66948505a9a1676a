"""Whole models through capture, verify and the three graphs of each stage, against autograd uncut."""

import pytest
import torch

from .models import MODELS
from .stitched import (
    assert_same,
    assert_stash,
    captured_and_verified,
    plan_of,
    programs,
    run_stages,
    run_uncut,
    state_of,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODELS)
def test_stages_are_bit_equal_to_autograd(name: str) -> None:
    model, make = MODELS[name]
    batch = make(4)
    built = model()
    captured = captured_and_verified(built, batch)
    values = state_of(built)
    everything = list(range(len(captured.graph.operators)))
    for size, groups in [(3, None), (3, [everything])] + [(1, None)] * (not captured.coupled):
        part = {k: v[:size] for k, v in batch.items()}
        stages = programs(captured, plan_of(captured, groups, size), size)
        found = run_stages(stages, values, part, step=2, first=5)
        # oneDNN's fused LSTM is what eager takes; stages are traced without it, as it cannot be cut
        with torch.backends.mkldnn.flags(enabled=name != "Recurrent"):
            assert_same(found, run_uncut(captured, values, part, step=2, first=5))
        assert_stash(stages, values, found)


def test_unused_parameters_have_no_gradient() -> None:
    model, make = MODELS["Unused"]
    built, batch = model(), make(4)
    captured = captured_and_verified(built, batch)
    values = state_of(built)
    stages = programs(captured, plan_of(captured, None, 4), 4)
    found = run_stages(stages, values, batch)
    assert set(found.gradients) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    owned = {n for s in stages for n in s.parameters}
    assert "probe.weight" in owned and "frozen.weight" in owned and "unread.weight" not in owned
    probe = next(op for op in captured.graph.operators if op.name == "probe")
    assert not probe.backward_weight.flops and not probe.backward_input.flops
