"""Routing in colour: the heaviest adapter's, nothing of the text lost."""

import math
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pictures.heat_map import SHADES, heat_map
from pictures.palette import COLOURS, Palette
from pictures.svg import svg_picture
from pictures.terminal import legend, paint

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
colours = st.sampled_from([None, *COLOURS])
mixtures = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.floats(0, 1)), max_size=4, unique_by=lambda pair: pair[0]
)


def test_a_token_has_the_colour_of_its_heaviest_adapter():
    """Without it the picture shows another adapter than the one that worked."""
    palette = Palette()
    plural, roman = palette.colour([["plural", 1.0]]), palette.colour([["roman", 1.0]])
    assert plural != roman and {plural, roman} <= set(COLOURS)
    assert palette.colour([["plural", 0.3], ["roman", 0.7]]) == roman
    assert palette.colour([["roman", 0.3], ["plural", 0.7]]) == plural
    assert palette.colour([["roman", 0.2], ["sort", 0.5], ["plural", 0.3]]) not in (plural, roman)
    assert palette.colour([["plural", 1.0]]) == plural  # a name keeps its colour


def test_no_adapter_no_colour():
    """Without it the base's own tokens look like an adapter's."""
    palette = Palette()
    assert palette.colour([]) is None
    assert palette.colour([["plural", 0.0], ["roman", 0.0]]) is None
    assert paint("text", None) == "text"


def test_what_carries_most_of_a_known_text_has_colours_of_its_own():
    """With more adapters than colours those that answer would look alike, for a trace's first
    tokens name them all."""
    names = [f"a{j}" for j in range(2 * len(COLOURS))]
    begin = ("1", [[name, 1 / len(names)] for name in names])
    heavy = [names[j] for j in (0, len(COLOURS), 1, len(COLOURS) + 1)]
    palette = Palette.of([[begin, *((name, [[name, 1.0]]) for name in heavy)]])
    assert palette.shares()[0][2] == 0.0 and len({palette.colour([[name, 1.0]]) for name in heavy}) == 4
    drawn = svg_picture([begin], [(n, [[n, 1.0]]) for n in heavy])
    found = [re.search(rf'fill="([^"]+)"[^>]*>{name}<', drawn).group(1) for name in heavy]
    assert len(set(found)) == 4


def test_more_adapters_than_colours():
    """Without it the fifteenth adapter is an IndexError."""
    palette = Palette()
    names = [f"task {j}" for j in range(2 * len(COLOURS) + 1)]
    assert [palette.colour([[name, 1.0]]) for name in names] == [*COLOURS, *COLOURS, COLOURS[0]]
    assert len(set(COLOURS)) == len(COLOURS)


@given(st.lists(mixtures, max_size=12))
def test_shares_sum_to_one(tokens):
    """Without it the legend's shares are those of something else than all that was routed."""
    palette = Palette()
    for token in tokens:
        palette.colour(token)
    shares = palette.shares()
    total = sum(weight for token in tokens for _, weight in token)
    assert sum(share for *_, share in shares) == pytest.approx(1.0 if total else 0.0)
    assert [share for *_, share in shares] == sorted((share for *_, share in shares), reverse=True)
    for name, _, share in shares:
        assert share * total == pytest.approx(sum(w for token in tokens for n, w in token if n == name))


def test_a_legend_names_the_heaviest():
    """Without it the adapters that carried the text are cut off, and nothing says so."""
    palette = Palette()
    for j in range(10):
        palette.colour([[f"task {j}", 1.0 + j]])
    line = ESCAPE.sub("", legend(palette, most=3))
    assert line == "■ task 9 18%  ■ task 8 16%  ■ task 7 15%  and 7 more"
    assert "more" not in legend(palette, most=10)
    assert legend(Palette()) == ""


