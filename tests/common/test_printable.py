"""Text from outside on its way to a terminal."""

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from common.printable import JOINERS, in_lines, json_line, printable, shown

ANY = st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs, too


def test_what_a_terminal_would_obey():
    """Without it a name could clear the screen, begin a new line, or turn the text after it round."""
    assert printable("a\x1b[2Jb\rc\nd\x7f\x9b") == "a\\x1b[2Jb\\rc\\nd\\x7f\\x9b"
    assert printable("a\u202eb\u2028c\ud800") == "a\\u202eb\\u2028c\\ud800"
    assert printable("zażółć 日本 👩\u200d🚀 \\n") == "zażółć 日本 👩\u200d🚀 \\n"


@given(ANY, st.integers(11, 97))
def test_any_text(text, most):
    """Without it some character that nobody thought of would still reach the terminal."""
    line = printable(text, most)
    assert len(line) <= most and line.splitlines() in ([], [line])
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in line)
    if text.isascii() and text.isprintable() and len(text) <= most:
        assert line == text


@given(ANY)
def test_any_text_in_lines(text):
    """Without it an answer loses its lines, or a model's escape sequence is obeyed."""
    lines = in_lines(text)
    assert lines.count("\n") == text.count("\n") and lines.count("\t") == text.count("\t")
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in lines if c not in "\n\t")


@given(st.dictionaries(st.text(), st.text() | st.lists(st.floats(allow_nan=False))))
def test_json_is_the_same_value_and_hurts_no_terminal(value):
    """Without it `generate.py --json` writes DEL, C1 and marks that reorder text as they are; or a
    program reads another text than the model wrote, or, where the output is Latin-1, no JSON."""
    for encoding in ("utf-8", "latin-1"):
        line = json_line(value, encoding)
        assert json.loads(line.encode(encoding) if encoding == "utf-8" else line.encode("ascii")) == value
        hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert not any(unicodedata.category(c) in hidden for c in line if c not in JOINERS)
    assert json_line("é\x7f\u202e\U000e0041") == '"é\\u007f\\u202e\\udb40\\udc41"'


def test_long_values_lose_their_middle():
    """Without it one field of a file could fill the terminal; its end tells values apart, too."""
    assert printable("abcdefghijklm", 7) == "abcd…lm"
    assert len(shown(["x" * 10**6])) == 200
    assert shown("a\n") == "'a\\n'"
