"""Parameters by patterns on their full names, and what kind of module each belongs to."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from .export import CaptureError

NO_DECAY = ("norms", "biases")


def names_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter and buffer under its first name: all of its names (a tied one has several)."""
    first: dict[int, str] = {}
    found: dict[str, tuple[str, ...]] = {}
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        main = first.setdefault(id(value), name)
        found[main] = (*found.get(main, ()), name)
    return found


def matching(model: nn.Module, patterns: Sequence[str], key: str) -> list[str]:
    """First names of the parameters of which any name matches any of the glob patterns, in the model's order.

    Raises CaptureError for a pattern that matches none; `key` is the setting it comes from.
    """
    names = names_of(model)
    parameters = [name for name, _ in model.named_parameters()]
    hit = {
        pattern: {n for n in parameters if any(fnmatchcase(alias, pattern) for alias in names[n])}
        for pattern in patterns
    }
    for pattern, found in hit.items():
        if not found:
            some = ", ".join(parameters[:4])
            raise CaptureError(
                f"{key}: the pattern {pattern!r} matches no parameter of {type(model).__name__}, whose "
                f"{len(parameters)} parameters are called {some}{', ...' if len(parameters) > 4 else ''}"
            )
    return [n for n in parameters if any(n in found for found in hit.values())]


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters that match do not learn. Raises CaptureError for a pattern that matches none."""
    wanted = set(matching(model, patterns, "train.freeze"))
    for name, parameter in model.named_parameters():
        if name in wanted:
            parameter.requires_grad_(False)


def without_decay(model: nn.Module, kinds: Sequence[str]) -> list[str]:
    """The parameters that users mean by "norms" (those of modules whose class is called ...Norm...) and by
    "biases" (those called bias)."""
    norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    return [
        name
        for name, _ in model.named_parameters()
        if ("norms" in kinds and name in norms)
        or ("biases" in kinds and name.rpartition(".")[2].endswith("bias"))
    ]


def group_index(
    model: nn.Module, groups: Sequence[Sequence[str]], undecayed: Sequence[str]
) -> Mapping[str, int]:
    """Which group each parameter is in: 0 where no pattern matches, i for the i-th group, whose patterns come
    first, and after the last group one for the `undecayed` kinds. Raises CaptureError."""
    index: dict[str, int] = {}
    for number, patterns in enumerate(groups, 1):
        for name in matching(model, patterns, f"optimizer.groups[{number - 1}]"):
            index.setdefault(name, number)
    for name in without_decay(model, undecayed):
        index.setdefault(name, len(groups) + 1)
    return index
