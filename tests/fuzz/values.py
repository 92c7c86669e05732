"""Hostile values: numbers, texts and JSON that a file or an option may hold, and damage to JSON."""

import json
import random
from typing import Any

LONG_NUMBER = "@5000 digits@"  # written as a number without quotes, see dump()
DEEP = "@deep@"  # written as 100,000 brackets
RAW = {f'"{LONG_NUMBER}"': "7" * 5000, f'"{DEEP}"': "[" * 100_000 + "]" * 100_000}

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "a\rb",
    "a\nerror: b",
    "nul\x00nul",
    "\x08" * 9,
    "\x9b31m",
    "\u202egnp.exe",
    "\u2066a\u2069",
    "\ud800",
    "\udcff",
    "\u2028",
    "é",
    "日本",
    "🎉" * 3,
    "/dev/null/x",
    "nowhere/x",
    "a/b",
    "x" * 300,
    "%s%n{0}{prompt}",
    "",
]  # fmt: skip (no path that a file could be written to outside of the case's folder)
UTF8 = [value for value in HOSTILE if not set(value) & set("\ud800\udcff")]
FOLDER_NAMES = [name for name in HOSTILE if name and not set(name) & set("/\x00\ud800") and len(name) < 250]
HUGE = "y" * 10_000_000

NUMBERS = [0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-46, 1e40, 1e308, -1e308, 2**31, 2**53 + 1, 2**63, 2**64, 10**30]
NUMBERS += [10**6, 10**8, 10**400, float("nan"), float("inf"), -float("inf"), LONG_NUMBER]

# What stands for a number on a command line, or in a text that is read as one.
NUMBER_TEXTS = ["-1", "0", "0.5", "-0.0", "1e-46", "1e40", "1e308", "-1e308", str(2**31), str(2**63)]
NUMBER_TEXTS += [str(10**30), str(10**400), "nan", "NaN", "inf", "-inf", "²", "٣", "7" * 5000, "", " ", "x"]
NUMBER_TEXTS += ["1,2", "0x10", "1_0", "1e", "None", "true", "1.0", "\x1b[31m", "\x00"]
# Of those, what is no number that any option or field could mean.
NEVER = {"nan", "NaN", "inf", "-inf", "²", "7" * 5000, "", " ", "x", "0x10", "1e", "None", "true", "\x1b[31m"}
NEVER |= {"-1e308", str(10**400)}

PATTERNS = ["(a+)+$", "(.*)*x", "(?i).*q_proj", "(", "[", "a{99999999}", "(?P<a>x)(?P=b)", "*", "\\"]
PATTERNS += ["((" * 200 + "))" * 200, "(?:.*.*)*=", "(x+x+)+y", ".*(?=(.*)*z)", "", "(?i)", "^.*$", "|"]


def text(rng: random.Random) -> str:
    """A hostile text, seldom one of 10 MB."""
    return HUGE if rng.random() < 0.01 else rng.choice(HOSTILE)


def json_value(rng: random.Random) -> Any:
    """Any JSON value, mostly one that doesn't belong where it is put."""
    others = [None, True, False, [], {}, [1], ["a"], {"a": 1}, [None], [[]], [{}], DEEP, "1", "x"]
    return rng.choice([rng.choice(NUMBERS), text(rng), rng.choice(others), rng.choice(others)])


def dump(value: Any) -> str:
    """`value` as JSON text, with what no value can hold written raw."""
    written = json.dumps(value)
    for marker, raw in RAW.items():
        written = written.replace(marker, raw)
    return written


def paths(value: Any) -> list[tuple]:
    """The path (keys and indices) of everything in a JSON value; of a long list only its ends."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    found = []
    for key, inner in items if len(items) < 40 else items[:20] + items[-20:]:
        found.append((key,))
        found += [(key, *rest) for rest in paths(inner)]
    return found


def holder_of(value: Any, path: tuple) -> Any:
    """The dict or list that holds what `path` leads to."""
    for key in path[:-1]:
        value = value[key]
    return value


def damage_json(rng: random.Random, value: Any) -> tuple[str, str]:
    """(JSON text of the damaged `value`, in words what was done). Changes `value`."""
    known = paths(value)
    kinds = ["exchange"] * 6 + ["remove", "rename", "double", "add", "swap", "wrap", "whole"]
    kind = rng.choice(kinds if known else ["whole"])
    if kind == "whole":
        new = json_value(rng)
        return dump(new), f"the whole is {_short(new)}"
    top = [path for path in known if len(path) == 1]
    path = rng.choice(rng.choice([top, known]))
    holder, key = holder_of(value, path), path[-1]
    where = ".".join(map(str, path))
    if kind == "exchange":
        old, new = holder[key], json_value(rng)
        if isinstance(old, (int, float)) and not isinstance(old, bool) and rng.random() < 0.6:
            new = rng.choice(NUMBERS)
        elif isinstance(old, str) and rng.random() < 0.5:
            new = text(rng)
        holder[key] = new
        return dump(value), f"{where} is {_short(new)}, was {_short(old)}"
    if kind == "remove" or not isinstance(holder, dict):
        del holder[key]
        return dump(value), f"{where} removed"
    return _damage_key(rng, value, holder, key, where, kind)


def _damage_key(rng, value, holder, key, where, kind):
    if kind == "rename":
        new = rng.choice([key + "_x", key.upper(), key + "\u200b", *HOSTILE])
        holder[new] = holder.pop(key)
        return dump(value), f"{where} renamed to {new!r}"
    if kind == "add":
        name, new = rng.choice(["extra", *HOSTILE]), json_value(rng)
        holder[name] = new
        return dump(value), f"{name!r} beside {where} added, {_short(new)}"
    if kind == "double":
        new = json_value(rng)
        holder["@double@"] = new
        return dump(value).replace('"@double@"', json.dumps(key)), f"{where} twice, then {_short(new)}"
    if kind == "wrap":
        holder[key] = [holder[key]]
        return dump(value), f"{where} wrapped in a list"
    other = rng.choice(list(holder))
    holder[key], holder[other] = holder[other], holder[key]
    return dump(value), f"{where} and {other!r} swapped"


def _short(value):
    if value == HUGE:
        return "10 MB of y"
    shown = repr(value)
    return shown if len(shown) < 90 else shown[:60] + "..."
