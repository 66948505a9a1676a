from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.runtime.data import DataError
from gpp.runtime.number_fields import Fields, split, whole_numbers


def fields(*lines: str, columns: int = 3) -> Fields:
    return split([line.encode() for line in lines], columns, Path("file"), np.arange(len(lines)) + 10)


DECIMAL = st.one_of(st.none(), st.integers(-(10**18) + 1, 10**18 - 1))
HEXADECIMAL = st.one_of(st.none(), st.integers(0, 2**32 - 1))


@given(
    st.lists(st.tuples(DECIMAL, HEXADECIMAL, DECIMAL), min_size=1, max_size=12), st.sampled_from(["x", "08X"])
)
def test_numbers_are_what_python_reads(
    rows: list[tuple[int | None, int | None, int | None]], form: str
) -> None:
    def text(value: int | None, form: str) -> str:
        return "" if value is None else format(value, form)

    found = fields(*("\t".join((text(a, "d"), text(b, form), text(c, "d"))) for a, b, c in rows))
    decimal = whole_numbers(found, [2, 0], base=10, digits=18)
    assert decimal.tolist() == [[c or 0, a or 0] for a, _, c in rows]
    assert whole_numbers(found, [1], base=16, digits=8).tolist() == [[b or 0] for _, b, _ in rows]
    assert found.filled([0]).tolist() == [[a is not None] for a, _, _ in rows]


@pytest.mark.parametrize("text", ["-", "1.5", "1e3", "+1", " 1", "0x1", "a", "1-", "--1", "é", "1" * 19])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(DataError, match=r"^file, line 13: column 3 must be a whole number, or empty, it is"):
        whole_numbers(fields("1\t2\t3", f"{text}\t2\t3", f"1\t2\t{text}"), [1, 2], base=10, digits=18)


@pytest.mark.parametrize("text", ["g", "-1", "123456789", "0x12"])
def test_what_is_no_hexadecimal_number(text: str) -> None:
    with pytest.raises(DataError, match=rf"line 12: column 1 .* hexadecimal number of at most 8 .* '{text}'"):
        whole_numbers(fields("ff\t\t", f"{text}\t\t"), [0], base=16, digits=8)


@pytest.mark.parametrize(("lines", "bad", "count"), [
    (("1\t2\t3", "1\t2"), 12, 2),
    (("1", "1\t2\t3\t4\t5"), 11, 1),
    (("1\t2\t3", "1\t2\t3\t"), 12, 4),
    (("",), 11, 1),
])  # fmt: skip
def test_a_line_with_other_columns(lines: tuple[str, ...], bad: int, count: int) -> None:
    with pytest.raises(DataError, match=rf"^file, line {bad}: it has {count} columns .* it must have 3$"):
        fields(*lines)


def test_of_no_lines_there_are_no_numbers() -> None:
    assert whole_numbers(fields(), [0, 1], base=10, digits=18).shape == (0, 2)
