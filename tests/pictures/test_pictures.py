"""Routing in colour: the heaviest adapter's, nothing of the text lost."""

import io
import math
import re
import sys
import unicodedata
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.loop import Token
from pictures.heat_map import SHADES, heat_map
from pictures.palette import COLOURS, GREY, STYLES, Palette
from pictures.svg import svg_picture
from pictures.terminal import Printer, legend, paint

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
colours = st.sampled_from([None, *COLOURS])
mixtures = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.floats(0, 1)), max_size=4, unique_by=lambda pair: pair[0]
)


EVERY = "".join(map(chr, range(0x3000))) + "\U000e0041\ud800\udfff\ufdd0\ufffe\uffff\u3000"


def test_a_picture_of_any_text_is_xml():
    """XML 1.0 forbids most control characters, even as references: one of them in an answer, and a
    browser shows an error where the picture should be."""
    trace = [(EVERY[j : j + 7], [[f"a{EVERY[j : j + 3]}", 1.0]]) for j in range(0, len(EVERY), 7)]
    drawn = svg_picture(trace, trace)
    shown = "".join(text for text in ElementTree.fromstring(drawn.encode()).itertext())
    assert "\\x1b" in shown and "\\u202e" in shown and "\\ufffe" in shown and "\\ud800" in shown
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in shown if c != "\n")


def test_what_a_terminal_gets_of_a_trace():
    """Without it the heat map of /route or a legend carries out what a model or a name says."""
    some = EVERY[:0xB0] + EVERY[0x2000:0x2070] + EVERY[0x3000:]
    trace = [(some[j : j + 7], [[f"a{some[j : j + 3]}", 1.0]]) for j in range(0, len(some), 7)]
    palette = Palette()
    for _, adapters in trace:
        palette.colour(adapters)
    for shown in (heat_map(trace, trace), ESCAPE.sub("", legend(palette))):
        assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in shown if c != "\n")
        assert "\u202e" not in shown


class Screen(io.StringIO):
    """A standard output that is a terminal, or none."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("routing", [True, False])
def test_an_answer_is_exact_only_in_a_pipe(terminal, routing, monkeypatch):
    """Without it a model that says an escape sequence clears the screen; or a program that reads the
    answers gets another text than the model wrote."""
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    said = "a\tb\r\x1b[2J\u202e\n"
    with Printer(1, routing) as printer:
        printer.begin([[(said, [["one", 1.0]])]])
        printer.push(Token(0, 5, said, [["one", 1.0]], "eos"))
    exact = not (terminal or routing)
    want = said if exact else "a\tb\\r\\x1b[2J\\u202e\n"
    shown = screen.getvalue() if exact else ESCAPE.sub("", screen.getvalue())
    assert shown == (want if not routing else 2 * want + "■ one 100%\n")


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
    assert palette.colour([["plural", 0.5], ["roman", 0.5]]) is None  # as with uniform: none leads
    assert paint("text", None) == "text"


# How people without one kind of cones see linear sRGB: Machado, Oliveira and Fernandes 2009,
# "A physiologically-based model for simulation of color vision deficiency", severity 1.
SEEN = {
    "all": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB, D65


def linear(colours):
    """sRGB of 0 to 255 -> light of 0 to 1."""
    values = np.array(colours) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(light):
    """Linear sRGB -> CIELAB."""
    xyz = light @ XYZ.T / XYZ.sum(1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def test_cielab_of_known_colours():
    """Without it the distances below are those of another space: sRGB's red has L* 53.24, a* 80.09,
    b* 67.20."""
    assert lab(linear([[255, 0, 0], [255, 255, 255]])) == pytest.approx(
        np.array([[53.24, 80.09, 67.20], [100, 0, 0]]), abs=0.05
    )


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_stay_apart(eyes):
    """Without it two adapters look alike to one man in twelve. A distance of 2.3 is just noticeable
    where two colours touch; words stand apart."""
    seen = lab(np.clip(linear([*COLOURS, GREY]) @ SEEN[eyes].T, 0, 1))
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1) + 1000 * np.eye(len(seen))
    assert len(COLOURS) == 8
    assert apart[:8, :8].min() > (26 if eyes == "all" else 17.5)
    assert apart[:4, :4].min() > 36
    assert apart[8].min() > 14


def test_colours_are_legible():
    """Without it an adapter's text is too pale on a page, or too dark on a terminal."""
    luminance = linear([*COLOURS, GREY, (30, 30, 30)]) @ XYZ[1]
    assert (1.05 / (luminance[:-1] + 0.05)).min() >= 3
    assert ((luminance[:-1] + 0.05) / (luminance[-1] + 0.05)).min() >= 3


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
    """Without it the ninth adapter is an IndexError, or looks like the first."""
    palette = Palette()
    names = [f"task {j}" for j in range(2 * len(COLOURS) + 1)]
    assert [palette.colour([[name, 1.0]]) for name in names] == [*COLOURS, *COLOURS, COLOURS[0]]
    assert len(set(COLOURS)) == len(COLOURS)
    many = Palette(map(str, range(len(COLOURS) * len(STYLES))))
    painted = {paint("text", many.colour([[name, 1.0]]), many.style(name)) for name in list(many.weight)}
    assert len(painted) == len(many.weight)
    assert many.style("0") == many.style(None) == ""


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
    palette.colour([["few", 1.0], ["fewer", 0.5]])
    line = ESCAPE.sub("", legend(palette, most=3))
    assert line.startswith("■ task 9 18%  ■ task 8 16%  ■ task 7 14%  ■ task 6 12%  ")
    assert line.endswith("■ task 1 4%  3 others 4%")  # of 56.5: task 0 and few 1, fewer 0.5
    assert ESCAPE.sub("", legend(palette, most=11)).endswith("  1 other 1%")
    assert "other" not in legend(palette, most=12)
    assert legend(palette).count("\x1b[4;38;2;") == len(list(palette.weight)[len(COLOURS) : 10])
    assert legend(Palette()) == ""


