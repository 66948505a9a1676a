"""Measured costs: sums of operators agree with whole stages, and nothing is measured twice."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture import profile as room
from gpp.capture.capture import Captured, capture
from gpp.capture.profile import Measurement, profile, where
from gpp.cost import CostError, costs_from_json, costs_to_json
from gpp.program.build import Hooks
from gpp.program.stopwatch import Times
from gpp.topology import Device

CPU = torch.device("cpu")
DEVICE = Device("d", 1e9, 1e9, 1e9)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.probe, self.last = nn.Linear(16, 3), nn.Linear(16, 3)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor):
        x = self.frozen(x)
        for layer in self.layers:
            x = layer(x).relu()
        seen = self.probe(x.detach()).argmax(-1) == y
        return F.cross_entropy(self.last(x), y), {"probe": seen.float().mean()}


def captured() -> Captured:
    torch.manual_seed(0)
    return capture(Net(), batch(4))


def batch(samples: int) -> dict[str, Tensor]:
    return {"x": torch.randn(samples, 16), "y": torch.zeros(samples, dtype=torch.int64)}


def how(cache: Path | None = None, sizes: tuple[int, ...] = (2, 8), place: str = "here") -> Measurement:
    return Measurement(
        sizes=sizes, device=CPU, where=place, hooks=Hooks(), seconds=1.0, stages=2, cache=cache
    )


class Watch:
    """In the stopwatch's place: one operator takes 1, 2 and 3 seconds a sample in its passes, a stage of
    several `shared` of what its operators take."""

    def __init__(self, shared: float = 0.5) -> None:
        self.shared, self.asked = shared, []

    def __call__(self, traced: object, names: Sequence[str], size: int, *rest: object, **more: object):
        self.asked.append((tuple(names), size))
        share = len(names) * (self.shared if len(names) > 1 else 1.0) * size
        return Times(1.0 * share, 2.0 * share, 3.0 * share)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    monkeypatch.setattr(room, "time_passes", made)
    return made


def test_sums_of_operators_are_what_whole_stages_take(watch: Watch) -> None:
    found = captured()
    made = profile(found, batch(8), how())
    whole = {(names, size) for names, size in watch.asked if len(names) > 1}
    for size in (2, 8):
        runs = [names for names, n in whole if n == size]
        assert sorted(n for run in runs for n in run) == sorted(found.graph.index)
        ops = [found.graph.operators[found.graph.index[n]] for run in runs for n in run]
        total = sum(made.table.forward(op, size, DEVICE) for op in ops)
        assert total == pytest.approx(sum(0.5 * size * len(run) for run in runs))
        back = sum(
            made.table.backward_input(op, size, DEVICE) + made.table.backward_weight(op, size, DEVICE)
            for op in ops
        )
        assert back == pytest.approx(sum(2.5 * size * len(run) for run in runs))
    assert [c.samples for c in made.corrections] == [2, 8]
    assert made.corrections[0].forward == pytest.approx(0.5)


def test_an_operator_without_a_gradient_has_no_backward(watch: Watch) -> None:
    found = captured()
    made = profile(found, batch(8), how())
    frozen = found.graph.operators[0]
    assert frozen.name == "frozen" and made.table.forward(frozen, 2, DEVICE) > 0
    assert made.table.backward_input(frozen, 2, DEVICE) == 0 == made.table.backward_weight(frozen, 2, DEVICE)


def test_the_same_work_is_measured_once(watch: Watch, tmp_path: Path) -> None:
    made = profile(captured(), batch(8), how(tmp_path))
    alone = [names[0] for names, size in watch.asked if size == 2 and len(names) == 1]
    # the first layer's input needs no gradient, the last layer's output goes along two edges
    assert alone == ["frozen", "layers.0", "layers.1", "layers.4", "probe", "last"]
    assert ("layers.1", "layers.2", "layers.3") in made.alike
    assert made.measured == made.needed == len(watch.asked)
    asked = len(watch.asked)
    again = profile(captured(), batch(8), how(tmp_path))
    assert len(watch.asked) == asked and again.measured == 0 and again.needed == made.needed
    assert again.table == made.table
    more = profile(captured(), batch(8), how(tmp_path, sizes=(2, 4, 8)))
    assert more.measured == made.needed / 2 and {size for _, size in watch.asked[asked:]} == {4}
    profile(captured(), batch(8), how(tmp_path, place="there"))
    assert len(watch.asked) == asked + more.measured + made.needed


def test_a_damaged_cache_is_measured_again(watch: Watch, tmp_path: Path) -> None:
    made = profile(captured(), batch(8), how(tmp_path))
    for i, file in enumerate(sorted(tmp_path.iterdir())):
        assert file.suffix == ".json"
        file.write_text("{" if i % 2 else '{"format": "gpp.times/1", "forward": "x"}')
    again = profile(captured(), batch(8), how(tmp_path))
    assert again.measured == made.needed and again.table == made.table
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert profile(captured(), batch(8), how(blocked)).table == made.table


@pytest.mark.parametrize("count, expected", [(1, [5]), (2, [3, 2]), (3, [2, 1, 2]), (9, [1, 1, 1, 1, 1])])
def test_runs_share_the_time(count: int, expected: list[int]) -> None:
    names = "abcde"
    runs = room._runs(names, [1, 2, 3, 1, 2], count)
    assert [len(run) for run in runs] == expected
    assert "".join(name for run in runs for name in run) == names


def test_a_real_profile(tmp_path: Path) -> None:
    """Two sizes of a tiny model on this CPU: every operator has times, and the table survives its file."""
    torch.set_num_threads(1)
    found = captured()
    made = profile(found, batch(8), how(tmp_path, place=where(CPU, "eager")))
    assert "threads, torch" in made.table.measured_on and made.table.measured_on.endswith("kernels eager")
    for op in found.graph.operators:
        assert made.table.forward(op, 2, DEVICE) > 0
        assert (made.table.backward_weight(op, 2, DEVICE) > 0) == op.has_backward
    assert all(0.05 < c.forward < 20 and 0.05 < c.backward < 20 for c in made.corrections)
    table = costs_from_json(costs_to_json(made.table))
    assert table == made.table and table.fingerprint() == made.table.fingerprint()
    table.check(found.graph)
    with pytest.raises(CostError, match="measured for another model"):
        costs_from_json(costs_to_json(made.table).replace(made.table.graph, "feed")).check(found.graph)
