"""What holds of a pipeline alone and on the ranks of an MPI job: each scene is run by all ranks together."""

import math
import os
import sys
import warnings

import pytest
import torch

from gpp.api.crew import RefusedError
from gpp.api.pipeline import Pipeline
from gpp.api.start import pipeline
from gpp.capture.capture import Captured
from gpp.plan import Plan
from gpp.runtime.agreement import DisagreementError
from gpp.runtime.data import Batches
from gpp.runtime.nonfinite import NonFiniteError
from tests.equality.cases import CASES, Case
from tests.equality.harness import (
    STEPS,
    captured_model,
    closely,
    exactly,
    make_plan,
    prepare,
    ragged,
    reference,
)
from tests.equality.models import batch

from .fragile import Bad, fragile
from .fragile import in_stages as in_pieces
from .fragile import rows as fragile_rows
from .models import adam, expected, in_stages, ranked, rows

EQUAL = {  # names of cases by the ranks that they need
    2: ("chain-2", "data-parallel"),
    3: ("two-towers", "tied", "batch-norm", "padded-clipped"),
    4: ("replicas-1-2-1-clipped", "dropout-replicas", "ema-tied", "chain-two-on-a-device"),
    6: ("ema-sharded",),
}
ON_PROCESSES = {3: ("padded-clipped",), 4: ("replicas-1-2-1-clipped", "ema-tied")}
BY_NAME = {case.name: case for case in CASES}


def equal_to_the_reference(case: Case) -> None:
    """Losses, metrics, norms, evaluation and weights are the reference's."""
    ready = prepare(case)
    single, steps, evaluation, averaged = reference(ready)
    same = exactly if case.exact else closely

    def plan(captured: Captured) -> Plan:
        return make_plan(case, captured)

    with pipeline(
        captured_model(case.model, case.dtype, case.precision, case.freeze)[0],
        batch(ready.model, 4, 0, case.dtype),
        optimizer=case.make_optimizer,
        mini_batch=case.samples,
        plan=plan,
        devices=case.ranks,
        clip_norm=case.clip,
        ema=case.ema,
        seed=5,
        device="cpu",
        verify=False,
    ) as pipe:
        for number in range(STEPS):
            found = pipe.step(ready.batches[number])
            if pipe.is_first:
                assert found.loss is not None
                assert abs(found.loss - steps[number].loss) <= 1e-6 * abs(steps[number].loss)
                assert found.metrics.keys() == steps[number].metrics.keys()
                if case.clip is not None:
                    same(torch.tensor(found.norm), torch.tensor(steps[number].norm), "norm")
        parts = [{k: v[s:t] for k, v in ready.held_out.items()} for s, t in ragged(case.samples)]
        ways = [(evaluation, False)] + ([(averaged, True)] if case.ema is not None else [])
        for values, way in ways:
            results = pipe.evaluate(parts, averaged=way)
            assert results.keys() == (values.keys() if pipe.is_first else set())
            for name in results:
                assert abs(results[name] - values[name]) <= 1e-6 * abs(values[name]), name
        weights = pipe.state_dict()
        averages = pipe.state_dict(averaged=True)
        again = pipe.state_dict()
        if not pipe.is_first:
            assert weights == {}
            return
        assert list(weights) == list(ready.model.state_dict())
        for name, value in {**single.parameters, **single.buffers}.items():
            if name in weights:
                same(weights[name], value.detach(), name)
                exactly(again[name], weights[name], name)
        for name, value in (single.averages if case.ema is not None else {}).items():
            same(averages[name], value, name)
        ready.model.__class__().to(case.dtype).load_state_dict(weights)


def predictions_in_order(replicas: tuple[int, ...]) -> None:
    """Predictions and evaluation before a step, and after, are the module's own."""
    model, given = ranked(), [rows(13, 1), rows(3, 2), rows(21, 3)]
    with in_stages(model, ("a",), ("b",), ("",), replicas=replicas) as pipe:
        for step in range(2):
            results, predictions = expected(model, given)
            found = pipe.evaluate(given)
            values = pipe.predict(iter(given))
            if pipe.is_first:
                assert found == pytest.approx(results, rel=1e-6)
                assert list(values) == ["score", "left", "label"]
                for name, value in predictions.items():
                    assert values[name].dtype == value.dtype
                    torch.testing.assert_close(values[name], value)
            else:
                assert found == {} and values == {}
            pipe.step(rows(8, step))
            weights = pipe.state_dict()
            if pipe.is_first:
                model.load_state_dict(weights)


