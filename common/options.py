"""A dataclass becomes a command line; the comment beside a field is its help text.

So a script's dataclass is the one place that lists its options. Field names are the option names,
defaults are the defaults, and types are checked. The error for an unknown option names the nearest
known one.
"""

import argparse
import difflib
import inspect
import io
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import MISSING, fields
from functools import partial
from typing import Any

from common.fields import FLOAT32, Number, check, parse_number
from common.files import MESSAGE, InputError
from common.printable import printable, shown

# Most options that are numbers, with the bounds that parse_args checks. The upper ends lie far above
# what anybody uses and far below what hangs, overflows or fills a memory.
COUNT = Number(int, 1, 1_000_000)
ABOVE_0 = Number(float, 1e-6, 1e6)
Count = typing.Annotated[int, COUNT]
Whole = typing.Annotated[int, Number(int, 0, 1_000_000)]
NewTokens = typing.Annotated[int, Number(int, 1, 10**12)]  # the context ends an answer before
BatchSize = typing.Annotated[int, Number(int, 1, 65_536)]
Rank = typing.Annotated[int, Number(int, 1, 65_536)]
NotNegative = typing.Annotated[float, Number(float, 0, 1e6)]
Above0 = typing.Annotated[float, ABOVE_0]
Above0OrOff = typing.Annotated[float, Number(float, 1e-6, 1e6, or_0=True)]  # 0 is off
Share = typing.Annotated[float, Number(float, 1e-6, 1, or_0=True)]
ShareAbove0 = typing.Annotated[float, Number(float, 1e-9, 1)]
Seed = typing.Annotated[int, Number(int, 0, 2**63 - 1)]
Counts = typing.Annotated[str, COUNT]  # a text that holds numbers: "1,2,4"
# The bounds of an option whose type is a plain int or float.
BOUNDS = {int: Number(int, -(2**63), 2**63 - 1), float: FLOAT32}


def numbers_of(cls: type) -> dict[str, Number]:
    """{field: its bounds} of the fields of an options dataclass that are numbers, or lists of some."""
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        kinds = {hint, *typing.get_args(hint)}  # of int | None: both
        for kind in kinds & BOUNDS.keys():
            found[name] = BOUNDS[kind]
        for bound in getattr(hint, "__metadata__", ()):
            found[name] = bound
    return found


def check_bounds(args: Any) -> None:
    """Raises InputError for an option outside the bounds beside its field: for options that came
    from Python, as parse_args checks its own. numpy's numbers become Python's."""
    for name, number in numbers_of(type(args)).items():
        value = getattr(args, name)
        if isinstance(value, str):
            _parse_list(f"--{name}", value, number)
        elif value is not None:
            setattr(args, name, check(f"--{name}", value, number))


def nearest(name: str, names: Iterable[str]) -> str:
    """', did you mean X?' for the closest of `names`, or '' where none is close."""
    close = difflib.get_close_matches(str(name), list(map(str, names)), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""


def numbers(option: str, text: str, number: Number = COUNT, comma: str = ",") -> list[int | float]:
    """ "1,2,4" -> [1, 2, 4], each within the bounds of `number`. Raises InputError."""
    try:
        return [parse_number(option, part.strip(), number) for part in text.split(comma)]
    except InputError:
        expected = f"{number.many} with {comma!r} between them"
        raise InputError(f"{option} is {shown(text)}, expected {expected}") from None


def _parse_list(option, text, number):
    """The text as it is, where it holds numbers or nothing."""
    if text:
        numbers(option, text, number)
    return text


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

    Fields may be str, int, float, bool, Literal, list[str], and each of them `| None`; numbers are
    checked as they are parsed. A text with the metadata {"positional": True} is given by its place,
    without an option's name. `choices` {field: values} is for fields whose values are listed in a
    table elsewhere.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, add_help=True)
    help_texts = _comments(cls)
    hints = typing.get_type_hints(cls)
    bounds = numbers_of(cls)
    for field in fields(cls):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
        default = field.default if field.default_factory is MISSING else field.default_factory()
        text = help_texts.get(field.name, "")
        if field.metadata.get("positional"):
            parser.add_argument(field.name, metavar=field.name.upper(), help=text.replace("%", "%%"))
            continue
        default_text = "" if default in (None, [], "", MISSING) else f" (default: {default})"
        options = {
            "dest": field.name,
            "default": default,
            "help": (text + default_text).replace("%", "%%"),
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
            options |= {"metavar": kind.__name__.upper()}
        if number := bounds.get(field.name):
            parse = _parse_list if kind is str else parse_number
            options["type"] = partial(parse, _option_name(field), number=number)
        parser.add_argument(_option_name(field), **options)
    return parser


def parse_args(
    cls: type,
    argv: list[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    choices: dict[str, Collection[str]] | None = None,
) -> Any:
    """Command line -> instance of `cls`. A bad option prints one line and exits with status 2. Raises
    InputError where an option's value is no number, or a number out of its bounds."""
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
