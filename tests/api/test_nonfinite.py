"""Steps whose loss or gradients are not finite: what is said of them, and that nothing has moved."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpp.api.checkpoints import Checkpoints
from gpp.api.crew import RefusedError
from gpp.api.pipeline import Pipeline
from gpp.checkpoint.folder import newest
from gpp.runtime.data import Batches
from gpp.runtime.nonfinite import NonFiniteError
from tests.thorough import thorough

from .fragile import Bad, Weighted, fragile, in_stages, rows

DIAMOND = (("base", "norm"), ("a",), ("b",), ("",))
LAYOUTS = {
    "replicas": {"replicas": (2, 1, 2, 1)},
    "zero bubble": {"policy": "zero-bubble", "lags": (0, 2, 1, 2), "recompute": (1,)},
    "plain": {},
    "shared": {"chained": True, "slots": (0, 0, 1, 0)},
}
ALWAYS = ("replicas", "zero bubble")
BROKEN = {
    "x": ((5, math.nan), r"key 'x' of the batch holds NaN in sample 5 of the mini-batch \(stage 0 "),
    "y": ((2, math.inf), r"key 'y' of the batch holds infinity in sample 2 of the mini-batch \(stage 3 "),
    "shift": (
        (6, -9.0),
        r"operator b \(fragile.py:\d+: right = torch.log\(.*: aten.log.default was the first to make NaN, in "
        r"the forward of stage 2 .*, samples (4|6) to 7 of the mini-batch, of finite values",
    ),
    "scale": (
        (1, 0.0),
        r"operator a \(fragile.py:\d+: left = left / .*: aten.div.Tensor was the first to make infinity, in "
        r"the backward of stage 1 .*, samples 0 to [13] of .* it became NaN in operator a",
    ),
    "heat": (
        (4, 99.0),
        r"fragile.py:\d+: guess = self.head.*aten.exp.default was the first to make infinity, in the forward "
        r"of stage 3 .*, samples 4 to",
    ),
    "mask": (
        (3, 0.0),
        r"fragile.py:\d+: right = .*: aten._softmax.default was the first to make NaN, in the forward of "
        r"stage 3 .*, of infinite values, put there by aten.masked_fill.Scalar of operator head",
    ),
}


def tensors(pipe: Pipeline) -> dict[str, Tensor]:
    """Everything that a step moves, by rank and name."""
    found = {}
    for rank, state in pipe._states().items():
        if state is None:
            continue
        kept = {f"optimizer {n} {k}": v for n, p in state.parameters.items() for k, v in kept_of(state, p)}
        for kind in (state.parameters, state.buffers, state.averages, kept, state.gradients):
            found |= {f"{rank} {id(kind)} {n}": v.detach().clone() for n, v in kind.items()}
        found[f"{rank} rate"] = torch.tensor(state.learning_rate)
    return found


def kept_of(state, parameter: nn.Parameter) -> list[tuple[str, Tensor]]:
    return list(state.optimizer.state.get(parameter, {}).items())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("layout", [n if n in ALWAYS else pytest.param(n, marks=thorough) for n in LAYOUTS])
def test_the_first_operator_is_named_and_nothing_moves(layout: str) -> None:
    more = {"on_nonfinite": "skip", "ema": 0.9, "max_skips": 20, "case": LAYOUTS[layout]}
    more["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    batches = [rows(8, seed) for seed in range(2)]
    with in_stages(fragile(norm=layout == "zero bubble"), *DIAMOND, **more) as pipe:
        pipe.step(batches[0])
        before = list(tensors(pipe).values())
        for key, (broken, words) in BROKEN.items():
            with pytest.warns(RuntimeWarning, match="Nothing has moved"):
                result = pipe.step(rows(8, 7, **{key: broken}))
            assert result.skipped is not None and re.search(words, result.skipped), (key, result.skipped)
            assert key == "scale" or not math.isfinite(result.loss)
            assert same(before, list(tensors(pipe).values())), key
        pipe.step(batches[1])
        assert pipe.skipped == len(BROKEN) and pipe.steps == 2 + len(BROKEN)
        after = list(tensors(pipe).values())
    with in_stages(fragile(norm=layout == "zero bubble"), *DIAMOND, **more) as pipe:
        for batch in batches:
            assert pipe.step(batch).skipped is None
        assert same(after, list(tensors(pipe).values()))


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=thorough)])
def test_training_stops_and_the_pipeline_is_as_it_was(devices: int) -> None:
    stages = (*DIAMOND[:1], ("",)) if devices == 2 else (("",),)
    with in_stages(fragile(), *stages, clip_norm=1.0) as pipe:
        for _ in range(2):
            before = list(tensors(pipe).values())
            with pytest.raises(NonFiniteError, match=r"step 0: the loss is nan and .* as they were before"):
                pipe.step(rows(8, 0, shift=(0, -9.0)))
            assert pipe.steps == 0 and same(before, list(tensors(pipe).values()))
        assert math.isfinite(pipe.step(rows(8)).loss)
        assert pipe.evaluate([rows(8, 0, shift=(0, -9.0))])["loss"] != 0  # not a number, and no error


@thorough
def test_a_parameter_that_is_not_finite() -> None:
    model = fragile()
    with torch.no_grad():
        model.b.weight[0, 0] = math.inf
    with in_stages(model, *DIAMOND) as pipe:
        with pytest.raises(
            NonFiniteError, match=r"parameter b.weight of stage 2 \(b\) on rank 2 held infinity"
        ):
            pipe.step(rows(8))


def test_weights_that_add_up_to_nothing() -> None:
    with in_stages(Weighted(), ("a",), ("",)) as pipe:
        pipe.step({k: v for k, v in rows(8).items() if k in ("x", "w")})
        nothing = {"x": rows(8)["x"], "w": torch.zeros(8, 1)}
        with pytest.raises(NonFiniteError, match="step 1: the weights of the loss add up to 0"):
            pipe.step(nothing)


@thorough
def test_sums_that_overflow_where_no_operator_does() -> None:
    """Gradients of two micro-batches, or of two replicas."""
    for case, words in (
        ({}, r"aten.add_.Tensor was the first to make infinity, in the backward of stage 1"),
        (
            {"replicas": (1, 2)},
            "operator by operator, everything was finite: a sum over micro-batches, replicas",
        ),
    ):
        with in_stages(Weighted(), ("a",), ("",), case=case) as pipe:
            batch = {"x": rows(8)["x"], "w": torch.full((8, 1), 1e-30)}
            batch["w"][[0, 2 if case else 4]] = 3e38
            with pytest.raises(NonFiniteError, match=words):
                pipe.step(batch)


def trained(
    folder: Path | None, until: int, begin: int = 0, wrong: tuple[int, ...] = (3, 20), **more
) -> tuple[Pipeline, list[float]]:
    """A run over bad data, with checkpoints: its pipeline and the learning rates."""
    rates: list[float] = []
    make = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    with in_stages(fragile(), *DIAMOND[:1], ("",), lr_scheduler=make, **more) as pipe:
        kept = Checkpoints(folder=folder, every=2) if folder is not None else None
        if begin and kept is not None:
            pipe.load(kept.folder)
        pipe.fit(
            Bad(wrong),
            Batches(32, 8, 0),
            until - pipe.steps,
            lambda record: rates.append(record.learning_rate),
            checkpoints=kept,
        )
        return pipe, rates


def test_a_run_that_skips_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, rates = trained(None, 8, on_nonfinite="skip")
    wrong = [bool({3, 20} & set(Batches(32, 8, 0).at(step))) for step in range(8)]
    assert whole.skipped == sum(wrong) > 1 and any(wrong[:4])
    assert rates == [1e-2 * 0.5 ** (step - sum(wrong[:step])) for step in range(8)]
    half, first = trained(tmp_path, 4, on_nonfinite="skip")
    rest, second = trained(tmp_path, 8, begin=4, on_nonfinite="skip")
    assert half.skipped and rest.skipped == whole.skipped
    assert first + second == rates
    assert same(list(tensors(whole).values()), list(tensors(rest).values()))


def test_a_run_that_stops_keeps_its_checkpoints(tmp_path: Path) -> None:
    wrong = int(Batches(32, 8, 0).at(3)[0])
    with pytest.raises(NonFiniteError, match=r"step 3: .*key 'x' of the batch holds NaN in sample 0 of"):
        trained(tmp_path, 8, wrong=(wrong,))
    kept, _ = newest(tmp_path)
    assert kept is not None and kept.manifest.step == 3


def test_too_many_in_a_row() -> None:
    bad = rows(8, 0, x=(0, math.nan))
    with in_stages(fragile(), ("",), on_nonfinite="skip", max_skips=2) as pipe:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in (bad, bad, rows(8), bad, bad):
                pipe.step(batch)
        with pytest.raises(NonFiniteError, match="step 5: 3 steps in a row are not finite; the loss is nan"):
            pipe.step(bad)
        assert pipe.skipped == 4


@pytest.mark.parametrize("more", [{"on_nonfinite": "ignore"}, {"max_skips": 0}])
def test_other_choices_are_refused(more: dict) -> None:
    with pytest.raises(RefusedError, match=f"{next(iter(more))}.* must be"):
        in_stages(fragile(), *DIAMOND, **more)
