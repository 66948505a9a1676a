"""python -m launch.simulate plan=path/to/plan.json: what a plan promises, without model, torch or MPI.

Prints the plan, the predicted step time, and bubble and memory of each rank; writes trace.json for
chrome://tracing or ui.perfetto.dev into the run's folder.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpp.plan import Plan, PlanError, plan_from_json
from gpp.plan_table import plan_table
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.simulate import Prediction, predicted
from gpp.trace import to_chrome

from .start import launch, refuse, run_folder


def read_plan(path: str) -> Plan:
    """The plan of a file. Raises PlanError naming the file."""
    file = Path(path)
    if not file.is_file():
        raise PlanError(f"there is no plan file {path}")
    try:
        return plan_from_json(file.read_text())
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: {error}") from None


def prediction_text(plan: Plan, prediction: Prediction) -> str:
    """Step time, and a line per rank."""
    names = {d: stage.name for stage in plan.stage_graph.stages for d in stage.devices}
    lines = [
        f"predicted step {prediction.step_seconds * 1e3:.3f} ms, "
        f"{plan.mini_batch / prediction.step_seconds:.1f} samples/s",
        f"{'rank':>4}  {'bubble':>7}  {'memory MiB':>10}  stage",
    ]
    for rank, (idle, memory) in enumerate(zip(prediction.bubble, prediction.memory, strict=True)):
        lines.append(f"{rank:>4}  {idle:>7.1%}  {memory / 2**20:>10.1f}  {names.get(rank, '(idle)')}")
    return "\n".join(lines)


def simulate(config: DictConfig, _: Any) -> None:
    """The task of this command."""
    try:
        path = OmegaConf.select(config, "plan", throw_on_missing=False)
        if path is None:
            raise PlanError("say which plan: plan=path/to/plan.json")
        plan = read_plan(str(path))
        check(plan, lower(plan))
        prediction = predicted(plan)
    except ValueError as error:
        refuse(str(error))
    print(plan_table(plan))
    print(prediction_text(plan, prediction))
    target = run_folder() / "trace.json"
    target.write_text(to_chrome(prediction.trace))
    print(f"trace: {target}")


if __name__ == "__main__":
    launch(simulate, "simulate")
