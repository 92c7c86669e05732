"""Text in columns of one width: what is printed of it, and how many columns that takes."""

import unicodedata


def visible(text: str) -> str:
    """`text` on one line: every kind of space is one, line breaks and what can't be printed are
    escaped."""
    shown = ""
    for c in text:
        space = unicodedata.category(c) == "Zs"
        shown += " " if space else c if c.isprintable() else repr(c)[1:-1]
    return shown


def columns(text: str) -> int:
    """The columns that a text takes: Chinese characters take two, accents none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
