"""Functions of Python's own standard library as a data set: four modalities of bytes and a label.

Real data without a download: every interpreter brings it. A sample is a function or method; its modalities are
the texts of its name, signature, docstring and body, its label is the top-level module or package that it comes
from. The module's name is no input, and samples that look the same appear once.
"""

import ast
import os
import re
import sys
import sysconfig
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import DataError, checked

FORMAT = 1  # part of the cache's name: raise it when the same arguments give other samples

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_DEFINITION = re.compile(rb"^[ \t]*(?:async[ \t]+)?def\b", re.MULTILINE)
_MODALITIES = ("name", "signature", "docstring", "body")


class StdlibFunctions:
    """The functions of the `classes` modules that have most of them.

    `read` gives int64 tensors: each modality of shape (n, its bound in bytes), cut or padded with 0, and `label`
    of shape (n,), a position in `modules`. Built once per interpreter and bounds, then read from the cache in
    the user's cache folder; a cache that cannot be written costs time, nothing else.

    Raises DataError if the interpreter has no library sources or fewer modules than classes.
    """

    keys = (*_MODALITIES, "label")

    def __init__(
        self, *, classes: int = 16, name: int = 32, signature: int = 64, docstring: int = 128, body: int = 192
    ) -> None:
        bounds = {"name": name, "signature": signature, "docstring": docstring, "body": body}
        for key, bound in {"classes": classes, **bounds}.items():
            if bound < 1:
                raise DataError(f"{key} of the stdlib data set must be at least 1, it is {bound}")
        path = _cache_path(classes, bounds)
        arrays = _load(path)
        if arrays is None:
            arrays = build(Path(sysconfig.get_paths()["stdlib"]), classes, bounds)
            _store(path, arrays)
        self.modules: tuple[str, ...] = tuple(arrays.pop("modules").tolist())
        self._columns = {key: torch.from_numpy(array) for key, array in arrays.items()}

    def __len__(self) -> int:
        return len(self._columns["label"])

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """The samples at `indices`, see the class."""
        rows = torch.as_tensor(checked(indices, len(self), keys, self.keys))
        return {key: self._columns[key][rows].long() for key in keys}


def build(library: Path, classes: int, bounds: Mapping[str, int]) -> dict[str, NDArray[np.generic]]:
    """Read the sources below `library`: a uint8 array (samples, bound) per modality, `label` and `modules`.

    Files are parsed module by module, from the one with most lines that start a definition: no module has more
    functions than that, so the rest is left out once enough are larger.
    """
    files = _files(library)
    most = Counter({module: sum(map(_count, paths)) for module, paths in files.items()})
    found: dict[str, list[tuple[bytes, ...]]] = {}
    for module, bound in most.most_common():
        sizes = sorted(map(len, found.values()), reverse=True)
        if len(sizes) >= classes and sizes[classes - 1] >= bound:
            break
        texts = (text for path in files[module] for text in functions(path.read_bytes()))
        cut = (tuple(t[:b] for t, b in zip(text, bounds.values(), strict=True)) for text in texts)
        found[module] = list(dict.fromkeys(cut))
    modules = sorted(sorted(found, key=lambda m: (-len(found[m]), m))[:classes])
    if len(modules) < classes or not all(found[m] for m in modules):
        raise DataError(
            f"the stdlib data set needs the sources of {classes} modules of Python's library, "
            f"{library} has {sum(map(bool, found.values()))}: install them, or lower data.classes"
        )
    samples = [text for module in modules for text in found[module]]
    arrays: dict[str, NDArray[np.generic]] = {
        key: np.array([text[i] for text in samples], dtype=f"S{bound}").view(np.uint8).reshape(-1, bound)
        for i, (key, bound) in enumerate(bounds.items())
    }
    arrays["label"] = np.repeat(np.arange(classes), [len(found[m]) for m in modules])
    arrays["modules"] = np.array(modules)
    return arrays


def functions(source: bytes) -> Iterator[tuple[bytes, bytes, bytes, bytes]]:
    """Name, signature, docstring and body of each function and method in a file of Python source.

    Functions inside functions belong to their owner's body. A file that is no valid UTF-8 source of this
    interpreter's Python has none.
    """
    try:
        tree = ast.parse(source.decode())
    except (SyntaxError, ValueError):  # a UnicodeDecodeError is a ValueError
        return
    lines = source.splitlines()
    for node in _definitions(tree.body):
        first, statements = node.body[0], node.body
        header = _between(lines, (node.lineno, node.col_offset), (first.lineno, first.col_offset))
        signature = header.partition(b"def")[2].strip()[len(node.name) :].removesuffix(b":")
        docstring = (ast.get_docstring(node) or "").encode(errors="replace")
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and docstring:
            statements = node.body[1:]
        body = b""
        if statements:
            start, last = statements[0], statements[-1]
            stop = (last.end_lineno or last.lineno, last.end_col_offset or 0)
            body = _between(lines, (start.lineno, start.col_offset), stop, indent=start.col_offset)
        yield node.name.encode(), signature, docstring, body


def _definitions(statements: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        else:  # a class, or an `if` or `try` around definitions
            for block in ("body", "handlers", "orelse", "finalbody"):
                yield from _definitions(getattr(node, block, ()))


def _between(lines: Sequence[bytes], start: tuple[int, int], stop: tuple[int, int], indent: int = 0) -> bytes:
    """Source from `start` to `stop` (line from 1, byte), the following lines less `indent` blanks."""
    part = [*lines[start[0] - 1 : stop[0] - 1], lines[stop[0] - 1][: stop[1]]]
    part[0] = part[0][start[1] :]
    return b"\n".join([part[0], *(b[indent:] if b[:indent].isspace() else b for b in part[1:])])


def _files(library: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(f for f in folders if f.isidentifier() and f not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix == ".py":
                found.setdefault(path.relative_to(library).parts[0].removesuffix(".py"), []).append(path)
    return found


def _count(path: Path) -> int:
    return len(_DEFINITION.findall(path.read_bytes()))


def _cache_path(classes: int, bounds: Mapping[str, int]) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    version = ".".join(map(str, sys.version_info[:3]))
    sizes = "-".join(map(str, bounds.values()))
    return Path(home, "gpp", f"stdlib-{FORMAT}-{sys.implementation.name}-{version}-{classes}-{sizes}.npz")


def _load(path: Path) -> dict[str, NDArray[np.generic]] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in (*StdlibFunctions.keys, "modules")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: build it again


def _store(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Written aside and renamed, so that processes starting together never read half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(aside, path)
    except OSError:
        return  # a read-only home, a full disk
