import json
import math
from dataclasses import dataclass
from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.records import LARGEST, MOST, RecordError, from_json, to_json


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float = 0.0

    def __post_init__(self):
        if self.y == -1:
            raise Unlucky("y must not be -1")


class Unlucky(ValueError):
    pass


@dataclass(frozen=True, slots=True)
class Named:
    name: str
    at: Point


@dataclass(frozen=True, slots=True)
class Map:
    places: tuple[Named, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    name: str
    points: tuple[Point, ...]
    colour: Colour
    closed: bool = False
    origin: Point | None = None
    names: tuple[tuple[str, ...], ...] = ()


FORM = "drawing/1"
SQUARE = Drawing("square", (Point(0), Point(1, 2.5)), Colour.BLUE, True, Point(3), (("a", "b"), ()))

WORDS = st.text().filter(str.isprintable)
NUMBERS = st.floats(-LARGEST, LARGEST).filter(lambda y: y != -1) | st.sampled_from([math.inf, -math.inf])

records = st.builds(
    Drawing,
    name=WORDS,
    points=st.lists(st.builds(Point, x=st.integers(-MOST, MOST), y=NUMBERS), max_size=3).map(tuple),
    colour=st.sampled_from(Colour),
    closed=st.booleans(),
    origin=st.none() | st.builds(Point, x=st.integers(-MOST, MOST)),
    names=st.lists(st.lists(WORDS, max_size=2).map(tuple), max_size=2).map(tuple),
)


@given(records)
def test_there_and_back(record: Drawing):
    assert from_json(Drawing, to_json(record, FORM), FORM) == record


def test_the_text_is_the_same_for_the_same_record_and_says_what_it_is():
    text = to_json(SQUARE, FORM)
    assert text == to_json(from_json(Drawing, text, FORM), FORM)
    assert json.loads(text)["format"] == FORM
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_fields_with_defaults_may_be_left_out_and_whole_numbers_are_floats_too():
    text = json.dumps({"format": FORM, "name": "dot", "points": [{"x": 1, "y": 2}], "colour": "red"})
    read = from_json(Drawing, text, FORM)
    assert read == Drawing("dot", (Point(1, 2.0),), Colour.RED)
    assert isinstance(read.points[0].y, float)


def changed(**changes: object) -> str:
    data = json.loads(to_json(SQUARE, FORM))
    data.update(changes)
    return json.dumps({key: value for key, value in data.items() if value is not ...})


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "malformed JSON"),
        ("[]", 'the key "format" must be "drawing/1", it is \'list\''),
        ("{}", "it is None"),
        ("[" * 100_000, "malformed JSON"),
        (changed(format="drawing/2"), "it is 'drawing/2'"),
        (changed(colour=...), "Drawing lacks the key 'colour'"),
        (changed(colour="green"), r"Drawing\.colour must be one of 'red', 'blue', it is 'green'"),
        (changed(size=1), "Drawing has no key 'size'; it has closed, colour"),
        (changed(points={}), r"Drawing\.points must be a list, it is dict"),
        (changed(points=[1]), r"Drawing\.points\[0\] must be an object, it is int"),
        (changed(points=[{"x": 0}, {"x": "1"}]), r"Drawing\.points\[1\]\.x must be of type int, it is '1'"),
        (changed(points=[{"x": True}]), "must be of type int, it is True"),
        (changed(points=[{"x": 1.5}]), "must be of type int, it is 1.5"),
        (changed(points=[{"x": 1, "y": float("nan")}]), r"points\[0\]\.y must be of type float, it is nan"),
        (changed(closed=1), r"Drawing\.closed must be of type bool, it is 1"),
        (changed(name=None), r"Drawing\.name must be of type str, it is None"),
        (changed(names=[["a", 1]]), r"Drawing\.names\[0\]\[1\] must be of type str"),
        (changed(origin=[1]), r"Drawing\.origin must be an object"),
    ],
)
def test_an_error_names_the_place(text, message):
    with pytest.raises(RecordError, match=message):
        from_json(Drawing, text, FORM)


def test_a_broken_rule_is_told_with_its_place_and_the_name_of_what_breaks_it():
    text = to_json(Map((Named("north", Point(1)), Named("south", Point(2)))), FORM)
    with pytest.raises(Unlucky, match=r"^Map\.places\[1\] \(south\)\.at: y must not be -1$"):
        from_json(Map, text[::-1].replace("0.0", "1-", 1)[::-1], FORM)
    with pytest.raises(Unlucky, match=r"^y must not be -1$"):
        from_json(Point, json.dumps({"format": FORM, "x": 1, "y": -1}), FORM)
