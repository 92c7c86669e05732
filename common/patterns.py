"""Regular expressions that others wrote, matched where they can't hang.

Python's re has no limit of time: (a+)+b needs 2**n steps to find that n letters don't match. PEFT
uses patterns to name modules, each field in a form of its own.
"""

import re

from common.files import InputError
from common.limited import LimitedError, call_limited
from common.printable import shown

FORMS = {  # what PEFT does with a pattern
    "target": (re.fullmatch, "{}"),  # target_modules, exclude_modules
    "key": (re.match, r"(.*\.)?({})$"),  # of rank_pattern, alpha_pattern
    "layers": (re.match, r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),  # layers_pattern
}
# Names and alternatives, in which nothing repeats, and PEFT's own default: these need no limit.
PLAIN = re.compile(r"(?:[\w.|-]|\\\.)*|\[\^\.\]\*", re.ASCII)
PLAIN_LENGTH = 100_000  # of all patterns together


def match_patterns(patterns: list[str], form: str, texts: list[str], where: str) -> list[list[str | None]]:
    """For each pattern, for each text: the part of the text that it matched, None where it doesn't.

    `form` is a key of FORMS. Patterns that aren't plain run in the limited process. Raises
    InputError, which begins with `where`, for a pattern that doesn't compile or takes too long.
    """
    plain = len(patterns) + sum(map(len, patterns)) < PLAIN_LENGTH and all(map(PLAIN.fullmatch, patterns))
    if plain:
        return _match(patterns, form, texts, where)
    try:
        return call_limited(_match, patterns, form, texts, where)
    except LimitedError as error:
        tried = shown(patterns[0] if len(patterns) == 1 else patterns)
        raise InputError(f"{where}: matching {tried} {error}") from None


def _match(patterns, form, texts, where):
    method, around = FORMS[form]
    found = []
    for pattern in patterns:
        try:
            compiled = re.compile(around.format(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{where}: bad pattern {shown(pattern)}: {error}") from None
        matches = [method(compiled, text) for text in texts]
        found.append([match and match[0] for match in matches])
    return found
