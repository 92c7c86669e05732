"""Text from outside on its way to a terminal."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from common.printable import printable, shown

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


def test_long_values_lose_their_middle():
    """Without it one field of a file could fill the terminal; its end tells values apart, too."""
    assert printable("abcdefghijklm", 7) == "abcd…lm"
    assert len(shown(["x" * 10**6])) == 200
    assert shown("a\n") == "'a\\n'"
