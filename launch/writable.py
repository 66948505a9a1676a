"""Whether something can be written where the user wants it, found out before there is anything to write."""

import tempfile
from pathlib import Path

from .problems import SettingsError


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_writable(folder: Path, key: str) -> None:
    """Raise SettingsError unless files can be made in a folder, which need not exist yet: one is made there,
    or in the nearest folder above that there is, and removed. `key` is the setting that names it."""
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        where = "" if place == folder else f"{place}: "
        raise SettingsError(
            f"{key}: nothing can be written to {folder}: {where}{error.strerror or error}"
        ) from error
