"""Functions of Python's own standard library as a data set: four modalities of bytes and a label.

Real data without a download: every interpreter brings it. A sample is a function or method; its modalities
are the texts of its name, signature, docstring and body, its label is the top-level module or package that
it is from. The module's name is no input, and samples of a module that look the same appear once.
"""

import ast
import hashlib
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

from .cache import user_folder
from .data import DataError, checked

FORMAT = 1  # part of the cache's name: raise it when the same arguments give other samples

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_DEFINITION = re.compile(rb"^[ \t]*(?:async[ \t]+)?def\b", re.MULTILINE)
_MODALITIES = ("name", "signature", "docstring", "body")


class StdlibFunctions:
    """The functions of the `classes` modules that have most of them.

    `read` gives int64 tensors: each modality of shape (n, its bound in bytes), cut or padded with 0, and
    `label` of shape (n,), a position in `modules`. Built once per interpreter and bounds, then read from the
    user's cache folder; a cache that cannot be written costs time, nothing else.

    Raises DataError for a bound below 1, and if the interpreter has fewer modules' sources than `classes`.
    """

    keys = (*_MODALITIES, "label")

    def __init__(
        self, *, classes: int = 16, name: int = 64, signature: int = 64, docstring: int = 64, body: int = 64
    ) -> None:
        bounds = {"name": name, "signature": signature, "docstring": docstring, "body": body}
        for key, bound in {"classes": classes, **bounds}.items():
            if bound < 1:
                raise DataError(f"{key} of the stdlib data set must be at least 1, it is {bound}")
        library = Path(sysconfig.get_paths()["stdlib"])
        cache = _cache_path(library, classes, bounds)
        arrays = _load(cache)
        if arrays is None:
            arrays = build(library, classes, bounds)
            _store(cache, arrays)
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

    Modules are parsed in the order of how many lines of theirs start a definition. None has more functions
    than that, so the rest need no parsing once enough modules have more.
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
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = ast.unparse(node.args) + returns
        docstring = ast.get_docstring(node)
        statements = node.body if docstring is None else node.body[1:]
        body = _text(lines, statements[0], statements[-1]) if statements else b""
        yield node.name.encode(), _encoded(signature), _encoded(docstring or ""), body


def _definitions(statements: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        else:  # a class, or an `if` or `try` around definitions
            for block in ("body", "handlers", "orelse", "finalbody"):
                yield from _definitions(getattr(node, block, ()))


def _text(lines: Sequence[bytes], first: ast.stmt, last: ast.stmt) -> bytes:
    """The source of neighbouring statements, less the indentation of the first."""
    assert last.end_lineno is not None and last.end_col_offset is not None
    indent = first.col_offset
    part = list(lines[first.lineno - 1 : last.end_lineno])
    part[-1] = part[-1][: last.end_col_offset]
    part[0] = part[0][indent:]
    return b"\n".join([part[0], *(b[indent:] if b[:indent].isspace() else b for b in part[1:])])


def _encoded(text: str) -> bytes:
    return text.encode(errors="replace")


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


def _cache_path(library: Path, classes: int, bounds: Mapping[str, int]) -> Path:
    key = f"{FORMAT} {sys.version} {library} {classes} {dict(bounds)}"
    return Path(user_folder(), f"stdlib-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz")


def _load(path: Path) -> dict[str, NDArray[np.generic]] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in (*StdlibFunctions.keys, "modules")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SystemError):
        return None  # absent or damaged, or CPython 3.11's parser failed at it in threads: build it again


def _store(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Written aside and renamed: of processes that start together none reads half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError:
        return  # a home that is read-only or missing
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(aside, path)
    except OSError:  # a full disk
        Path(aside).unlink(missing_ok=True)
