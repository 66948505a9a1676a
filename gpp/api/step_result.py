"""What a training step comes to for its user."""

from collections.abc import Mapping
from dataclasses import dataclass

from gpp.runtime.nonfinite import NonFiniteError, Verdict
from gpp.runtime.trainer import StepRecord


@dataclass(frozen=True)
class StepResult:
    """One training step. `loss` and `metrics` are of the whole mini-batch, on rank 0 (elsewhere None and
    empty); `norm`, the gradients' global norm, on every rank with a stage if it was asked for. Seconds.
    `skipped` says, on all ranks, why nothing has moved in the step: it was not finite."""

    loss: float | None
    metrics: Mapping[str, float]
    norm: float | None
    seconds: float | None
    skipped: str | None = None


def step_result(record: StepRecord | None, norm: float | None, skipped: str | None) -> StepResult:
    """Of the record that rank 0 has."""
    if record is None:
        return StepResult(None, {}, norm, None, skipped)
    return StepResult(record.loss, record.metrics, record.norm, record.seconds, skipped)


def reason_to_skip(verdict: Verdict | None) -> str | None:
    """Why the last step was skipped, None if it was not. Raises NonFiniteError where training ends."""
    if verdict is None:
        return None
    if verdict.ends:
        raise NonFiniteError(f"{verdict.reason}. Weights and optimizer are as they were before this step")
    return verdict.reason
