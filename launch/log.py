"""What a training command prints and writes: the plan, lines while it runs, results."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import DictConfig

from gpp.plan import plan_to_json
from gpp.plan_table import plan_table
from gpp.simulate import predicted
from gpp.trace import compare, to_chrome

from .settings import own_yaml

if TYPE_CHECKING:
    from gpp.plan import Plan
    from gpp.runtime.data import Dataset
    from gpp.runtime.trainer import StepRecord
    from gpp.trace import Trace


class Log:
    """What rank 0 prints and writes while it runs; on other ranks nothing. `trains`: steps have a loss.

    `begin` is the first step, of a run that goes on: the lines of earlier ones stay in metrics.jsonl."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        every: int,
        *,
        active: bool,
        says_rate: bool = False,
        trains: bool = True,
        begin: int = 0,
    ) -> None:
        self.folder, self.steps, self.every = folder, steps, every
        self.says_rate, self.trains = says_rate, trains
        self.begin = begin
        self.last_loss: float | None = None
        self.file: IO[str] | None = None
        if active:
            metrics = folder / "metrics.jsonl"
            before = _lines_before(metrics, begin)
            fresh = folder / "metrics.jsonl.part"  # killed here, the old lines are not lost
            fresh.write_text("".join(before))
            fresh.replace(metrics)
            self.file = metrics.open("a")
            self.last_loss = json.loads(before[-1]).get("loss") if before else None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def step(self, record: "StepRecord") -> None:
        """A line of metrics.jsonl, and now and then one for the reader."""
        assert self.file is not None
        self.last_loss = record.loss if self.trains else None
        line: dict[str, Any] = {
            "step": record.step,
            **({"loss": record.loss} if self.trains else {}),
            "step_seconds": record.seconds,
            "samples_per_second": record.samples_per_second,
            **record.metrics,
        }
        if record.norm is not None:
            line["grad_norm"] = record.norm
        if record.learning_rate is not None:
            line["lr"] = record.learning_rate
        verdict = record.verdict
        if verdict is not None:
            line |= {"skipped": not verdict.ends, "reason": verdict.reason}
        self.file.write(_json(line) + "\n")
        self.file.flush()
        if verdict is not None and not verdict.ends:
            print(f"skipped {verdict.reason}", flush=True)
        if record.step % self.every == 0 or record.step == self.steps - 1:
            metrics = "".join(f"  {name} {value:.4f}" for name, value in record.metrics.items())
            if record.norm is not None:
                metrics += f"  norm {record.norm:.4g}"
            if self.says_rate and record.learning_rate is not None:
                metrics += f"  lr {record.learning_rate:.3g}"
            loss = f"loss {record.loss:.4f}" if self.trains else ""
            print(
                f"step {record.step:>5}  {loss}{metrics}  {record.seconds * 1e3:.0f} ms  "
                f"{record.samples_per_second:.0f} samples/s",
                flush=True,
            )

    def finish(
        self,
        plan: "Plan",
        trace: "Trace",
        measured: float,
        planner_seconds: float,
        memory: Sequence[int],
        results: Mapping[str, Any],
    ) -> None:
        """Hold the measured trace against the predicted one, and write both and the results."""
        prediction = predicted(plan)
        trained = self.steps > self.begin
        if trained:
            print(compare(prediction.trace, trace))
        measured_traces = [trace] if trained else []
        (self.folder / "trace.json").write_text(to_chrome(prediction.trace, *measured_traces))
        result = {
            "world_size": len(memory),
            "steps": max(self.steps, self.begin),
            "final_loss": self.last_loss,
            **results,
            "predicted_step_seconds": prediction.step_seconds,
            "measured_step_seconds": measured if trained else None,
            "planner_seconds": planner_seconds,
            "peak_memory_bytes": list(memory),
        }
        (self.folder / "result.json").write_text(_json(result, indent=1) + "\n")
        print(f"results: {self.folder}", flush=True)


def announce_plan(config: DictConfig, plan: "Plan", folder: Path) -> None:
    """Print the plan and write it, with the configuration, into a folder where an older run may have been."""
    for old in ("result.json", "trace.json"):
        (folder / old).unlink(missing_ok=True)
    (folder / "plan.json").write_text(plan_to_json(plan))
    (folder / "config.yaml").write_text(own_yaml(config))
    print(plan_table(plan))


def say_evaluation(
    held_out: "Dataset", evaluation: Mapping[str, float], averaged: Mapping[str, float]
) -> None:
    """Print what was found on the held-out samples, if there are any."""
    if not evaluation:
        return
    for what, values in (("", evaluation), (", moving average of the weights", averaged)):
        text = "".join(f"  {name} {value:.4f}" for name, value in values.items())
        if text:
            print(f"held out ({len(held_out)} samples{what}){text}")
    share = _majority(held_out)
    if share is not None:
        print(f"the most frequent label alone would be right for {share:.4f} of them")


def counted(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _json(value: Any, indent: int | None = None) -> str:
    """JSON, in which a number that is not finite (a diverged loss) is null: the format has no other way."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _lines_before(file: Path, step: int) -> list[str]:
    """The lines of the steps before one; the last that a killed run has written may be half a line."""
    found = []
    for line in file.read_text(errors="replace").splitlines(keepends=True) if step and file.is_file() else ():
        try:
            number = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(number, int) and number < step and line.endswith("\n"):
            found.append(line)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _majority(data: "Dataset") -> float | None:
    """The share of the most frequent label, if the data set has integer labels."""
    import torch

    from gpp.runtime.data import majority_share

    if "label" not in data.keys:
        return None
    first = data.read([0], ("label",))["label"]
    if first.dtype.is_floating_point or first.dim() != 1:
        return None  # found before all are read: there may be many
    return majority_share(data.read(range(len(data)), ("label",))["label"].to(torch.int64))