@given(
    st.text(alphabet=st.one_of(st.characters(exclude_characters="\x1b"), st.just("\n"))),
    colours,
    st.sampled_from(["bold", *STYLES]),
)
def test_painting_changes_no_character(text, colour, style):
    """Without it an answer copied from the terminal is not what the model said."""
    painted = paint(text, colour, style)
    assert ESCAPE.sub("", painted) == text
    if colour is None:
        assert painted == text


def test_a_colour_ends_with_its_line():
    """Without it a pager or a prompt after the answer stays coloured."""
    red = (214, 60, 70)
    assert paint("a\n\nb\n", red) == "\x1b[38;2;214;60;70ma\x1b[0m\n\n\x1b[38;2;214;60;70mb\x1b[0m\n"
    assert paint("a", red, "bold italic") == "\x1b[1;3;38;2;214;60;70ma\x1b[0m"
    assert paint("", red) == ""


# The picture --------------------------------------------------------------------------------------


def texts_of(picture, label=False):
    """An SVG's <text>s as (y, x, text, attributes), labels or all others."""
    root = ElementTree.fromstring(picture)
    found = []
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        if (element.get("class") == "label") == label:
            found.append((float(element.get("y")), float(element.get("x")), element.text, element))
    return found


anything = st.lists(st.tuples(st.text(max_size=12), mixtures), max_size=7)


@given(anything, anything)
def test_the_picture_holds_the_whole_text(prompt, answer):
    """Without it a token is lost, or a control character makes the file one that no browser opens."""
    labels = texts_of(svg_picture(prompt, answer), label=True)
    assert [text for _, _, text, _ in labels[:2]] == ["Prompt", "The model's answer"]
    legend_y = labels[2][0] if labels[2:] else math.inf
    drawn = texts_of(svg_picture(prompt, answer))
    for trace, top, bottom in ((prompt, 0, labels[1][0]), (answer, labels[1][0], legend_y)):
        text = re.sub("[\n ]", "", "".join(text.expandtabs(4) for text, _ in trace))
        spaced = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
        want = "".join(c if c.isprintable() else repr(c)[1:-1] for c in spaced)
        assert "".join(text for y, _, text, _ in drawn if top < y < bottom) == want


def test_a_picture_by_hand():
    """Without it a word stands over another, the legend explains other colours than the text has,
    or what no adapter of the legend leads can't be told from it without colours."""
    names = [f"a{j}" for j in range(8)]
    heavy = [(f"w{j} ", [[name, 1.0 - j / 16]]) for j, name in enumerate(names)]
    prompt = [("two\nlines", [["a0", 1.0]]), (" 漢字", [["a1", 0.75], ["a0", 0.25]]), ("!", [["a0", 1.0]])]
    picture = svg_picture(prompt, [*heavy, ("none", [])])
    shown = [(y, x, text, element.get("fill")) for y, x, text, element in texts_of(picture)]
    first, second, *_ = fills = [f"#{bytes(colour).hex()}" for colour in COLOURS[:6]]
    top = shown[0][0]
    assert shown[:4] == [
        (top, 16, "two", first), (top + 24, 16, "lines", first),
        (top + 24, 16 + 9.6 * 6, "漢字", second), (top + 24, 16 + 9.6 * 10, "!", first),
    ]  # fmt: skip
    grey = f"#{bytes(GREY).hex()}"
    assert [(text, fill) for _, _, text, fill in shown[4:13]] == [
        *((f"w{j}", fill) for j, fill in enumerate([*fills, grey, grey])), ("none", grey)
    ]  # fmt: skip
    legend = [(text, fill) for _, _, text, fill in shown[13:]]
    assert legend == [
        (f"■ a{j} {share}%", fill)
        for j, (share, fill) in enumerate(zip((35, 18, 9, 9, 8, 7), fills, strict=True))
    ] + [("■ 2 others 13%", grey)]
    thin = {element.get("fill") for *_, element in texts_of(picture) if element.get("class") == "rest"}
    assert thin == {grey}


def test_a_picture_is_as_wide_as_its_lines():
    """Without it a long answer runs out of the picture."""
    answer = [(f" word{j}", [["a", 1.0]]) for j in range(100)]
    picture = svg_picture([], answer, width=61)
    ends = [x + float(element.get("textLength")) for _, x, _, element in texts_of(picture)]
    across = float(ElementTree.fromstring(picture).get("width"))
    assert 16 + 9.6 * 55 < max(ends) <= 16 + 9.6 * 61 and across == pytest.approx(max(ends) + 16)


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
