"""python -m launch.plan: plans for cluster.devices without training; prints the plan.

Captures the model, or with profile=path plans for a graph.json that was written before (by this command,
launch.capture or launch.train) or for a published profile (Piper's JSON, PipeDream's graph.txt), which needs
neither torch nor the model. The run's folder holds plan.json and graph.json; launch.train plan=... runs it,
launch.simulate plan=... shows it in time.
"""

from time import perf_counter
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from gpp.graph import graph_to_json
from gpp.plan import plan_to_json
from gpp.plan_table import plan_table

from .guard import first_rank
from .plans import Request, Subject, check_request, make_plan, read_subject
from .settings import SettingsError, device_count
from .start import launch, own_overrides, run_folder

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


def plan(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    world, hosts = (None, None) if mpi is None else (mpi.size, mpi.hosts)
    overrides = own_overrides()
    count = device_count(config, world)
    first_rank(mpi, lambda: _plan(Request(config, overrides, count, hosts)))


def _plan(request: Request) -> None:
    check_request(request)
    if request.plan_path is not None:
        raise SettingsError("plan= is for launch.train and launch.simulate: this command makes a plan")
    subject = subject_of(request)
    start = perf_counter()
    made = make_plan(request, subject)
    seconds = perf_counter() - start
    folder = run_folder().resolve()
    (folder / "plan.json").write_text(plan_to_json(made))
    (folder / "graph.json").write_text(graph_to_json(subject.graph))
    print(plan_table(made))
    print(f"planned in {seconds:.2f} s: {folder / 'plan.json'}", flush=True)


def subject_of(request: Request) -> Subject:
    """What is planned for: the captured model, or what `profile=` names, of which a line says what it is."""
    profile = OmegaConf.select(request.config, "profile")
    if profile is None:
        from .job import gather

        return gather(request.config, request.overrides)[0].subject
    optimizer = OmegaConf.to_container(request.config.optimizer, resolve=True)
    assert isinstance(optimizer, dict)
    subject = read_subject(str(profile), {str(key): value for key, value in optimizer.items()})
    print(subject.source)
    return subject


if __name__ == "__main__":
    launch(plan, "plan")
