"""Whom an operator is measured against."""

from collections.abc import Iterator
from importlib import import_module, metadata

import torch

from .work import Function, Kernel

OURS = "triton"
RIVALS = ("eager", "compiled", "library", "liger")
BACKEND = "inductor"
MISSING = "not installed"


class NotInstalled(Exception):
    """A rival that is a package of its own, which is not there."""


def providers(
    kernel: Kernel, names: tuple[str, ...], backend: str = BACKEND
) -> Iterator[tuple[str, Function]]:
    """Ours and the rivals that have the operator. One that is not installed raises when it is called.

    Liger-Kernel comes last: some of its operators overwrite their inputs.
    """
    yield OURS, kernel.ours
    if "eager" in names:
        yield "eager", kernel.eager
    if "compiled" in names:
        yield "compiled", torch.compile(kernel.eager, fullgraph=True, dynamic=False, backend=backend)
    if "library" in names and kernel.library is not None:
        yield "library", kernel.library
    if "liger" in names and kernel.liger is not None:
        found = liger_function(kernel.liger.name)
        yield "liger", _absent if found is None else kernel.liger.call(found)


def liger_function(name: str) -> Function | None:
    """A function of Liger-Kernel, where it is installed."""
    try:
        found: Function = getattr(import_module("liger_kernel.transformers.functional"), name)
    except (ImportError, AttributeError):  # not there, or a version without it
        return None
    return found


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def _absent(*_: object) -> None:
    raise NotInstalled(MISSING)
