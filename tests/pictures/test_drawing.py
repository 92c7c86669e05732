"""pictures/drawing.py: valid SVG, in the palette's colours, for light and dark pages."""

import re
from xml.etree import ElementTree

from pictures.drawing import page, symbols, text, whisker
from pictures.palette import COLOURS

SVG = "{http://www.w3.org/2000/svg}"


def test_words_stay_words():
    """A < in a title makes the whole file unreadable to a browser."""
    tree = ElementTree.fromstring(page("a < b & c", "n > 3", 70, 50, [text(1, 2, "x < y")]))
    assert ["".join(node.itertext()) for node in tree.iter(f"{SVG}text")] == ["a < b & c", "x < y", "n > 3"]


def test_symbols_are_set_low_and_the_line_goes_on_where_it_was():
    """Without the way back up each index would push the rest of the formula further down."""
    node = ElementTree.fromstring(symbols(1, 2, "B_j A_j x"))
    assert "".join(node.itertext()).replace("\u200b", "") == "Bj Aj x"
    assert sum(float(span.get("dy")) for span in node) == 0


def test_no_background_and_both_modes():
    """A picture with a white ground, or with dark ink alone, is a blot on a dark page."""
    svg = page("title", "", 70, 50, [])
    light, dark = svg.split("@media (prefers-color-scheme:dark)")
    assert "<rect" not in svg
    for index, colour in enumerate(COLOURS[:3]):
        assert f".c{index}{{color:#{bytes(colour).hex()}}}" in light
        (paler,) = re.findall(rf"\.c{index}{{color:#(\w+)}}", dark)
        assert sum(bytes.fromhex(paler)) > sum(colour)


def test_a_whisker_ends_at_its_interval_and_a_short_one_hides_behind_its_dot():
    """A line from the dot outwards that ends before it begins would show an interval that isn't there."""
    long, short = whisker(50, 30, 60, 7, ""), whisker(50, 48, 51, 7, "")
    assert 'd="M30 7L46 7"' in long and 'd="M54 7L60 7"' in long and "<path" not in short
