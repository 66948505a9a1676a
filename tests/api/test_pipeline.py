"""The Python API in one process: the ranks are threads."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from gpp.api.crew import Crew, RefusedError
from gpp.api.plan import machine, plan
from gpp.api.start import pipeline
from gpp.capture.export import CaptureError
from gpp.plan import PlanError
from gpp.runtime.data import Batches, DataError
from gpp.runtime.loopback import LoopbackWorld
from tests.equality.models import Chain, batch
from tests.thorough import thorough

from . import scenes
from .models import adam, expected, in_stages, ranked, rows

ONCE = (
    "padded-clipped",
    "replicas-1-2-1-clipped",
    "dropout-replicas",
    "ema-sharded",
    "chain-two-on-a-device",
)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ONCE else pytest.param(name, marks=thorough)
        for names in scenes.EQUAL.values()
        for name in names
    ],
)
def test_equal_to_the_reference(name: str) -> None:
    torch.set_num_threads(1)
    scenes.equal_to_the_reference(scenes.BY_NAME[name])


@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1, 1), (1, 2, 4)])
def test_predictions_are_in_order(replicas: tuple[int, ...]) -> None:
    scenes.predictions_in_order(replicas)


def test_predictions_under_autocast() -> None:
    model, given = ranked(), [rows(8, 1)]
    with torch.autocast("cpu"):
        _, predictions = expected(model, given)
    with in_stages(model, ("a",), ("b",), ("",), replicas=(1, 2, 1), precision="bf16") as pipe:
        values = pipe.predict(given)
    for name, value in predictions.items():
        assert values[name].dtype == value.dtype
        torch.testing.assert_close(values[name], value, rtol=1e-2, atol=1e-2)


def test_wrong_batches_are_refused() -> None:
    assert scenes.refusals() == [
        "the batch has no key 'y'; it has 'x', 'w'",
        "batch key 'x' must have 8 samples, it has 7",
        "batch key 'y' must have 8 samples, it has 7",
        "batch key 'x' must be torch.float32, as the example batch was, it is torch.float64",
        "batch key 'w' must have the shape (samples, 8), it has (8, 5)",
        "batch key 'y' must be a tensor, it is list",
        *("batch key 'x' must be torch.float32, as the example batch was, it is torch.float64",) * 2,
    ]


def test_it_plans_by_itself() -> None:
    scenes.planned_by_arguments()


def test_one_device_is_enough() -> None:
    model = Chain()
    with pipeline(
        model, batch(model, 4, 0, torch.float32), optimizer=adam, mini_batch=8, devices=1, device="cpu"
    ) as pipe:
        assert pipe.plan.stage_graph.depth == 1
        loss = pipe.step(batch(model, 8, 1, torch.float32)).loss
        assert loss == pytest.approx(float(model(**batch(model, 8, 1, torch.float32))[0].detach()), rel=1e-6)
        scenes.untold_predictions(pipe)
        with pytest.raises(RefusedError, match="must have 8 samples, it has 4"):
            pipe.step(batch(model, 4, 0, torch.float32))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"devices": 0}, RefusedError, "devices must be from 1"),
        ({"devices": 2, "cluster": machine(3)}, RefusedError, "must be of as many devices, they are of 2, 3"),
        ({"planner": "nobody"}, PlanError, "there is no planner 'nobody'"),
        ({"planner": "sequential", "recompute": True}, PlanError, "has no choice 'recompute'"),
        ({"micro_batch": 3}, PlanError, "does not divide"),
        ({"transport": "auto"}, RefusedError, "transport must be one of host, device, it is 'auto'"),
        ({"device": "gpu"}, RefusedError, "device must be one of auto, cpu, cuda, it is 'gpu'"),
        ({"ema": 1.5}, RefusedError, "ema, the decay of the moving average, must be between 0 and 1"),
        ({"clip_norm": -1.0}, RefusedError, "clip_norm, the largest norm of the gradients, must be above 0"),
        ({"schedule": "gpipe"}, RefusedError, "schedule must be a gpp.plan.Policy, as Policy"),
        ({"precision": "fp16"}, RefusedError, "precision must be one of fp32, bf16, it is 'fp16'"),
        (
            {"plan": lambda captured: None, "planner": "piper", "clipnorm": 1},
            RefusedError,
            "with plan= nothing is planned: leave out planner, clipnorm",
        ),
        (
            {"plan": lambda captured: plan(captured, 8), "precision": "bf16"},
            PlanError,
            "the plan is for float32, precision='bf16' computes in bfloat16",
        ),
        ({"transport": "device"}, RefusedError, 'stages run on cpu without MPI: use transport="host"'),
    ],
)
def test_what_cannot_be(more: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipeline(ranked(), rows(4), **{"optimizer": adam, "mini_batch": 8, "device": "cpu", **more})


def test_leaving_is_an_error_where_others_wait() -> None:
    crew = Crew(LoopbackWorld(2).communicators[1])
    with pytest.raises(RuntimeError, match=r"something called sys\.exit\(3\) while other ranks wait"):
        crew.run(lambda comm: sys.exit(3))


def test_an_example_is_at_least_four_samples() -> None:
    with pytest.raises(CaptureError, match=r"at least 4 samples of every key.*'x' has the shape \(3, 8\)"):
        pipeline(ranked(), rows(3), optimizer=adam, mini_batch=8, device="cpu")


class Mixing(nn.Module):
    """Its prediction holds every sample against every other."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.a, self.transposed = nn.Linear(8, 3), transposed

    def forward(self, x, w, y):
        z = self.a(x)
        wrong = z.T if self.transposed else z - z.mean(0)
        return nn.functional.cross_entropy(z, y) + 0 * w.mean(), {}, {"wrong": wrong}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_prediction_is_of_each_sample(transposed: bool) -> None:
    with pytest.raises(CaptureError, match=r"the prediction 'wrong' of Mixing.forward is no value for each"):
        pipeline(Mixing(transposed), rows(4), optimizer=adam, mini_batch=8, device="cpu")


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x, y):
        return nn.functional.mse_loss(self.b(torch.tanh(self.a(x))).mean((1, 2)), y)


