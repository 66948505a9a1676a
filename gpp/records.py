"""Frozen records to JSON and back, by their type hints; an error names the place in the file."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection
from enum import Enum
from typing import Any, TypeVar, cast

T = TypeVar("T")

# Beyond is a mistake: sums and products of a few such numbers are still numbers.
MOST = (1 << 63) - 1  # of whole numbers
LARGEST = 1e30  # of others: seconds, bytes, operations; infinite is left to a record's own rules


class RecordError(ValueError):
    """JSON that is not the record it should be."""


def to_json(record: Any, form: str) -> str:
    """The record as JSON text under the key "format": keys sorted, the same text for the same record."""
    return json.dumps({"format": form, **_plain(record)}, sort_keys=True, indent=1)


def from_json(cls: type[T], text: str, form: str, older: Collection[str] = ()) -> T:
    """Read `to_json`'s text back, or one of an `older` form that lacks some keys. Raises RecordError
    (malformed, wrong type, missing or unknown key) and whatever the record's own checks raise."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number too long, or nested too deep
        raise RecordError(f"malformed JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") not in (form, *older):
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise RecordError(f'the key "format" must be "{form}", it is {shown(found)}')
    del data["format"]
    return cast(T, _decode(cls, data, cls.__name__))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _decode(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _decode(next(o for o in options if o is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise RecordError(f"{path} must be a list, it is {type(value).__name__}")
        inner = typing.get_args(hint)[0]
        return tuple(_decode(inner, item, f"{path}[{i}]{_named(item)}") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _decode_record(cast(type, hint), value, path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            known = ", ".join(repr(m.value) for m in hint)
            raise RecordError(f"{path} must be one of {known}, it is {shown(value)}") from None
    return _decode_scalar(hint, value, path)


def _decode_record(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{path} must be an object, it is {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise RecordError(f"{path} has no key {shown(unknown[0])}; it has {', '.join(sorted(fields))}")
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _decode(hints[name], value[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{path} lacks the key {name!r}")
    try:
        return cls(**arguments)
    except ValueError as error:  # a record's own rule: the outermost knows its parts by name
        raise type(error)(f"{path}: {error}" if "." in path else str(error)) from None


def _named(item: Any) -> str:
    """The name of a record in a list, for messages."""
    name = item.get("name") if isinstance(item, dict) else None
    return (
        f" ({name if name.isprintable() and len(name) <= 60 else shown(name)})"
        if isinstance(name, str)
        else ""
    )


def _decode_scalar(hint: Any, value: Any, path: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and value == value:
        if LARGEST < abs(value) < math.inf:
            raise RecordError(f"{path} must be at most {LARGEST:g}, it is {shown(value)}")
        return float(value)
    if hint is int and isinstance(value, int) and number:
        if abs(value) > MOST:
            raise RecordError(f"{path} must be at most {MOST}, it is {shown(value)}")
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        if not value.isprintable():  # a name goes into tables, messages and file names
            raise RecordError(f"{path} must be one line of text, it is {shown(value)}")
        return value
    raise RecordError(f"{path} must be of type {hint.__name__}, it is {shown(value)}")


def shown(value: object) -> str:
    """A value in a message: one that is wrong may be long, or have no end of digits."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, or nested too deep
        return f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."
