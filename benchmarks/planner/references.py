"""Answers of Piper's own planner in C++ (Tarnawski et al., NeurIPS 2021), and the seconds that it took."""

import json
from dataclasses import dataclass
from pathlib import Path

INFEASIBLE = 1e29  # what it answers, 1e30 seconds, is above


@dataclass(frozen=True, slots=True)
class Reference:
    """One answer. Bytes, seconds; `tps` of one micro-batch to so many `digits`, None where nothing fits."""

    file: str
    devices: int
    micro_batches: int
    memory: float
    bandwidth: float
    tensor_parallel: bool
    recompute: bool
    tps: float | None
    seconds: float
    digits: int = 6

    @property
    def name(self) -> str:
        """The instance without folder and format."""
        return Path(self.file).name.partition(".")[0]


def _long(file: str, devices: int, rounds: int, gibs: float, tps: float | None, seconds: float) -> Reference:
    return Reference(file, devices, rounds, 16 * 2.0**30, gibs * 2**30, False, False, tps, seconds, 5)


# Runs of minutes, which the file of answers leaves out: msr-fiddle/piper at d7fc8cf, g++ 12 -O3, 2 cores. Of
# two answers five digits were kept, of the third only the seconds.
LONG = (
    _long("piper/gnmt.json", 8, 256, 25.0, 65.057, 332.8),
    _long("multibranch/mmt4x8_layers.piper.json", 8, 64, 11.6, 0.0073424, 81.4),
    _long("multibranch/mmt4x8_layers.piper.json", 32, 64, 11.6, None, 236.0),
)


def references(folder: Path) -> list[Reference]:
    """The published answers, in the order of the file."""
    lines = (folder / "piper_reference.jsonl").read_text().splitlines()
    return [_reference(json.loads(line)) for line in lines if line.strip()]


def _reference(item: dict[str, object]) -> Reference:
    number = {key: float(str(item[key])) for key in ("memGB", "bwGiBs", "tps", "seconds")}
    flags = str(item["flags"])
    file = str(item["file"])
    return Reference(
        file=file,
        devices=int(str(item["k"])),
        micro_batches=int(str(item["N"])),
        memory=number["memGB"] * 2**30,
        bandwidth=number["bwGiBs"] * 2**30,
        tensor_parallel="noTP" not in flags,
        recompute="noAR" not in flags,
        tps=None if number["tps"] >= INFEASIBLE else number["tps"],
        seconds=number["seconds"],
    )
