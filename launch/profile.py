"""python -m launch.profile: measures every operator of the model on this machine and writes costs.json.

The passes of an operator are the graphs that a stage executes, with the kernels of `kernels=`. Then
cost=profiled cost.path=costs.json makes launch.plan, launch.train and launch.compare plan by what was
measured, for devices like this one. The run's folder holds costs.json and graph.json.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import to_absolute_path
from omegaconf import DictConfig, ListConfig, OmegaConf

from gpp.cost import Timing, costs_to_json
from gpp.graph import graph_to_json

from .cluster import device_count
from .guard import first_rank
from .problems import Collected, SettingsError, group_of
from .settings import TrainSettings, check_choices, check_keys, number, train_settings, whole
from .start import launch, own_overrides, run_folder

if TYPE_CHECKING:
    from gpp.capture.profile import Profile
    from gpp.runtime.mpi import MpiCommunicator

ROWS = 24  # of the printed table
_KEYS = ("sizes", "seconds", "stages", "cache")


def profile(config: DictConfig, mpi: "MpiCommunicator | None") -> None:
    """The task of this command."""
    world = None if mpi is None else mpi.size
    first_rank(mpi, lambda: _profile(config, own_overrides(), world))


def _profile(config: DictConfig, overrides: Sequence[str], world: int | None) -> None:
    import torch

    from gpp.api.crew import threads_of_a_rank
    from gpp.capture.profile import Measurement, where
    from gpp.capture.profile import profile as measured

    from .job import gather
    from .kernels import described, hooks
    from .validation import check_material

    with Collected() as read:
        read(check_keys, config)
        read(check_choices, config)
        read(train_settings, config)
        read(_check_measure, config)
        ranks = read(device_count, config, world)
        read(check_material, config, overrides)
    torch.set_num_threads(threads_of_a_rank(ranks))  # as a rank has them when training
    material, _ = gather(config, overrides)
    data, sizes = material.train_data, sizes_of(config, material.settings)
    made = measured(
        material.captured,
        data.read([i % len(data) for i in range(sizes[-1])], data.keys),
        Measurement(
            sizes=sizes,
            device=material.device,
            where=where(material.device, described(config, material.device)),
            hooks=hooks(config, material.device),
            seconds=number(config, "measure.seconds", above=0.0),
            stages=whole(config, "measure.stages", 1),
            cache=_cache(config),
        ),
    )
    folder = run_folder().resolve()
    (folder / "costs.json").write_text(costs_to_json(made.table))
    (folder / "graph.json").write_text(graph_to_json(material.captured.graph))
    kinds = {op.name: op.kind for op in material.captured.graph.operators}
    print(profile_table(made, kinds))
    print(f"costs: {folder / 'costs.json'}", flush=True)


def sizes_of(config: DictConfig, settings: TrainSettings) -> tuple[int, ...]:
    """measure.sizes, ascending; auto: the largest call there can be, an eighth of it, and so on down to 1."""
    wanted = OmegaConf.select(config, "measure.sizes")
    if isinstance(wanted, ListConfig) and wanted:
        whole_numbers = [s for s in wanted if isinstance(s, int) and not isinstance(s, bool) and s >= 1]
        if len(whole_numbers) == len(wanted):
            return tuple(sorted(set(whole_numbers)))
    if wanted != "auto":
        raise SettingsError(f"measure.sizes must be auto or numbers of samples, [1,8,32], it is {wanted!r}")
    largest = settings.mini_batch if settings.micro_batch == "auto" else settings.micro_batch
    return tuple(sorted({max(largest // 8**i, 1) for i in range(4)}))


def profile_table(made: "Profile", kinds: Mapping[str, str]) -> str:
    """Microseconds of the passes of each kind of work at each size, most expensive first, and how they were
    corrected."""
    timings: Mapping[str, Timing] = made.table.by_name
    sizes = made.corrections
    passes = "forward, input half, weight half"
    lines = [f"{'operator':40s}{'kind':14s}{'times':>6s}  us of {passes}"]
    lines.append(" " * 62 + "".join(f"{_samples(c.samples):>30s}" for c in sizes))
    rows = sorted(made.alike, key=lambda names: -len(names) * _seconds(timings[names[0]]))
    for names in rows[:ROWS]:
        timing = timings[names[0]]
        columns = zip(timing.forward, timing.backward_input, timing.backward_weight, strict=True)
        text = "".join(f"{' '.join(f'{1e6 * t:9.1f}' for t in times):>30s}" for times in columns)
        lines.append(f"{names[0][-39:]:40s}{kinds[names[0]][:13]:14s}{len(names):6d}  {text}")
    if len(rows) > ROWS:
        lines.append(f"and {len(rows) - ROWS} more kinds of work")
    for c in sizes:
        lines.append(
            f"{_samples(c.samples)}: whole stages take {c.forward:.2f} of the sum of their operators' times "
            f"forward, {c.backward:.2f} backward; times are scaled by that"
        )
    lines.append(
        f"{made.measured} of {made.needed} times measured now, the others found; {made.table.measured_on}"
    )
    return "\n".join(lines)


def _samples(count: int) -> str:
    return f"{count} sample" + ("" if count == 1 else "s")


def _seconds(timing: Timing) -> float:
    return timing.forward[-1] + timing.backward_input[-1] + timing.backward_weight[-1]


def _check_measure(config: DictConfig) -> None:
    with Collected() as read:
        read(_check_names, config)
        read(lambda: sizes_of(config, train_settings(config)))
        read(number, config, "measure.seconds", above=0.0)
        read(whole, config, "measure.stages", 1)
        read(_cache, config)


def _check_names(config: DictConfig) -> None:
    wrong = [str(key) for key in group_of(config, "measure") if key not in _KEYS]
    if wrong:
        raise SettingsError(
            *(f"there is no key measure.{key}; measure has {', '.join(_KEYS)}" for key in wrong)
        )


def _cache(config: DictConfig) -> Path | None:
    wanted = OmegaConf.select(config, "measure.cache")
    if wanted is None:
        return None
    if not isinstance(wanted, str):
        raise SettingsError(f"measure.cache must be auto, a folder or null, it is {wanted!r}")
    if wanted == "auto":
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(home, "gpp", "times")
    return Path(to_absolute_path(wanted))


if __name__ == "__main__":
    launch(profile, "profile")
