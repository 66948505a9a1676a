"""Initial weights from safetensors files, by full names: a whole model's, or a pretrained part of one.

Files are read lazily: a rank reads the tensors of its own stages.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gpp.records import shown

from .export import CaptureError
from .names import names_of
from .weights import Initialised

SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True)
class Source:
    """A file whose tensors are parameters and buffers, or an index of several (model.safetensors.index.json).
    `strip` is taken off its names (those that do not begin so are left alone), `prefix` put before them."""

    file: Path
    prefix: str = ""
    strip: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    name: str


def pretrained(initialised: Initialised, sources: Sequence[Source], *, strict: bool) -> Initialised:
    """The model with weights out of `sources`, a later one before an earlier; the rest as it is initialised.

    `strict`: each file has every parameter and saved buffer below its prefix, and nothing else. A tensor of
    another shape is always refused, and so is a file that gives nothing. Of tied parameters one name is
    enough. Raises CaptureError with the names.
    """
    found: dict[str, _Place] = {}
    for source in sources:
        found |= _matched(initialised.model, source, strict)
    types = {name: value.dtype for name, value in _state(initialised.model).items()}

    def values(names: Iterable[str]) -> dict[str, Tensor]:
        wanted = tuple(names)
        made = initialised.values(tuple(n for n in wanted if n not in found))
        made |= _read({n: found[n] for n in wanted if n in found})
        return {name: made[name].to(types[name]) for name in wanted}

    return Initialised(initialised.model, values)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _matched(model: nn.Module, source: Source, strict: bool) -> dict[str, _Place]:
    """First name to where its value is."""
    names, state = names_of(model), _state(model)
    saved = set(model.state_dict(keep_vars=True))  # without the buffers that are never saved
    first = {alias: main for main, aliases in names.items() for alias in aliases if alias in saved}
    given = {name: item for file in _files(source.file) for name, item in _shapes(file).items()}
    inside = {source.prefix + n.removeprefix(source.strip): n for n in given if n.startswith(source.strip)}
    places: dict[str, _Place] = {}
    for name in sorted(inside, key=lambda n: n in names, reverse=True):  # the first name of a tied one wins
        if name in first:
            places.setdefault(first[name], given[inside[name]].place)
    unexpected = [n for n in inside if n not in first]
    missing = [
        main
        for main in dict.fromkeys(first.values())
        if main not in places and any(a.startswith(source.prefix) for a in names[main])
    ]
    shaped = [
        f"{main} is {given[place.name].shape} in the file and {tuple(state[main].shape)} in the model"
        for main, place in places.items()
        if given[place.name].shape != tuple(state[main].shape)
    ]
    wrong = [f"{len(shaped)} of another shape ({_some(shaped)})"] if shaped else []
    if strict or not places:
        wrong += [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        wrong += [f"{len(unexpected)} unexpected ({_some(unexpected)})"] if unexpected else []
    if wrong or not places:
        raise CaptureError(
            f"train.init_from: {source.file} and {type(model).__name__}"
            + (f" below {source.prefix!r}" if source.prefix else "")
            + f" differ in names or shapes: {'; '.join(wrong) or 'the file has no tensor for it'}. "
            "prefix and strip rename what is in the file; train.init_strict=false leaves what is missing as "
            "it is initialised, and what is unexpected unread"
        )
    return places


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")


@dataclass(frozen=True, slots=True)
class _Tensor:
    place: _Place
    shape: tuple[int, ...]


def _files(file: Path) -> list[Path]:
    """The file, or those that it is the index of."""
    if file.suffix != ".json":
        return [file]
    try:
        names = list(dict.fromkeys(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CaptureError(
            f"train.init_from: {file} is no index of safetensors files, {{weight_map: {{name: file}}}}: "
            f"{type(error).__name__}"
        ) from None
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) < 200:
            raise CaptureError(f"train.init_from: {file} names a file {shown(name)}, which cannot be one")
    return [file.parent / name for name in names]


def _shapes(file: Path) -> dict[str, _Tensor]:
    if not file.is_file():
        raise CaptureError(f"train.init_from: there is no file {file} on this host")
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
            return {name: _Tensor(_Place(file, name), shape) for name, shape in shapes.items()}
    except (SafetensorError, OSError) as error:
        raise CaptureError(f"train.init_from: {file} is no safetensors file: {error}") from None


def _read(places: Mapping[str, _Place]) -> dict[str, Tensor]:
    by_file: dict[Path, dict[str, str]] = {}
    for name, place in places.items():
        by_file.setdefault(place.file, {})[name] = place.name
    made: dict[str, Tensor] = {}
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            made |= {name: _own(opened.get_tensor(inside)) for name, inside in names.items()}
    return made


def _own(value: Tensor) -> Tensor:
    """Memory of its own, not the file's pages."""
    return value.clone(memory_format=torch.contiguous_format)
