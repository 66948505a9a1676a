"""Configurations that were measured to be the fastest on a GPU, in place of the static ones.

`kernels/tuned/<gpu>.json` has them, by operator and by dtype and sizes, each size rounded up to a power of
two; `python -m benchmarks.kernels tune=true` writes it. What a kernel runs with is a function of operator,
dtype, sizes, the GPU's name and this file: nothing is timed when a program runs. Without a file, for sizes
that it does not have, and wherever no GPU is (meta tensors, the interpreter, compilation ahead of time), the
static configuration counts. A file is read when the first kernel of its GPU is launched.

What decides the order in which a row is summed must not depend on how many rows there are. So a `Space` that
may change such an order knows the widths alone, which is checked when it is made.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

FORMAT = "gpp.tuned/1"
FOLDER = Path(__file__).parent / "tuned"
REFUSALS = (CompilationError, OutOfResources, PTXASError)  # of a configuration that a GPU cannot have
COUNTS = frozenset({"rows", "count"})  # sizes that grow with the batch

Configuration = TypeVar("Configuration")
Entries = Mapping[str, Mapping[str, Mapping[str, int]]]  # operator, bucket, field of its configuration


class TableError(ValueError):
    """A table that cannot be used: which file, which key, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Space:
    """What may be tuned of an operator: the values of each field of its configuration, by which sizes.

    `reorders`: whether a field decides the order of the sum of a row. Raises ValueError if such a field would
    depend on the number of rows.
    """

    sizes: tuple[str, ...]
    options: Mapping[str, tuple[int, ...]]
    reorders: bool

    def __post_init__(self) -> None:
        counts = COUNTS & set(self.sizes)
        if self.reorders and counts:
            raise ValueError(f"a row's sum must not depend on the batch, {min(counts)} is a size of it")


_ROWS = Space(("width",), {"rows": (1, 2, 4, 8, 16), "warps": (1, 2, 4, 8, 16)}, reorders=True)

_ATTENTION = Space(
    ("head", "mask_rows"), {"own": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)}, reorders=True
)

SPACES: Mapping[str, Space] = {
    # blocks of the inner dimension, which decide the order of a sum, are not among the options
    "product": Space(
        ("rows", "columns", "inner"),
        {"rows": (64, 128), "columns": (64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4, 5)},
        reorders=False,
    ),
    # a power of two for each epilogue: how much memory is left for stages depends on it
    "described_product": Space(
        ("rows", "columns", "inner", "epilogue"),
        {
            "rows": (64, 128),
            "columns": (64, 128, 256),
            "parts": (1, 2, 4, 8),
            "warps": (4, 8),
            "stages": (2, 3, 4, 5),
            "resident": (1, 2),
        },
        reorders=False,
    ),
    "join": Space(
        ("rows", "columns", "inner"),
        {"rows": (64, 128), "columns": (64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4, 5)},
        reorders=False,
    ),
    "norm": _ROWS,
    "norm_backward": _ROWS,
    "add_norm": _ROWS,
    "add_norm_backward": _ROWS,
    "cross_entropy": _ROWS,
    "cross_entropy_backward": _ROWS,
    "attention_forward": _ATTENTION,
    "attention_query": _ATTENTION,
    "attention_key_value": _ATTENTION,
    "dropout": Space(("count",), {"elements": (512, 1024, 2048, 4096), "warps": (2, 4, 8)}, reorders=False),
    "sum": Space((), {"elements": (512, 1024, 2048, 4096), "warps": (2, 4, 8)}, reorders=False),
    "bags": Space(
        ("size", "width"), {"elements": (512, 1024, 2048, 4096), "warps": (1, 2, 4, 8)}, reorders=True
    ),
    "bag_sums": Space(("tables", "width"), {"elements": (256, 512, 1024), "warps": (1, 2, 4)}, reorders=True),
    "interaction": Space(
        ("features", "width"), {"width": (16, 32, 64), "warps": (1, 2, 4, 8)}, reorders=True
    ),
    "pointwise_loss": Space((), {"elements": (512, 1024, 2048, 4096), "warps": (2, 4, 8)}, reorders=True),
}


