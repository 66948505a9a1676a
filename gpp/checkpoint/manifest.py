"""What a checkpoint holds: the record that is written last, and the parts that its ranks contribute."""

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .tensors import CheckpointError, FileRecord

FORMAT, VERSION = "gpp-checkpoint", 1
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"  # Hugging Face's, of the weights
CHECKSUM = "crc32"  # in a manifest: of its other content, however it is laid out

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Option = bool | int | float | str | None | list[Any]


@dataclass(frozen=True, slots=True)
class OptimizerEntry:
    """One parameter's state: the file that holds its tensors as NAME/KEY, other values, and its options."""

    file: str
    tensors: tuple[str, ...]
    values: Mapping[str, Option]
    options: Mapping[str, Option]


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has written. `weights` and `averages` go by the keys of the module's state_dict,
    `optimizer` by the parameters' names; a rank without stages has no optimizer. `buffers` are those that
    training changes and the state_dict lacks, by name: no tool that reads weights expects them."""

    files: Mapping[str, FileRecord]
    weights: Mapping[str, str]  # to the file
    averages: Mapping[str, str]
    optimizer: Mapping[str, OptimizerEntry]
    optimizer_class: str | None = None
    buffers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Order:
    """What the order of training data is a function of: how many samples there are, and a seed."""

    samples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole checkpoint. `step` is how many steps were made, of `mini_batch` samples each, so it is also the
    position in the data; `seed` keys all random numbers. `ema` is the decay of `averages`, `order` that of
    the data set that was trained on, None where it is not known.
    `skipped` of the steps were not finite: weights and learning rates did not move in them."""

    step: int
    mini_batch: int
    seed: int
    ema: float | None
    part: Part
    order: Order | None = None
    skipped: int = 0

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(record.bytes for record in self.part.files.values())


def joined(parts: Iterable[Part]) -> Part:
    """All ranks' parts as one."""
    known = tuple(parts)
    files: dict[str, FileRecord] = {}
    weights: dict[str, str] = {}
    averages: dict[str, str] = {}
    buffers: dict[str, str] = {}
    optimizer: dict[str, OptimizerEntry] = {}
    for part in known:
        files |= part.files
        weights |= part.weights
        averages |= part.averages
        buffers |= part.buffers
        optimizer |= part.optimizer
    kind = next((part.optimizer_class for part in known if part.optimizer_class is not None), None)
    return Part(files, weights, averages, optimizer, kind, buffers)


def part_to_json(part: Part) -> str:
    """Compact JSON."""
    return json.dumps(asdict(part), separators=(",", ":"))


def part_from_json(text: str, where: Path) -> Part:
    """Raises CheckpointError naming the file and the place."""
    return _part(_Place(_parsed(text, where), str(where)))


def manifest_to_json(manifest: Manifest) -> str:
    """JSON for people too."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    return json.dumps({**content, CHECKSUM: _checksum(content)}, indent=1)


def manifest_from_json(text: str, where: Path) -> Manifest:
    """Raises CheckpointError naming the file and the place."""
    place = _Place(_parsed(text, where), str(where))
    kind, version = place.string("format"), place.whole("version")
    if kind != FORMAT:
        raise CheckpointError(
            f"{where} is no manifest of a checkpoint: its format is {kind!r}, not {FORMAT!r}"
        )
    if version != VERSION:
        raise CheckpointError(f"{where} has version {version}, this program reads version {VERSION}")
    content = {key: value for key, value in place.value.items() if key != CHECKSUM}
    if place.whole(CHECKSUM) != _checksum(content):
        raise CheckpointError(f"{where} is damaged: it does not say what was written (CRC-32)")
    return Manifest(
        place.whole("step"),
        place.whole("mini_batch", 1),
        place.whole("seed"),
        place.number("ema"),
        _part(place.inside("part")),
        _order(place.inside("order")),
        place.whole("skipped") if "skipped" in content else 0,
    )


def check_name(name: str, where: object) -> None:
    """Raise CheckpointError for what cannot be the name of a file of a checkpoint."""
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where} names the file {_short(name)}: files of a checkpoint lie in its folder, and their "
            "names have letters, digits, '.', '_' and '-'"
        )


def index_to_json(part: Part, total: int) -> str:
    """The weights' index in Hugging Face's sharded layout; `total` is their size in bytes."""
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(part.weights.items()))}, indent=1
    )


def _part(place: "_Place") -> Part:
    files = place.inside("files")
    records = {}
    for name in files.names():
        check_name(name, files.where)
        record = files.inside(name)
        records[name] = FileRecord(record.whole("bytes"), record.whole("crc32"))
    entries = place.inside("optimizer")
    optimizer = {}
    for name in entries.names():
        entry = entries.inside(name)
        optimizer[name] = OptimizerEntry(
            entry.one_of("file", records),
            entry.strings("tensors"),
            entry.options("values"),
            entry.options("options"),
        )
    maps = []
    for key in ("weights", "averages", "buffers"):
        inner = place.inside(key)
        maps.append({name: inner.one_of(name, records) for name in inner.names()})
    kind = None if place.inside("optimizer_class").value is None else place.string("optimizer_class")
    return Part(records, maps[0], maps[1], optimizer, kind, maps[2])


def _order(place: "_Place") -> Order | None:
    return None if place.value is None else Order(place.whole("samples", 1), place.whole("seed"))


def _parsed(text: str, where: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it is no JSON ({error})") from error


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True, slots=True)
class _Place:
    """A value of a JSON file, and where it is."""

    value: Any
    where: str

    def inside(self, key: str) -> "_Place":
        if not isinstance(self.value, dict):
            raise CheckpointError(
                f"{self.where} is damaged: it must be an object, it is {_short(self.value)}"
            )
        if key not in self.value:
            raise CheckpointError(f"{self.where} is damaged: it has no {key!r}")
        return _Place(self.value[key], f"{self.where}: {key}")

    def names(self) -> list[str]:
        if not isinstance(self.value, dict):
            raise CheckpointError(
                f"{self.where} is damaged: it must be an object, it is {_short(self.value)}"
            )
        return list(self.value)

    def whole(self, key: str, least: int = 0) -> int:
        place = self.inside(key)
        value = place.value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise CheckpointError(
                f"{place.where} is damaged: it must be a whole number of at least {least}, "
                f"it is {_short(value)}"
            )
        return value

    def number(self, key: str) -> float | None:
        place = self.inside(key)
        if place.value is not None and (
            isinstance(place.value, bool) or not isinstance(place.value, int | float)
        ):
            raise CheckpointError(
                f"{place.where} is damaged: it must be a number, it is {_short(place.value)}"
            )
        try:
            return None if place.value is None else float(place.value)
        except OverflowError:
            raise CheckpointError(f"{place.where} is damaged: it is too large a number") from None

    def string(self, key: str) -> str:
        place = self.inside(key)
        if not isinstance(place.value, str):
            raise CheckpointError(f"{place.where} is damaged: it must be a text, it is {_short(place.value)}")
        return place.value

    def one_of(self, key: str, known: Mapping[str, object]) -> str:
        value = self.string(key)
        if value not in known:
            raise CheckpointError(f"{self.where}: {key} is damaged: there is no file {value!r}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        place = self.inside(key)
        if not isinstance(place.value, list) or not all(isinstance(v, str) for v in place.value):
            raise CheckpointError(
                f"{place.where} is damaged: it must be a list of texts, it is {_short(place.value)}"
            )
        return tuple(place.value)

    def options(self, key: str) -> dict[str, Option]:
        place = self.inside(key)
        return {name: place.value[name] for name in place.names()}


def _short(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
