"""What is planned for: the paper's models, captured anew on the meta device, and published profiles."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from gpp.cost import CostModel, Roofline
from gpp.formats import read_profile
from gpp.graph import ComputationGraph
from gpp.planner.estimate import Problem
from gpp.planner.options import Options
from gpp.topology import DeviceTopology
from launch.cluster import topology
from launch.start import CONF

CHECKOUT = Path(__file__).parents[2]

# of the configuration's models, those of the paper (GraphPipe §7.1, A.2) and its case study (§7.5)
PAPER: Mapping[str, str] = {"MMT": "mmt_paper", "DLRM": "dlrm", "CANDLE-Uno": "candle_uno"}
CASE_STUDY = "case_study"
# Samples of a micro-batch wherever it is fixed
MICRO_BATCH: Mapping[str, int] = {"MMT": 4, "DLRM": 256, "CANDLE-Uno": 256}


@dataclass(frozen=True)
class Workload:
    """A model with its costs and the cluster it runs on; `optimizer_factor` as in `Options`."""

    name: str
    graph: ComputationGraph
    costs: CostModel
    cluster: str
    optimizer_factor: float

    def problem(self, devices: int, options: Options, *, memory: float | None = None) -> Problem:
        """What a planner is given, with nothing remembered from an earlier question; `memory` bytes a device
        instead of the cluster's own."""
        options = replace(options, optimizer_factor=self.optimizer_factor)
        return Problem(replace(self.graph), clustered(self.cluster, devices, memory), self.costs, options)


def clustered(name: str, devices: int, memory: float | None = None) -> DeviceTopology:
    """A cluster of the configuration with so many devices."""
    chosen = {"cluster": name, "precision": "fp32"}
    config = OmegaConf.create({k: OmegaConf.load(CONF / k / f"{v}.yaml") for k, v in chosen.items()})
    found = topology(config, devices, None)
    if memory is None:
        return found
    return replace(found, devices=tuple(replace(device, memory=memory) for device in found.devices))


@cache
def captured(model: str, *, cluster: str = "summit") -> Workload:
    """A model of the configuration as `launch.capture` sees it; no weights are made."""
    from hydra import compose, initialize_config_dir

    from launch.job import gather

    overrides = [f"model={model}", "train.init=recorded"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("capture", overrides=overrides)
    subject = gather(config, overrides)[0].subject
    return Workload(model, subject.graph, Roofline(), cluster, subject.optimizer_factor)


def paper_models() -> dict[str, Workload]:
    """The paper's three models on its cluster."""
    return {name: replace(captured(model), name=name) for name, model in PAPER.items()}


def profiles_folder() -> Path | None:
    """Of published profiles: named by GPP_PROFILES, else ../shared/profiles; None where neither is."""
    named = os.environ.get("GPP_PROFILES")
    folder = Path(named) if named else CHECKOUT.parent / "shared" / "profiles"
    return folder if folder.is_dir() else None


def published(folder: Path, *patterns: str) -> dict[str, tuple[Workload, int]]:
    """Profiles in Piper's and PipeDream's formats by name, and the samples of one profiled batch.

    They run on the links of the paper's cluster; all of them, or those that a pattern matches.
    """
    found = {}
    for pattern in patterns or ("*/*.json", "*/*.txt"):
        for path in sorted(folder.glob(pattern)):
            profile = read_profile(path.read_text(), path.name)
            name = path.name.partition(".")[0]
            name = name if name not in found else f"{path.parent.name}/{name}"
            work = Workload(name, profile.graph, profile.costs, "summit", profile.optimizer_factor)
            found[name] = (work, profile.unit)
    return found


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Model and samples, of each."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


Question = tuple[Workload, Options]


def questions(models: Mapping[str, Workload], folder: Path | None) -> dict[str, Question]:
    """A step of 32 micro-batches of every workload: the paper's models and case study, published profiles."""
    found = {
        name: (work, Options(mini_batch=32 * MICRO_BATCH[name], micro_batch=MICRO_BATCH[name]))
        for name, work in models.items()
    }
    found["case study"] = (captured(CASE_STUDY), Options(mini_batch=128, micro_batch=4))
    for name, (work, unit) in ({} if folder is None else published(folder)).items():
        found[name] = (work, Options(mini_batch=32 * unit, micro_batch=unit))
    return found


def floors(folder: Path) -> list[Question]:
    """Multi-modal transformers among the published profiles, a step of 64 micro-batches."""
    found = published(folder, "multibranch/mmt2x8_ops.*", "multibranch/mmt4x8_layers.*")
    return [(work, Options(mini_batch=64 * unit, micro_batch=unit)) for work, unit in found.values()]