@given(
    st.text(alphabet=st.one_of(st.characters(exclude_characters="\x1b"), st.just("\n"))),
    colours,
    st.booleans(),
)
def test_painting_changes_no_character(text, colour, faint):
    """Without it an answer copied from the terminal is not what the model said."""
    painted = paint(text, colour, faint)
    assert ESCAPE.sub("", painted) == text
    if colour is None:
        assert painted == text


def test_a_colour_ends_with_its_line():
    """Without it a pager or a prompt after the answer stays coloured."""
    red = (214, 60, 70)
    assert paint("a\n\nb\n", red) == "\x1b[38;2;214;60;70ma\x1b[0m\n\n\x1b[38;2;214;60;70mb\x1b[0m\n"
    assert paint("a", red, faint=True) == "\x1b[2;38;2;214;60;70ma\x1b[0m"
    assert paint("", red) == ""


# The heat map -------------------------------------------------------------------------------------

PROMPT = [("", []), ("What", [["plural", 0.3]]), (" is\n", [["roman", 0.001], ["plural", 0.999]])]
ANSWER = [("mi", [["plural", 1.0]]), ("ce", [["roman", 0.5]])]


@pytest.mark.parametrize("encoding, shades", zip(("utf-8", "latin-1"), SHADES, strict=True))
def test_a_heat_map_by_hand(encoding, shades):
    """Without it a shade stands under another token, or prompt and answer can't be told apart."""
    least, some, half, most = (shades[math.ceil(w * (len(shades) - 1))] for w in (0.001, 0.3, 0.5, 1.0))
    assert heat_map(PROMPT, ANSWER, encoding=encoding).splitlines() == [
        "prompt        |What| is\\n",
        f"  82% plural   {some * 4} {most * 5}",
        f"  18% roman         {least * 5}",
        "answer       mi|ce",
        f"  82% plural {most * 2}",
        f"  18% roman     {half * 2}",
        f"{shades[1]} to {shades[-1]}: a weight above 0 to 1, % of all weight",
    ]


def test_nothing_to_show():
    """Without it the base's own answer is an empty map, or a division by zero."""
    assert heat_map([], []) == heat_map([("a", [])], [("b", [["x", 0.0]])]) == "no adapter took part"


def columns_of(text):
    """Terminal columns, counted one character at a time."""
    found = 0
    for character in text:
        wide = unicodedata.east_asian_width(character) in ("W", "F")
        found += 0 if unicodedata.combining(character) else 2 if wide else 1
    return found


odd = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="|"), max_size=9)
tokens = st.lists(
    st.tuples(st.one_of(odd, st.sampled_from(["漢字", "é", " the", "\x1b[2J"])), mixtures), max_size=17
)


@given(tokens, tokens, st.integers(140, 190), st.sampled_from(["utf-8", "ascii", "latin-1"]))
def test_a_heat_map_is_as_wide_as_the_terminal(prompt, answer, width, encoding):
    """Without it a terminal breaks the lines so that no shade stands under its token, or a model's
    answer moves the cursor."""
    lines = heat_map(prompt, answer, width, encoding).split("\n")
    assert all(line.isprintable() for line in lines)
    "".join(lines).encode(encoding)  # raises where it can't
    if len(lines) > 1:
        heads = [line for line in lines if line.startswith(("prompt", "answer", " " * 7))]
        assert "".join(heads).count("|") == len(prompt) + len(answer) - len(heads)
        assert max(map(columns_of, lines)) <= width


def test_a_heat_map_shows_each_token_under_its_text():
    """Without it wrapped lines lose a token, or repeat one."""
    trace = [(f" w{j}", [[f"a{j % 3}", 1.0]]) for j in range(50)]
    lines = heat_map([], trace, 41).splitlines()[:-1]
    assert max(map(len, lines)) <= 41
    shown = [line for line in lines if "|" in line]
    texts = "|".join(line[9:] for line in shown).split("|")
    assert texts == [f" w{j}" for j in range(50)]
    for name in ("a0", "a1", "a2"):
        assert "".join(line for line in lines if line[6:8] == name).count("█") == sum(
            len(text) for text, [[used, _]] in trace if used == name
        )
