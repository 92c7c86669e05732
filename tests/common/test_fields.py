"""Numbers and fields from outside against a plain-Python oracle: what passes, and the words of what
doesn't."""

import decimal
import json
import math
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.fields import FLOAT32, LARGEST, Number, check, parse_number, read_field
from common.files import InputError

WHOLE = Number(int, -3, 11)
HALF = Number(float, 0.5, 7, or_0=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=7,
)


def says(function, *args):
    """The line with which a value is refused."""
    with pytest.raises(InputError) as caught:
        function(*args)
    return str(caught.value)


@given(VALUES | st.integers(-5, 13) | st.floats(-1, 8))
@example(10**400)
@example(True)
@example(-0.0)
@example(math.nan)
def test_numbers_of_json(value):
    """Without it true counts as 1, NaN is within all bounds, or 10**400 overflows a comparison."""
    is_int = type(value) is int
    is_number = is_int or type(value) is float
    for number, fits in (
        (WHOLE, is_int and -3 <= value <= 11),
        (HALF, is_number and (0.5 <= value <= 7 or value == 0)),
        (FLOAT32, is_number and -LARGEST <= value <= LARGEST),
    ):
        if fits:
            found = check("f: n", value, number)
            assert found == value and type(found) is number.kind
        else:
            assert says(check, "f: n", value, number).startswith("f: n is ")
    assert float(np.finfo(np.float32).max) == LARGEST


SIGNS = st.sampled_from(["", "-", "+"])
DIGITS = st.text("0123456789", min_size=1, max_size=9)
WRITTEN = st.builds(
    lambda *parts: "".join(parts), SIGNS, DIGITS, st.sampled_from(["", ".", ".5", "e1", "E-2"])
)


@given(WRITTEN | st.text(max_size=6) | st.floats().map(repr) | st.text("0_1²٣.eE+- xinfa", max_size=6))
@example("²")
@example("٣")
@example("1_0")
@example(" 1")
@example("1\n")
@example("0x1")
@example("infinity")
@example("1" * 5000)
@example("1e400")
@example("")
def test_numbers_of_texts(text):
    """Without it "²", digits of another script or "1_000" are numbers, and 5,000 digits a traceback.

    The oracle: the grammar in words, and decimal's arithmetic, which has no largest number."""
    whole = re.fullmatch(r"[+-]?[0123456789]+", text)
    written = re.fullmatch(
        r"[+-]?([0123456789]+\.?[0123456789]*|\.[0123456789]+)([eE][+-]?[0123456789]+)?", text
    )
    for number, is_one in ((WHOLE, whole and len(text) <= 40), (HALF, written)):
        value = decimal.Decimal(text) if is_one else None
        fits = is_one and (number.least <= value <= number.most or (number.or_0 and value == 0))
        if fits:
            assert parse_number("f: n", text, number) == number.kind(value)
        else:
            line = says(parse_number, "f: n", text, number)
            assert line.startswith("f: n is ") and line.endswith(f"expected {number}") and "\n" not in line


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (0, Number(int, 1, 1_000_000), "0, expected a whole number from 1 to 1,000,000"),
        (True, Number(int, 1, 5), "True, expected a whole number from 1 to 5"),
        ("8", Number(float, 0, 0.25), "'8', expected a number from 0 to 0.25"),
        (1e-9, Number(float, 1e-6, 1e6, or_0=True), "1e-09, expected 0 or a number from 1e-06 to 1,000,000"),
        (math.nan, FLOAT32, "nan, expected a number that float32 can hold"),
        (None, str, "None, expected a text"),
        (1, bool, "1, expected true or false"),
        ([], dict, "[], expected an object"),
        ("a", [str], "'a', expected a list of texts"),
        (["a", 5], [str], "['a', 5], expected a list of texts"),
        ({"a": 0}, {str: Number(int, 1, 9)}, "{'a': 0}, expected an object of whole numbers from 1 to 9"),
        ([True], (str, [str]), "[True], expected a text or a list of texts"),
        ([-1], (Number(int, 0, 9), [Number(int, 0, 9)]),
         "[-1], expected a whole number from 0 to 9 or a list of whole numbers from 0 to 9"),
        ({"a": 1}, {str: {str: str}}, "{'a': 1}, expected an object of objects of texts"),
    ],
)  # fmt: skip
def test_the_words(value, kind, words):
    """Without it the line says that something is wrong, but not what to write instead."""
    assert says(check, "config.json: name", value, kind) == f"config.json: name is {words}"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("a\ud800", str),
        (["b", "\udfff"], [str]),
        ({"\ud800": "c"}, {str: str}),
        ("\ud800", (bool, [str], str)),
    ],
)
def test_half_a_surrogate_pair(value, kind):
    """Without it a text that JSON can hold and UTF-8 can't is a traceback where it is tokenized,
    printed or written."""
    line = says(check, "f: name", json.loads(json.dumps(value)), kind)
    assert line.startswith("f: name: character ") and "half a surrogate pair" in line
    line.encode()


def test_fields():
    """Without it null is another value than a missing field, or a needed field may be missing."""
    values = {"r": 5, "gone": None, "name": "x"}
    assert read_field("f", values, "r", WHOLE) == 5
    assert read_field("f", values, "r", WHOLE, 7) == 5
    assert read_field("f", values, "gone", WHOLE, 7) == read_field("f", values, "none", WHOLE, 7) == 7
    assert read_field("f", values, "none", str, None) is None
    assert says(read_field, "f", values, "gone", str) == "f: gone is None, expected a text"
    assert says(read_field, "f", values, "none", str) == "f: none is None, expected a text"
    assert says(read_field, "f", values, "name", WHOLE, 7).startswith("f: name is 'x', expected a whole")


def test_a_long_value_is_cut():
    """Without it one field of 10 MB pushes what was expected off the screen."""
    for line in (says(check, "f: name", "y" * 10**6, WHOLE), says(parse_number, "f: n", "9" * 10**6, WHOLE)):
        assert len(line) < 400 and line.endswith("expected a whole number from -3 to 11")
