"""Files as they come to be damaged: valid JSON with something changed, text cut short, bytes altered."""

import json
from typing import Any

from hypothesis import strategies as st

# What a program that trusts a file stumbles over: other types, signs, sizes, and numbers that are none.
ODD = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf")),
        *(float("-inf"), 2**31, 2**63, 10**18, -(10**18), 10**400, "", "1", "nan", "\0", "é\u2028\ud800"),
        *("../x", "x" * 300, [], {}, [[]], [0], {"": 0}, {"name": "x"}),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
Path = tuple[str | int, ...]


def places(value: Any, path: Path = ()) -> list[Path]:
    """Where there is a value in a JSON value: keys and positions from the outside in."""
    found = [path]
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += places(inner, (*path, key))
    for position, inner in enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, position))
    return found


def changed(content: Any, path: Path, value: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return value
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def at(content: Any, path: Path) -> Any:
    """The value at a place."""
    for key in path:
        content = content[key]
    return content


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> Any:
    """`content` with one value (or two) replaced, scaled, moved, dropped, doubled or added; mostly a number
    or a text, since a file whose large parts are wrong is soon found out."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        everywhere = places(content)
        small = [path for path in everywhere if not isinstance(at(content, path), dict | list)]
        path = draw(st.sampled_from(draw(st.sampled_from([small or everywhere, small, everywhere])) or [()]))
        value = json.loads(json.dumps(at(content, path)))
        match draw(st.sampled_from(["odd", "scaled", "alike", "dropped", "added", "twice", "any"])):
            case "scaled" if isinstance(value, int | float) and not isinstance(value, bool):
                value = draw(st.sampled_from([-1, 0, 2, 3, 1000, 10**9, 10**18])) * value + draw(
                    st.sampled_from([0, 1, -1])
                )
            case "alike":  # something of the same type from elsewhere in the file
                same = [at(content, p) for p in everywhere if type(at(content, p)) is type(value)]
                value = draw(st.sampled_from(same))
            case "dropped" if isinstance(value, dict | list) and value:
                del value[
                    draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
                ]
            case "added" if isinstance(value, dict):
                value[draw(st.text(max_size=8))] = draw(JSON)
            case "twice" if isinstance(value, list) and value:
                value.append(draw(st.sampled_from(value)))
            case "any":
                value = draw(JSON)
            case _:
                value = draw(ODD)
        content = changed(content, path, value)
    return content


@st.composite
def mutated_text(draw: st.DrawFn, text: str) -> str:
    """The JSON text of a valid file after something has happened to it."""
    match draw(st.sampled_from(["content", "content", "content", "cut", "piece", "any", "twice key"])):
        case "content":
            return json.dumps(draw(mutated(json.loads(text))))
        case "cut":
            return text[: draw(st.integers(0, len(text)))]
        case "piece":
            start = draw(st.integers(0, len(text)))
            stop = draw(st.integers(start, min(len(text), start + 40)))
            return text[:start] + draw(st.text(max_size=8)) + text[stop:]
        case "twice key":
            return text.replace("{", '{"format": 1, "name": [], ', draw(st.integers(0, 3)))
        case _:
            return draw(st.text() | JSON.map(json.dumps))


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file cut short, with some bytes replaced, or with others altogether."""
    match draw(st.sampled_from(["cut", "piece", "piece", "grown", "any"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "piece":
            start = draw(st.integers(0, len(data)))
            stop = draw(st.integers(start, min(len(data), start + 16)))
            return data[:start] + draw(st.binary(max_size=16)) + data[stop:]
        case "grown":
            return data + draw(st.binary(min_size=1, max_size=16))
        case _:
            return draw(st.binary())