def test_a_batch_may_be_laid_out_as_it_likes() -> None:
    torch.manual_seed(1)
    model = Steps()
    batch = {"x": torch.randn(5, 8, 8).transpose(0, 1), "y": torch.randn(8)}
    with pipeline(model, batch, optimizer=adam, mini_batch=8, micro_batch=2, device="cpu") as pipe:
        expected = float(model(**batch).detach())
        assert pipe.evaluate([batch])["loss"] == pytest.approx(expected, rel=1e-6)
        assert pipe.step(batch).loss == pytest.approx(expected, rel=1e-6)


class Growing:
    """Later samples are longer."""

    keys = ("x", "y")

    def __len__(self) -> int:
        return 32

    def read(self, indices, keys):
        length = 5 if max(indices) < 16 else 6
        made = {"x": torch.ones(len(indices), length, 8), "y": torch.ones(len(indices))}
        return {key: made[key] for key in keys}


def test_what_a_data_set_gives_is_looked_at() -> None:
    with pipeline(
        Steps(), Growing().read(range(4), ("x", "y")), optimizer=adam, mini_batch=8, device="cpu"
    ) as pipe:
        with pytest.raises(DataError, match=r"key 'x' must have the shape \(samples, 5, 8\), it has"):
            pipe.evaluate_dataset(Growing())
        with pytest.raises(RefusedError, match="a step takes 8 samples, the batches have 4"):
            pipe.fit(Growing(), Batches(32, 4, 0), 1)


class Remembering(nn.Module):
    """oneDNN's LSTM, which cannot be cut, returns another type under autocast than the steps of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(16, 2)

    def forward(self, x, s, y):
        read = self.a(s)[0][:, -1]
        return functional.mse_loss(self.c(torch.cat([self.b(x), read], 1)).float(), y)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_recurrent_branch_trains_under_autocast(devices: int) -> None:
    torch.manual_seed(0)
    model = Remembering()
    samples = {"x": torch.randn(8, 8), "s": torch.randn(8, 5, 4), "y": torch.randn(8, 2)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pipeline(
        model,
        samples,
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        mini_batch=8,
        micro_batch=4,
        planner="graphpipe",
        precision="bf16",
        device="cpu",
        devices=devices,
    ) as pipe:
        assert len(pipe.plan.stage_graph.stages) == devices
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**samples)
            loss.backward()
            optimizer.step()
            assert pipe.step(samples).loss == pytest.approx(loss.item(), rel=1e-2)
        assert pipe.evaluate([samples])["loss"] == pytest.approx(model(**samples).item(), rel=1e-2)
