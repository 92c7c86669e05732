"""Numbers and fields that come from outside, checked: those of JSON, of metadata, of options.

Each use says what kind of value it expects: a Number for a number with bounds, str for a text, bool
for true or false, dict for an object, [kind] for a list, {str: kind} for an object of them, and
(kind, kind) for any of several. What doesn't fit is refused in the same words everywhere: file and
field, what was found, what was expected.
"""

import numbers
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import InputError, check_text
from common.printable import printable, shown

LARGEST = (2 - 2**-23) * 2.0**127  # float32's


@dataclass(frozen=True)
class Number:
    """Numbers of `kind` int or float from `least` to `most`; with `or_0` also 0."""

    kind: type
    least: float
    most: float
    or_0: bool = False

    def has(self, value: object) -> bool:
        """Whether `value` is one of them, numpy's included. True and False are none, though Python
        counts with them."""
        known = numbers.Integral if self.kind is int else numbers.Real
        if not isinstance(value, known) or isinstance(value, bool):
            return False
        return self.least <= value <= self.most or (self.or_0 and value == 0)

    def __str__(self) -> str:
        zero = "0 or " if self.or_0 else ""
        return f"{zero}a {self._name} {self._bounds}"

    @property
    def many(self) -> str:
        """The same in the plural."""
        return f"{self._name}s {self._bounds}"

    @property
    def _name(self):
        return "whole number" if self.kind is int else "number"

    @property
    def _bounds(self):
        if self.most == LARGEST:
            return "that float32 can hold"
        form = "," if self.kind is int else ",.7g"
        return f"from {self.least:{form}} to {self.most:{form}}"


FLOAT32 = Number(float, -LARGEST, LARGEST)
POSITIVE = Number(float, 1e-30, 1e30)  # in float32, too, these are above 0 and finite
# ASCII digits alone: int() and float() also read "1_000" and other scripts' digits, and int()
# raises an error of its own for thousands of digits.
SYNTAX = {
    int: re.compile("[-+]?[0-9]{1,40}"),
    float: re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"),
}


def check(where: str, value: Any, kind: Any) -> Any:
    """`value`, where it is of `kind`; a number becomes an int or a float, as its Number says.

    Raises InputError, which begins with `where`: the file or option, and the field.
    """
    if not _fits(where, value, kind):
        raise InputError(f"{where} is {shown(value)}, expected {_words(kind)}")
    return kind.kind(value) if isinstance(kind, Number) else value


def parse_number(where: str, text: str, number: Number) -> int | float:
    """The number that a text holds: a value of metadata or of an option. Raises InputError."""
    is_number = SYNTAX[number.kind].fullmatch(text)
    value = number.kind(text) if is_number else None
    if not number.has(value):
        found = printable(text) if is_number else shown(text)
        raise InputError(f"{where} is {found}, expected {number}")
    return value


def read_field(file: Path | str, values: dict, name: str, kind: Any, *default: Any) -> Any:
    """values[name], where it is of `kind`. Where it is missing or null, the `default`, if one is
    given. Raises InputError."""
    if default and values.get(name) is None:
        return default[0]
    return check(f"{file}: {name}", values.get(name), kind)


def _fits(where, value, kind):
    """Whether `value` is of `kind`. Raises InputError where a text in it is not UTF-8."""
    if isinstance(kind, Number):
        return kind.has(value)
    if isinstance(kind, tuple):
        return any(_fits(where, value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(where, one, kind[0]) for one in value)
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return False
        within = kind[str]
        return all(_fits(where, k, str) and _fits(where, v, within) for k, v in value.items())
    if kind is str and isinstance(value, str):
        check_text(value, where)
    return isinstance(value, kind)


PLAIN = {str: ("a text", "texts"), bool: ("true or false", "true or false"), dict: ("an object", "objects")}


def _words(kind, many=False):
    """The kind in words; `many`: in the plural."""
    if isinstance(kind, Number):
        return kind.many if many else str(kind)
    if isinstance(kind, tuple):
        return " or ".join(_words(one, many) for one in kind)
    if isinstance(kind, list):
        return f"{'lists' if many else 'a list'} of {_words(kind[0], True)}"
    if isinstance(kind, dict):
        return f"{'objects' if many else 'an object'} of {_words(kind[str], True)}"
    return PLAIN[kind][many]
