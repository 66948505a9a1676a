"""python -m launch.plan: plans for cluster.devices without training; prints the plan.

Captures the model, or with profile=path plans for a graph.json that was written before (by this command,
launch.capture or launch.train) or for a published profile (Piper's JSON, PipeDream's graph.txt), which needs
neither torch nor the model. The run's folder holds plan.json and graph.json; launch.train plan=... runs it,
launch.simulate plan=... shows it in time.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from gpp.graph import graph_to_json
from gpp.plan import plan_to_json
from gpp.plan_table import plan_table

from .guard import first_rank
from .plans import Subject, make_plan, read_subject, request_of
from .problems import Collected, SettingsError
from .start import launch, own_overrides, run_folder

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


def plan(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    world, hosts = (None, None) if mpi is None else (mpi.size, mpi.hosts)
    overrides = own_overrides()
    first_rank(mpi, lambda: _plan(config, overrides, world, hosts))


def _plan(
    config: DictConfig, overrides: Sequence[str], world: int | None, hosts: Sequence[str] | None
) -> None:
    with Collected() as read:
        request = read(request_of, config, overrides, world, hosts)
        read(_check_no_plan, config)
        subject = read(subject_named, config, overrides)
    subject = announced(subject) if subject else captured_subject(config, overrides)
    start = perf_counter()
    made = make_plan(request, subject)
    seconds = perf_counter() - start
    folder = run_folder().resolve()
    (folder / "plan.json").write_text(plan_to_json(made))
    (folder / "graph.json").write_text(graph_to_json(subject.graph))
    print(plan_table(made))
    print(f"planned in {seconds:.2f} s: {folder / 'plan.json'}", flush=True)


def _check_no_plan(config: DictConfig) -> None:
    if OmegaConf.select(config, "plan") is not None:
        raise SettingsError("plan= is for launch.train and launch.simulate: this command makes a plan")


def subject_named(config: DictConfig, overrides: Sequence[str]) -> Subject | None:
    """What `profile=` names. Without one None: it is the model that is to be captured, and the settings of
    all that this takes are checked."""
    profile = OmegaConf.select(config, "profile")
    if profile is None:
        from .validation import check_material

        check_material(config, overrides)
        return None
    optimizer = OmegaConf.to_container(config.optimizer, resolve=True)
    if not isinstance(optimizer, dict):
        raise SettingsError(f"optimizer must be a group of its arguments, it is {optimizer!r}")
    return read_subject(str(profile), {str(key): value for key, value in optimizer.items()})


def announced(subject: Subject) -> Subject:
    """The subject of a file, of which a line says what it is."""
    print(subject.source)
    return subject


def captured_subject(config: DictConfig, overrides: Sequence[str]) -> Subject:
    """The model, captured."""
    from .job import gather

    return gather(config, overrides)[0].subject


if __name__ == "__main__":
    launch(plan, "plan")
