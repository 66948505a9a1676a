"""python -m launch.simulate plan=path/to/plan.json: what a plan promises, without model, torch or MPI.

Prints the plan, the predicted step time, and bubble and memory of each rank; writes trace.json for
chrome://tracing or ui.perfetto.dev into the run's folder.
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from gpp.plan import Plan
from gpp.plan_table import plan_table, readable_bytes
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.simulate import Prediction, predicted
from gpp.trace import to_chrome

from .guard import first_rank
from .plans import read_plan
from .problems import Collected, SettingsError
from .settings import whole
from .start import launch, run_folder

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


def prediction_text(plan: Plan, prediction: Prediction) -> str:
    """Step time, and a line per rank."""
    names = {d: stage.name for stage in plan.stage_graph.stages for d in stage.devices}
    lines = [
        f"predicted step {prediction.step_seconds * 1e3:.3f} ms, "
        f"{plan.mini_batch / prediction.step_seconds:.1f} samples/s",
        f"{'rank':>4}  {'bubble':>7}  {'memory':>8}  stage",
    ]
    for rank, (idle, memory) in enumerate(zip(prediction.bubble, prediction.memory, strict=True)):
        lines.append(f"{rank:>4}  {idle:>7.1%}  {readable_bytes(memory):>8}  {names.get(rank, '(idle)')}")
    return "\n".join(lines)


def simulate(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    first_rank(mpi, lambda: _simulate(config))


def _simulate(config: DictConfig) -> None:
    with Collected() as read:
        steps = read(whole, config, "steps", 1)
        plan = read(_plan, config)
    check(plan, lower(plan))
    prediction = predicted(plan, steps=steps)
    print(plan_table(plan))
    print(prediction_text(plan, prediction))
    target = run_folder() / "trace.json"
    target.write_text(to_chrome(prediction.trace))
    print(f"trace: {target}")


def _plan(config: DictConfig) -> Plan:
    path = OmegaConf.select(config, "plan", throw_on_missing=False)
    if path is None:
        raise SettingsError("say which plan: plan=path/to/plan.json")
    return read_plan(str(path))


if __name__ == "__main__":
    launch(simulate, "simulate")
