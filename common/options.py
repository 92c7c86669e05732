"""A dataclass becomes a command line; the comment beside a field is its help text.

One place to read what a script can be told: its dataclass. Field names are the option names,
defaults are the defaults, types are checked, an unknown option is refused with the nearest right
one.
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
from dataclasses import MISSING, fields

from common.files import InputError


class Least(typing.NamedTuple):
    """What an option has to be at least, and what it has to be below: beside its field, as
    Annotated[int, Least(1)]."""

    value: float
    below: float = math.inf


# The types of most numbers that a script can be told.
Count = typing.Annotated[int, Least(1)]
Whole = typing.Annotated[int, Least(0)]
NotNegative = typing.Annotated[float, Least(0)]
Above0 = typing.Annotated[float, Least(1e-6)]
Seed = typing.Annotated[int, Least(0, 2**63)]


def check_bounds(args):
    """Raises InputError for an option that is not within the bounds beside its field."""
    hints = typing.get_type_hints(type(args), include_extras=True)
    for field in fields(args):
        value = getattr(args, field.name)
        for bound in getattr(hints[field.name], "__metadata__", ()):
            if value >= bound.below:
                raise InputError(f"--{field.name} is {value}, expected less than {bound.below}")
            if not value >= bound.value:  # NaN isn't
                raise InputError(f"--{field.name} is {value}, expected at least {bound.value}")


def nearest(name, names):
    """', did you mean X?' for the closest of `names`, or '' where none is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=3, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""


def numbers(option, text, kind=int, comma=","):
    """ "1,2,4" -> [1, 2, 4], all above 0. Raises InputError."""
    try:
        found = [kind(word) for word in text.split(comma)]
    except ValueError:
        found = [0]
    if not all(value > 0 for value in found):
        raise InputError(f"{option} is {text!r}, expected numbers above 0 with {comma!r} between them")
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, exit status 2; argparse alone would print the whole usage before it."""
        self.exit(2, f"error: {message} (see --help)\n")


def _comments(cls):
    """{field name: the comment beside it}, read from the source, so that help and code can't drift
    apart."""
    sources = [inspect.getsource(c) for c in cls.__mro__[:-1]]
    source = "".join(textwrap.dedent(s) for s in sources)
    names = {f.name for f in fields(cls)}
    found = {}
    line_name = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in names:
            line_name.setdefault(token.start[0], token.string)
        elif token.type == tokenize.COMMENT and token.start[0] in line_name:
            found.setdefault(line_name[token.start[0]], token.string.lstrip("# "))
    return found


def build_parser(cls, prog=None, description=None, choices=None):
    """An ArgumentParser for dataclass `cls`: str, int, float, bool, Literal, list[str], and each of
    them `| None`. `choices` {field: values} of fields whose values a table elsewhere lists."""
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
        parser.add_argument(f"--{field.name.rstrip('_')}", **options)  # list_ is --list
    return parser


def parse_args(cls, argv=None, prog=None, description=None, choices=None):
    """Command line -> instance of `cls`. Bad options end the process with one line and exit status
    2."""
    parser = build_parser(cls, prog, description, choices)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        if not unknown[0].startswith("-"):
            parser.error(f"unknown argument {unknown[0]!r}: every option begins with --")
        option = unknown[0].split("=")[0]
        names = [f"--{f.name.rstrip('_')}" for f in fields(cls)]
        parser.error(f"unknown option {unknown[0]}{nearest(option, names)}")
    values = {k: v for k, v in vars(known).items() if v is not None}
    return cls(**values)


def parse_command(commands, argv=None, description=None, choices=None):
    """`script COMMAND --options`: {name: dataclass} -> (name, instance)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(description=description, add_help=True, allow_abbrev=False)
    parser.add_argument("command", help=" | ".join(commands) + "; COMMAND --help lists its options")
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(argv or ["--help"])
    if argv[0] not in commands:
        parser.error(
            f"unknown command {argv[0]!r}{nearest(argv[0], commands) or ', one of ' + ', '.join(commands)}"
        )
    return argv[0], parse_args(commands[argv[0]], argv[1:], f"{parser.prog} {argv[0]}", choices=choices)
