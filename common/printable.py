"""Text from outside made printable: names, samples, fields and messages in files that others wrote.

A terminal obeys control characters, so an adapter's name could recolour it, retitle it, or hide the
text beside it. Whatever comes from a file, an option or a library and is shown to a person passes
through here: errors, warnings, lists, legends.
"""

import unicodedata

# Controls, invisible marks that reorder text, halves of surrogate pairs, line and paragraph ends.
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # within emoji, and within words of Persian and Hindi


def printable(text: object, most: int = 200) -> str:
    """`text` on one line, every hidden character written as its escape, such as \\x1b. Where it is
    longer than `most` characters its middle becomes …"""
    line = "".join(map(_escape, _cut(str(text), most)))
    return _cut(line, most)  # escapes are longer than what they stand for


def shown(value: object, most: int = 200) -> str:
    """repr() of a value as an error message shows it: printable, and cut where it is long."""
    return printable(repr(value), most)


def _escape(character):
    hidden = unicodedata.category(character) in HIDDEN and character not in JOINERS
    return character.encode("unicode_escape").decode() if hidden else character


def _cut(text, most):
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[len(text) - end :]}"