def refusals() -> list[str]:
    """Wrong batches are refused with the same sentence on every rank, and training goes on; returns them."""
    good = rows(8)
    wrong = {
        "no key": {k: v for k, v in good.items() if k != "y"},
        "too few": rows(7),
        "one too few": {**good, "y": good["y"][:7]},
        "dtype": {**good, "x": good["x"].double()},
        "shape": {**good, "w": good["w"][:, :5]},
        "no tensor": {**good, "y": [0] * 8},
    }
    said = []
    with in_stages(ranked(), ("a",), ("b",), ("",), replicas=(1, 1, 1)) as pipe:
        before = pipe.step(good).loss
        for batch in wrong.values():
            with pytest.raises(RefusedError) as error:
                pipe.step(batch)
            said.append(str(error.value))
        for work in (pipe.evaluate, pipe.predict):
            with pytest.raises(RefusedError) as error:
                work([rows(5), wrong["dtype"]])
            said.append(str(error.value))
        after = pipe.step(good).loss
        assert (before is None) == (after is None)
        assert before is None or before != after
        only_own = {key: good[key] for key in pipe.keys}
        pipe.step({**only_own, "unknown": torch.zeros(1)})
    return said


def unequal_batches(rank: int) -> None:
    """Ranks that give other numbers of batches, or batches of other sizes, are all told so; what a rank does
    not read it may leave out."""
    with in_stages(ranked(), ("a",), ("b",), ("",), replicas=(1, 1, 1)) as pipe:
        own = {key: value for key, value in rows(5).items() if key in pipe.keys}
        assert len(own) == 1
        pipe.evaluate([own, {**own}])
        with pytest.raises(RefusedError, match="of number 1 they have 5 samples, none, 5 samples"):
            pipe.evaluate([rows(5)] * (1 if rank == 1 else 2))
        with pytest.raises(RefusedError, match="of number 0 they have 5 samples, 5 samples, 4 samples"):
            pipe.predict([rows(4 if rank == 2 else 5)])


def unequal_arguments(rank: int) -> None:
    """Ranks that are asked for other things are all told so; what a pipeline has opened it closes."""
    hook, files = sys.excepthook, len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        in_stages(ranked(), ("a",), ("b",), ("",), replicas=(1, 1, 1)).close()
    assert sys.excepthook is hook and len(os.listdir("/proc/self/fd")) <= files + 1
    with pytest.raises(DisagreementError, match=r"pipeline's mini_batch, clip_norm, .* on ranks 0, 2"):
        pipeline(ranked(), rows(4), optimizer=adam, mini_batch=8, device="cpu", clip_norm=1.0 + (rank == 1))


def untold_predictions(pipe: Pipeline) -> None:
    with pytest.raises(RefusedError, match="forward returns no predictions"):
        pipe.predict([])


def planned_by_arguments() -> None:
    """The pipeline plans by itself, and says what happened when."""
    with pipeline(
        ranked(), rows(4), optimizer=adam, mini_batch=16, planner="graphpipe", log_norm=True, device="cpu"
    ) as pipe:
        assert pipe.plan.planner == "graphpipe" and pipe.plan.mini_batch == 16
        results = [pipe.step(rows(16)) for _ in range(4)]
        trace = pipe.trace()
        if pipe.is_first:
            losses = [r.loss for r in results]
            assert losses[-1] < losses[0]
            assert all(r.norm > 0 and r.seconds > 0 for r in results)
            assert {span.step for span in trace.spans} == {1, 2, 3}
            assert len(pipe.peak_memory()) == trace.ranks
        else:
            pipe.peak_memory()


def steps_left_out(rank: int) -> list[str]:
    """A step that is not finite is skipped, in a stretch too, or ends it, on all ranks, also without work."""
    said = []
    bad, good = fragile_rows(8, 0, shift=(5, -9.0)), fragile_rows(8)
    stages = ("base", "a"), ("",)
    with in_pieces(fragile(), *stages, on_nonfinite="skip") as pipe:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said.append(pipe.step(bad).skipped or "")
        pipe.fit(Bad((3, 20)), Batches(32, 8, 0), 8)
        assert pipe.skipped > 2
        loss = pipe.step(good).loss
        assert (loss is not None and math.isfinite(loss)) == (rank == 0)
    with in_pieces(fragile(), *stages, clip_norm=1.0) as pipe:
        with pytest.raises(NonFiniteError) as error:
            pipe.step(bad)
        said.append(str(error.value))
        with pytest.raises(NonFiniteError, match="key 'x' of the batch holds NaN"):
            pipe.fit(Bad((3, 20)), Batches(32, 8, 0), 8)
        assert pipe.step(good).skipped is None
    assert all("aten.log.default" in text for text in said), said
    return said
