"""What came of a case: refused, same, right, other, or one of the ways to fail."""

import hashlib
import json
import re
import unicodedata
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass

from fuzz.plan import ANY, MUST, ORACLE, Plan
from fuzz.server import Done

GOOD = ("refused", "same", "right", "other")  # other: an answer where any will do
BAD = ("traceback", "hang", "escape", "silent", "crash", "untidy")
LINE = 2000  # characters of a line on stderr at most
BESIDE = ("warning:", "method:", "template:", "retrieved:", "base:", "wrote ", "error:")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MARKS = {chr(code) for code in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))}  # reorder or break lines


@dataclass
class Verdict:
    """`what` of GOOD or BAD, and why."""

    what: str
    why: str = ""


def controls(text: str, marks: bool = False) -> list[str]:
    """The control characters of a text but line ends and tabs; with `marks` also what reorders it."""
    found = {c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"}
    return sorted(found | (MARKS & set(text) if marks else set()))


def answer(plan: Plan, done: Done) -> list:
    """What a command answered: the objects that it printed with --json, else its stdout; hashes of
    the plan's results."""
    said = done.stdout
    lines = said.removesuffix("\n").split("\n")
    if "--json" in plan.argv and all(line.startswith("{") for line in lines):
        said = [json.loads(line) for line in lines]
        for row in said:
            del row["seconds"], row["tokens_per_second"]
    hashes = []
    for pattern in plan.results:
        for file in sorted(plan.folder.glob(pattern)):
            found = file.read_bytes() if file.is_file() else b""
            digest = hashlib.sha256(_steady(file, found)).hexdigest()
            hashes.append([str(file.relative_to(plan.folder)), digest])
    return [said, hashes]


def _steady(file, data):
    """safetensors write their metadata in any order: the tensors alone."""
    if file.suffix != ".safetensors" or len(data) < 8:
        return data
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + data[8 + n :]


def ids_of(row: dict) -> list:
    """[ids of the prompt, ids of the answer] of a line of generate.py --json."""
    return [[token["id"] for token in row[name]] for name in ("prompt_tokens", "tokens")]


def judge(plan: Plan, done: Done, undamaged: Callable, oracle: Callable) -> Verdict:
    """`undamaged()` gives the answer without the damage, `oracle(plan)` that of transformers or, as
    a text, why it has none."""
    if bad := _ended_badly(plan, done):
        return bad
    if done.code == 2:
        return Verdict("refused")
    if plan.expect == MUST:
        return Verdict("silent", f"not refused: {done.stdout[:200]!r}")
    found = answer(plan, done)
    if "--svg" in plan.argv:
        try:
            xml.etree.ElementTree.parse(plan.folder / "a.svg")
        except (OSError, xml.etree.ElementTree.ParseError) as error:
            return Verdict("untidy", f"a.svg: {error}")
    if plan.expect == ANY:
        return Verdict("other")
    expected = undamaged()
    if found == expected:
        return Verdict("same")
    if plan.expect == ORACLE:
        ids, right = ids_of(found[0][0]), oracle(plan)
        if ids == right:
            return Verdict("right")
        return Verdict("silent", f"answers {ids}, transformers: {right}")
    return Verdict("silent", f"answers {str(found)[:300]}, undamaged: {str(expected)[:300]}")


def _ended_badly(plan, done):
    said = done.stdout + done.stderr
    tail = done.stderr.strip()[-1500:]
    if done.code in (-14, -24, -9):
        return Verdict("hang", f"killed after {done.seconds:.1f} s; {tail[-300:]}")
    if done.code < 0:
        return Verdict("crash", f"signal {-done.code}; {tail}")
    if "Traceback (most recent call last)" in said or "panicked at" in said:
        return Verdict("traceback", tail)
    plain = COLOUR.sub("", done.stdout) if plan.colours else done.stdout
    if found := controls(plain) + controls(done.stderr, marks=True):
        line = next(line for line in said.split("\n") if set(line) & set(found))
        return Verdict("escape", f"{found!r} in {line[:200]!r}")
    lines = [line for line in done.stderr.split("\n") if not line.startswith("{")]  # options, as JSON
    if any(len(line) > LINE for line in lines):
        return Verdict("untidy", f"a line of {max(map(len, lines))} characters: {max(lines, key=len)[:200]}")
    if done.code not in (0, 2):
        return Verdict("crash", f"status {done.code}; {tail}")
    errors = [line for line in lines if line.startswith("error: ")]
    if done.code == 2 and len(errors) != 1 and not plan.several_errors:
        return Verdict("untidy", f"{len(errors)} lines begin with error: ; {tail}")
    if done.code == 2 and (stray := [line for line in lines if line and not line.startswith(BESIDE)]):
        return Verdict("untidy", f"beside the error: {stray[0][:300]!r}")
    if done.code == 2 and done.stdout.strip() and not plan.several_errors:
        return Verdict("untidy", f"refused after it printed {done.stdout[:200]!r}")
    return None
