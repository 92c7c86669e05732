"""A dataclass becomes a command line; the comment beside a field is its help text.

So a script's dataclass is the one place that lists its options. Field names are the option names,
defaults are the defaults, and types are checked. The error for an unknown option names the nearest
known one.
"""

import argparse
import difflib
import inspect
import io
import math
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import MISSING, fields
from typing import Any

from common.files import MESSAGE, InputError
from common.printable import printable


class Least(typing.NamedTuple):
    """The bounds of an option, written beside its field: Annotated[int, Least(1)]."""

    value: float  # the smallest allowed
    below: float = math.inf  # the option must be less than this


# The types of most options that are numbers.
Count = typing.Annotated[int, Least(1)]
Whole = typing.Annotated[int, Least(0)]
NotNegative = typing.Annotated[float, Least(0)]
Above0 = typing.Annotated[float, Least(1e-6)]
Seed = typing.Annotated[int, Least(0, 2**63)]


def check_bounds(args: Any) -> None:
    """Raises InputError for an option outside the bounds beside its field."""
    hints = typing.get_type_hints(type(args), include_extras=True)
    for field in fields(args):
        value = getattr(args, field.name)
        for bound in getattr(hints[field.name], "__metadata__", ()):
            if value >= bound.below:
                raise InputError(f"--{field.name} is {value}, expected less than {bound.below}")
            if not value >= bound.value:  # true of NaN too
                raise InputError(f"--{field.name} is {value}, expected at least {bound.value}")


def nearest(name: str, names: Iterable[str]) -> str:
    """', did you mean X?' for the closest of `names`, or '' where none is close."""
    close = difflib.get_close_matches(str(name), list(map(str, names)), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""


def numbers(option: str, text: str, kind: type = int, comma: str = ",") -> list[float]:
    """ "1,2,4" -> [1, 2, 4], all above 0. Raises InputError."""
    try:
        found = list(map(kind, text.split(comma)))
    except ValueError:
        found = [0]
    if not all(value > 0 for value in found):
        expected = f"numbers above 0 with {comma!r} between them"
        raise InputError(f"{option} is {text!r}, expected {expected}")
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """Prints one line and exits with status 2; argparse would print the whole usage first."""
        self.exit(2, f"error: {printable(message, MESSAGE)} (see --help)\n")


def _comments(cls):
    """{field name: the comment beside it}, read from the source of `cls` and its bases."""
    sources = map(inspect.getsource, cls.__mro__[:-1])
    source = "".join(map(textwrap.dedent, sources))
    names = {field.name for field in fields(cls)}
    found = {}
    line_name = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in names:
            line_name.setdefault(token.start[0], token.string)
        elif token.type == tokenize.COMMENT and token.start[0] in line_name:
            found.setdefault(line_name[token.start[0]], token.string.lstrip("# "))
    return found


def _option_name(field):
    return f"--{field.name.rstrip('_')}"  # list_ is --list


def build_parser(
    cls: type,
    prog: str | None = None,
    description: str | None = None,
    choices: dict[str, Collection[str]] | None = None,
) -> argparse.ArgumentParser:
    """An ArgumentParser for dataclass `cls`.

    Fields may be str, int, float, bool, Literal, list[str], and each of them `| None`. `choices`
    {field: values} is for fields whose values are listed in a table elsewhere.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, add_help=True)
    help_texts = _comments(cls)
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
        default = field.default if field.default_factory is MISSING else field.default_factory()
        text = help_texts.get(field.name, "")
        shown = "" if default in (None, [], "", MISSING) else f" (default: {default})"
        options = {
            "dest": field.name,
            "default": default,
            "help": (text + shown).replace("%", "%%"),
            "required": default is MISSING,
        }
        if field.name in (choices or {}):
            options |= {"choices": tuple(choices[field.name])}
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options |= {"action": "append", "default": None, "metavar": "TEXT"}
        elif typing.get_origin(kind) is typing.Literal:
            options |= {"choices": typing.get_args(kind), "type": type(typing.get_args(kind)[0])}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(_option_name(field), **options)
    return parser


def parse_args(
    cls: type,
    argv: list[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    choices: dict[str, Collection[str]] | None = None,
) -> Any:
    """Command line -> instance of `cls`. A bad option prints one line and exits with status 2."""
    parser = build_parser(cls, prog, description, choices)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        if not unknown[0].startswith("-"):
            parser.error(f"unknown argument {unknown[0]!r}: every option begins with --")
        option = unknown[0].split("=")[0]
        names = map(_option_name, fields(cls))
        parser.error(f"unknown option {unknown[0]}{nearest(option, names)}")
    values = {name: value for name, value in vars(known).items() if value is not None}
    return cls(**values)


def parse_command(
    commands: dict[str, type],
    argv: list[str] | None = None,
    description: str | None = None,
    choices: dict[str, Collection[str]] | None = None,
) -> tuple[str, Any]:
    """`script COMMAND --options`: {name: dataclass} -> (name, instance)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(description=description, add_help=True, allow_abbrev=False)
    parser.add_argument("command", help=" | ".join(commands) + "; COMMAND --help lists its options")
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(argv or ["--help"])
    if argv[0] not in commands:
        hint = nearest(argv[0], commands) or ", one of " + ", ".join(commands)
        parser.error(f"unknown command {argv[0]!r}{hint}")
    prog = f"{parser.prog} {argv[0]}"
    return argv[0], parse_args(commands[argv[0]], argv[1:], prog, choices=choices)
