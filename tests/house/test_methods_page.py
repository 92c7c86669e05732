"""docs/methods.md: its table is that of methods/, each method has a section, and what it names exists."""

import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest

import eval as evaluation
import generate
import moe_lora
import train
from common.options import build_parser
from helpers_commands import ENVIRONMENT, ROOT
from methods import FALLBACK, METHODS
from methods.batch import listed_method, named_methods, split_methods
from methods.protocol import Gated
from tasks.tiny import TinyTasksConfig

PAGE = (ROOT / "docs" / "methods.md").read_text("utf-8")
SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "methods_table.py")))
INTRO, *PARTS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
SECTIONS = dict(part.split("\n", 1) for part in PARTS)
LINKED = SCRIPT.sections(PAGE)  # {class: heading}
FENCED = re.compile(r"^```\n(.*?)^```$", re.DOTALL | re.MULTILINE)
parser = cache(build_parser)
SCRIPTS = {"generate.py": generate.Options, "eval.py": evaluation.Options, "tasks.tiny": TinyTasksConfig}


def commands(text):
    """The command lines of a text, as lists of words after `python`."""
    lines = "".join(FENCED.findall(text)).replace("\\\n", " ").splitlines()
    return [[word for word in shlex.split(line, comments=True)[1:] if word != "-m"] for line in lines]


def options(script, *args):
    """A command's options, parsed: SystemExit where it doesn't take them."""
    cls = SCRIPTS.get(script)
    if script == "train.py":
        cls = train.COMMANDS[args[0]][0]
        args = args[1:]
    if "--kind" in args:
        cls = train.KINDS[args[args.index("--kind") + 1]].Run
    return parser(cls).parse_args(args)


def methods_of(script, *args):
    """The methods that a command runs."""
    parsed = options(script, *args)
    if script == "generate.py":
        parsed.method, parsed.mix = parsed.method or [], parsed.mix or []
        names = named_methods(parsed)
    else:
        names = split_methods(parsed.methods) if script == "eval.py" else []
    return [listed_method(name) or FALLBACK.parse(name) for name in names]


def test_its_blocks_are_those_of_methods():
    """A table that is copied by hand lacks the method that was added last."""
    assert SCRIPT.render(PAGE, METHODS) == PAGE, "python docs/methods_table.py"
    stale = PAGE.replace("| per token and layer |", "| per month |").replace("(../methods/smear.py)", "(x)")
    assert stale != PAGE and SCRIPT.render(stale, METHODS) == PAGE


def test_the_script_changes_nothing_that_is_right():
    """It has to find the page and methods/ from any folder, and to write only what has changed."""
    line = [sys.executable, str(ROOT / "docs" / "methods_table.py")]
    environment = ENVIRONMENT | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(line, cwd="/", env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (ROOT / "docs" / "methods.md").read_text("utf-8") == PAGE


def test_a_new_method_is_in_the_table():
    """Without it a method that has no section yet is missing from the page altogether."""

    class Loudest(Gated):
        names = ("loudest", "loudest_top1")
        about = "the adapters whose A x is longest"

    Loudest.__module__ = "methods.loudest"
    new = SCRIPT.render(PAGE, (*METHODS, Loudest))
    added = [line for line in new.splitlines() if line not in PAGE.splitlines()]
    file = "[methods/loudest.py](../methods/loudest.py)"
    cells = ["`loudest`, `loudest_top1`", Loudest.about, "per token and Linear", "", file, ""]
    assert added == [f"| {' | '.join(cells)} |"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_each_method_has_a_section(method):
    """Without it a method can be run, and nothing says what it computes or how its parts are made."""
    name = method.__name__
    assert name in LINKED, f"docs/methods.md: no section has a block <!-- begin {name}: ... -->"
    text = SECTIONS[LINKED[name]]
    assert method.about and method.decides and "**Costs**" in text and "**Figures**" in text
    used = sum((methods_of(*line) for line in commands(text)), [])
    assert any(isinstance(one, method) for one in used), f"no command runs one of {method.names}"
    wanted = [set(command.split()) for command in SCRIPT.made_by(method).values()]
    given = [set(line) for line in commands(text)]
    assert any(some <= line for some in wanted for line in given), f"no command trains {name}"


def test_its_links_lead_somewhere():
    """A page that names a heading or a file of the code which was renamed."""
    anchors = {SCRIPT.anchor(heading) for heading in SECTIONS}
    found = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    assert len(found) >= len(METHODS) and set(found) <= anchors
    found = re.findall(r"\]\(\.\./((?:(?:methods|pool|tests)/)?[\w/]+\.py)\)", PAGE)
    found = {file for file in found if not file.startswith("examples/")}
    assert len(found) > 15 and [file for file in found if not (ROOT / file).exists()] == []


def test_its_options_exist():
    """A page that names an option which is gone sends its readers into an error."""
    assert len([options(*line) for line in commands(PAGE)]) > 25
    classes = [*SCRIPTS.values(), *(cls for cls, *_ in train.COMMANDS.values())]
    classes += [kind.Run for kind in train.KINDS.values()]
    known = {option for cls in classes for option in parser(cls)._option_string_actions}
    named = set(re.findall(r"`[^`\n]*?(--[\w-]+)", FENCED.sub("", PAGE)))
    assert len(named) > 15 and named <= known, named - known


def test_its_letters_are_those_of_the_glossary():
    """One letter with two meanings, or one that is explained nowhere, stops a reader of equations."""
    known = {"j"}
    for line in moe_lora.__doc__.partition("letter  ")[2].splitlines()[1:]:
        for name in ", ".join(re.split(r"\s{2,}", line.strip())[:2]).split(", "):
            known.add(name.partition("_")[0])
    assert {"A", "B", "W", "G", "e", "k", "w", "scale", "weight"} <= known
    seen = 0
    for heading, text in SECTIONS.items():
        text = FENCED.sub("", INTRO + text)
        equations = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
        defined = set(re.findall(r"(\w+) +=", "\n".join(equations)))
        quoted = re.findall(r"`([^`\n]+)`", text)
        explained = defined | {word for one in quoted for word in re.findall(r"\w+", one)}
        for symbol in re.findall(r"(?<!')\b(?:[A-Za-z]|[A-Za-z]+_\w+)\b", "\n".join(equations)):
            assert symbol in explained or symbol.partition("_")[0] in known, (heading, symbol)
            seen += 1
    assert seen > 80