@dataclass(frozen=True)
class Table:
    """The configurations of one GPU; `measured` says when and with which versions."""

    gpu: str
    operators: Entries
    measured: Mapping[str, str] = field(default_factory=dict)

    def find(self, operator: str, bucket: str, static: Any) -> Mapping[str, int]:
        """What the table has to say of a configuration."""
        return self.operators.get(operator, {}).get(bucket, {})


def tuned(operator: str, static: Configuration, like: Tensor, **sizes: int) -> Configuration:
    """The configuration for tensors like this one: `static` with what the table of its GPU says."""
    if not like.is_cuda:
        return static
    name = gpu_name(like.device.index)
    chosen: Configuration = _chosen(name, operator, static, like.dtype, tuple(sizes.items()))
    return chosen


@cache
def gpu_name(index: int) -> str:
    """As its driver calls it."""
    return torch.cuda.get_device_name(index)


@cache
def _chosen(
    gpu: str, operator: str, static: Configuration, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]
) -> Configuration:
    table = table_of(gpu)
    if table is None:
        return static
    changes = table.find(operator, bucket_of(operator, dtype, dict(sizes)), static)
    return replace(static, **changes) if changes else static  # type: ignore[type-var]


def bucket_of(operator: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """The key of an entry: `bfloat16 rows=1024 columns=4096 inner=1024`."""
    known = SPACES[operator].sizes
    if set(sizes) != set(known):
        raise ValueError(f"{operator} is tuned by {known}, given are {tuple(sizes)}")
    rounded = (f"{name}={_rounded(sizes[name])}" for name in known)
    return " ".join([str(dtype).removeprefix("torch."), *rounded])


def _rounded(size: int) -> int:
    """Up to a power of two; flags stay what they are."""
    return 1 << (size - 1).bit_length() if size > 1 else int(size)


_tables: dict[str, Table | None] = {}


def table_of(gpu: str) -> Table | None:
    """The table of a GPU, read once. Raises TableError if it is not one."""
    if gpu not in _tables:
        path = path_of(gpu)
        _tables[gpu] = read_table(path) if path.is_file() else None
    return _tables[gpu]


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Let this table be the one of its GPU for a while."""
    before = table_of(table.gpu)
    _install(table.gpu, table)
    try:
        yield
    finally:
        _install(table.gpu, before)


def forget_tables() -> None:
    """Read files again when they are next needed."""
    _tables.clear()
    _chosen.cache_clear()


def _install(gpu: str, table: Table | None) -> None:
    _tables[gpu] = table
    _chosen.cache_clear()


def path_of(gpu: str) -> Path:
    """Where the table of a GPU is."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def table_to_json(table: Table) -> str:
    """As a file has it."""
    content = {"format": FORMAT, "gpu": table.gpu, "measured": table.measured, "operators": table.operators}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read_table(path: Path) -> Table:
    """Raises TableError naming file and key for what is not known or not allowed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, a number too long, or nested too deep
        raise TableError(f"{path}: not JSON: {error}; `tune=true` writes it anew") from None
    given = content.get("format") if isinstance(content, dict) else None
    if given != FORMAT:
        raise TableError(f"{path}: format must be {FORMAT!r}, it is {given!r}; `tune=true` writes it anew")
    if not isinstance(content.get("gpu"), str):
        raise TableError(f"{path}: gpu must be the name of a GPU, it is {content.get('gpu')!r}")
    operators = _mapping(path, "operators", content.get("operators"))
    for operator, buckets in operators.items():
        if operator not in SPACES:
            raise TableError(f"{path}: operators.{operator}: no such operator; there are {', '.join(SPACES)}")
        for bucket, changes in _mapping(path, f"operators.{operator}", buckets).items():
            place = f"operators.{operator}[{bucket!r}]"
            _check_changes(path, place, operator, _mapping(path, place, changes))
    return Table(content["gpu"], operators, _mapping(path, "measured", content.get("measured", {})))


def _check_changes(path: Path, place: str, operator: str, changes: Mapping[str, Any]) -> None:
    options = SPACES[operator].options
    for name, value in changes.items():
        if name not in options:
            known = ", ".join(options)
            raise TableError(f"{path}: {place}.{name} is not tuned; of {operator} {known} are")
        if type(value) is not int or value not in options[name]:
            raise TableError(f"{path}: {place}.{name} must be one of {options[name]}, it is {value!r}")


def _mapping(path: Path, place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TableError(f"{path}: {place} must be an object, it is {value!r}")
    return value
