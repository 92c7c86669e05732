"""Text from outside made printable: names, samples, fields and messages in files that others wrote.

A terminal obeys control characters, so an adapter's name could recolour it, retitle it, or hide the
text beside it. Whatever comes from a file, an option or a library and is shown to a person passes
through here: errors, warnings, lists, legends, and answers on a terminal.
"""

import codecs
import json
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


def in_lines(text: str) -> str:
    """`text` as a terminal or a web page can show it, with its line breaks and tabs: every other
    hidden character is written as its escape."""
    return "".join(c if c in "\n\t" else _escape(c) for c in text)


def json_line(value: object, encoding: str = "utf-8") -> str:
    """`value` as JSON on one line. Hidden characters are \\u escapes, of which json.loads makes the
    same text; so is what isn't ASCII where `encoding`, the output's, isn't UTF-8."""
    line = json.dumps(value, ensure_ascii=codecs.lookup(encoding).name != "utf-8")
    return "".join(json.dumps(c)[1:-1] if _is_hidden(c) else c for c in line)


def _escape(character):
    return character.encode("unicode_escape").decode() if _is_hidden(character) else character


def _is_hidden(character):
    return unicodedata.category(character) in HIDDEN and character not in JOINERS


def _cut(text, most):
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[len(text) - end :]}"
