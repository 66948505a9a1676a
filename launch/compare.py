"""python -m launch.compare: planners side by side on clusters of several sizes.

Captures the model, or with profile= plans for a profile, which needs neither torch nor the model. Prints a
table; the run's folder holds comparison.csv and, where matplotlib is installed, figures of throughput and of
memory over devices.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from gpp.planner.estimate import Problem

from .cluster import topology
from .comparison import Row, compared, comparison_csv, comparison_table
from .figures import draw
from .guard import first_rank
from .plan import announced, captured_subject, subject_named
from .planner_settings import KEYS, NAMES
from .plans import Request, Subject, request_of
from .problems import Collected, SettingsError, group_of
from .settings import costs, train_settings
from .start import CONF, launch, own_overrides, run_folder

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator


def compare(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    first_rank(mpi, lambda: _compare(config, own_overrides()))


def _compare(config: DictConfig, overrides: Sequence[str]) -> None:
    with Collected() as read:
        requests = read(_requests, config, overrides)
        subject = read(subject_named, config, overrides)
    subject = announced(subject) if subject else captured_subject(config, overrides)
    rows: list[Row] = []
    for each in requests:
        rows += compared({name: problem_of(request, subject) for name, request in each.items()})
    folder = run_folder().resolve()
    print(comparison_table(rows))
    (folder / "comparison.csv").write_text(comparison_csv(rows))
    print(f"table: {folder / 'comparison.csv'}")
    print(drawn(rows, folder, config), flush=True)


def _requests(config: DictConfig, overrides: Sequence[str]) -> list[dict[str, Request]]:
    """For each number of devices what each planner is asked."""
    with Collected() as read:
        requests = [
            {
                name: read(_request, config, overrides, name, count, batch)
                for name in read(planners_of, config) or NAMES
            }
            for count, batch in read(steps_of, config) or [(1, 1)]
        ]
    return requests


def _request(config: DictConfig, overrides: Sequence[str], name: str, count: int, batch: int) -> Request:
    return request_of(_asked(config, name, count, batch), overrides)


def problem_of(request: Request, subject: Subject) -> Problem:
    """What the request's planner is given."""
    return Problem(
        subject.graph,
        topology(request.config, request.count, request.hosts),
        subject.costs or costs(request.config, subject.graph),
        request.options(train_settings(request.config), subject),
    )


def planners_of(config: DictConfig) -> list[str]:
    """planners: which to compare, each once; and `planner` has only keys that one of them knows."""
    found = _list(config, "planners", "names")
    wrong = [name for name in found if name not in NAMES]
    if wrong:
        raise SettingsError(f"planners must be some of {', '.join(NAMES)}, one is {wrong[0]!r}")
    group = group_of(config, "planner")
    known = {key for name in (*found, str(group.get("name"))) for key in KEYS.get(name, ())}
    unknown = [str(key) for key in group if key not in known]
    if unknown:
        raise SettingsError(f"none of the planners {', '.join(found)} has a key planner.{unknown[0]}")
    return list(dict.fromkeys(found))


def steps_of(config: DictConfig) -> list[tuple[int, int]]:
    """Numbers of devices (cluster.devices), ascending and each once, with the mini-batch of each: one
    train.mini_batch for all, or one for each number in the order given."""
    counts, batches = _counts(config, "cluster.devices"), _counts(config, "train.mini_batch")
    if len(batches) not in (1, len(counts)):
        raise SettingsError(
            f"train.mini_batch must be one number or one for each of the {len(counts)} numbers of "
            f"cluster.devices, it has {len(batches)}"
        )
    pairs = list(zip(counts, batches * (len(counts) // len(batches)), strict=True))
    return sorted(set(pairs))


def _counts(config: DictConfig, key: str) -> list[int]:
    found = _list(config, key, "whole numbers")
    for value in found:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SettingsError(f"{key} must be whole numbers of at least 1, one is {value!r}")
    return found


def _list(config: DictConfig, key: str, what: str) -> list[Any]:
    value = OmegaConf.select(config, key)
    found = list(value) if isinstance(value, ListConfig) else [value]
    if not found or None in found:
        raise SettingsError(f"{key} must be a list of {what}, it is {value!r}")
    return found


def _asked(config: DictConfig, name: str, count: int, mini_batch: int) -> DictConfig:
    """The configuration of one plan: the planner's own defaults, and what `planner` says of its keys."""
    for group in ("cluster", "train"):
        group_of(config, group)
    defaults = OmegaConf.load(CONF / "planner" / f"{name}.yaml")
    assert isinstance(defaults, DictConfig)
    given: Mapping[Any, Any] = {
        key: value
        for key, value in group_of(config, "planner").items()
        if key in KEYS[name] and key != "name"
    }
    asked = config.copy()
    OmegaConf.set_struct(asked, False)
    asked.planner = OmegaConf.create({**defaults, **given})
    asked.cluster.devices = count
    asked.train.mini_batch = mini_batch
    return asked


def drawn(rows: Sequence[Row], folder: Path, config: DictConfig) -> str:
    """Draw what there is to draw, and say where it is or why not."""
    if all(row.step_seconds is None for row in rows):
        return "no figures: there is no plan to draw"
    profile = OmegaConf.select(config, "profile")
    target = OmegaConf.select(config, "model._target_")
    subject = Path(str(profile)).name if profile is not None else str(target).rpartition(".")[2]
    sizes = sorted({row.mini_batch for row in rows})
    batch = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    title = f"{subject} on {config.cluster.name}, mini-batch {batch}"
    try:
        written = draw(rows, folder, title, float(config.cluster.memory))
    except ImportError:
        return "no figures: matplotlib is not installed; pip install -e '.[plot]' in the checkout brings it"
    return f"figures: {', '.join(str(path) for path in written)}"


if __name__ == "__main__":
    launch(compare, "compare")
