"""The command line made from a dataclass: names, types, help and refusals."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import pytest

from common.fields import Number
from common.files import InputError
from common.options import build_parser, check_bounds, nearest, numbers, parse_args, parse_command


@dataclass
class Common:
    """A parent, whose fields a child inherits and overrides."""

    model: str = "tiny"  # model folder
    steps: int = 30  # steps of the parent
    seed: int = 0  # where the randomness starts


@dataclass
class Options(Common):
    prompt: list[str] = field(default_factory=list)  # what to ask; repeatable
    target: list[str] = field(default_factory=lambda: ["q", "k"])  # where to sit
    list_: bool = False  # print the pool and stop
    compile: bool = True  # faster later, slower first
    routing: bool | None = None  # colours, default on a terminal
    lr: float = 0.5  # peak rate, 50% of the largest
    steps: int = 70  # steps of the child
    end: Literal["no", "left", "right"] = "no"  # which end is cut
    bits: Literal[8, 16] = 16  # width
    name: str | None = None  # of the run
    limit: int | None = None  # of examples
    rate: Annotated[float, Number(float, 0.5, 2)] = 1.0  # with bounds of its own


@dataclass
class Needed:
    model: str  # model folder
    share: str = "100%"  # how much of it


def refusal(capsys, *argv, cls=Options):
    """The one line on standard error with which the options `argv` are refused."""
    with pytest.raises(SystemExit) as ended:
        parse_args(cls, list(argv), prog="test")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err


def helps(cls):
    return {
        action.dest: action.help for action in build_parser(cls, "test")._actions if action.dest != "help"
    }


def test_defaults():
    """Without it an option nobody gave could become None, '' or another list than the dataclass
    says."""
    assert parse_args(Options, []) == Options()
    first, second = parse_args(Options, []), parse_args(Options, [])
    assert first.prompt is not second.prompt and first.target is not second.target


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--model", "x"], "model", "x"),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--lr", "3"], "lr", 3.0),
        (["--steps", "-5"], "steps", -5),
        (["--limit", "9"], "limit", 9),
        (["--name", "x"], "name", "x"),
        (["--end", "left"], "end", "left"),
        (["--bits", "8"], "bits", 8),
        (["--compile"], "compile", True),
        (["--no-compile"], "compile", False),
        (["--routing"], "routing", True),
        (["--no-routing"], "routing", False),
        (["--list"], "list_", True),
        (["--no-list"], "list_", False),
        (["--prompt", "a", "--prompt", "b c"], "prompt", ["a", "b c"]),
        (["--prompt", "a", "--prompt", "a"], "prompt", ["a", "a"]),
        (["--prompt", "-"], "prompt", ["-"]),
        (["--prompt", ""], "prompt", [""]),
        (["--prompt=2+2=?"], "prompt", ["2+2=?"]),
        (["--prompt=--help"], "prompt", ["--help"]),
        (["--prompt", "- a list"], "prompt", ["- a list"]),
        (["--target", "v"], "target", ["v"]),
    ],
)
def test_values(argv, name, value):
    """Without it a value has the wrong type, `=` in a prompt cuts it (nanoGPT's --start="2+2=?"
    crashes), or a list option adds to its default instead of replacing it."""
    options = parse_args(Options, argv)
    assert getattr(options, name) == value and type(getattr(options, name)) is type(value)
    setattr(options, name, getattr(Options(), name))
    assert options == Options(), "an option that wasn't given changed"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--end", "top"], ["--end", "'top'", "left", "right"]),
        (["--bits", "12"], ["--bits", "12", "16"]),
        (["--model"], ["--model", "expected one argument"]),
        (["--compile=maybe"], ["--compile"]),
        (["--promt", "x"], ["unknown option --promt", "did you mean --prompt"]),
        (["--lst"], ["--lst", "did you mean --list"]),
        (["--promt=2+2=?"], ["--promt", "did you mean --prompt"]),
        (["--pro", "x"], ["unknown option --pro", "--prompt"]),
        (["--zzzzzzzz"], ["unknown option --zzzzzzzz"]),
        (["stray"], ["stray"]),
        (["--model", "two", "words"], ["words"]),
    ],
)
def test_refusals(capsys, argv, words):
    """Without it a mistyped option is ignored, taken for its beginning, or answered with a page of
    usage."""
    line = refusal(capsys, *argv)
    for word in words:
        assert word in line
    assert "list_" not in line


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("--steps", "many", "--steps is 'many', expected a whole number from "),
        ("--steps", "2.5", "--steps is '2.5', expected a whole number from "),
        ("--steps", "²", "--steps is '²', expected a whole number from "),
        ("--steps", "1_000", "--steps is '1_000', expected a whole number from "),
        ("--steps", str(2**63), f"--steps is {2**63}, expected a whole number from .* to 9,223,372"),
        ("--steps", "9" * 5000, "--steps is '999.*9', expected a whole number from "),
        ("--limit", "x", "--limit is 'x', expected a whole number from "),
        ("--lr", "fast", "--lr is 'fast', expected a number that float32 can hold"),
        ("--lr", "nan", "--lr is 'nan', expected a number that float32 can hold"),
        ("--lr", "1e40", "--lr is 1e40, expected a number that float32 can hold"),
        ("--rate", "0.4", "--rate is 0.4, expected a number from 0.5 to 2"),
        ("--rate", "1e400", "--rate is 1e400, expected a number from 0.5 to 2"),
    ],
)
def test_numbers_out_of_bounds(option, text, says):
    """Without it a number that nothing can use is a traceback, an endless loop or a full memory far
    from the command line."""
    with pytest.raises(InputError, match=f"^{says}"):
        parse_args(Options, [option, text])
    with pytest.raises(InputError, match="--rate is nan, expected a number from 0.5 to 2"):
        check_bounds(Options(rate=float("nan")))
    check_bounds(Options())


def test_numbers_of_numpy():
    """Without it an option that was computed with numpy is refused, or torch gets a seed that it
    doesn't take."""
    options = Options(rate=np.float32(0.5), steps=np.int64(7))
    check_bounds(options)
    assert (type(options.rate), type(options.steps)) == (float, int)
    with pytest.raises(InputError, match="--rate is "):
        check_bounds(Options(rate=np.float32(7)))
    with pytest.raises(InputError, match="--steps is "):
        check_bounds(Options(steps=np.float64(7)))


def test_lists_of_numbers():
    """Without it `--composite 3,²` or `--e 1,1e9` is a traceback in the middle of a table."""
    assert numbers("--e", "1, 2,4") == [1, 2, 4]
    assert numbers("--width", "5x7", comma="x") == [5, 7]
    assert numbers("--t", "0.5,2", Number(float, 0.1, 9)) == [0.5, 2.0]
    for bad in ("", "1,,2", "0", "1,²", "1,1_0", "1e9", "9" * 5000, "1000001", "nan"):
        with pytest.raises(
            InputError, match="^--e is '.*', expected whole numbers from 1 to 1,000,000 with ','"
        ):
            numbers("--e", bad)


def test_required(capsys):
    """Without it a field that has no default is None, and fails far from the command line."""
    assert "--model" in refusal(capsys, cls=Needed)
    assert parse_args(Needed, ["--model", "x"]) == Needed("x")


@dataclass
class Copying:
    source: str = field(metadata={"positional": True})  # 100% of it is copied
    out: str  # folder


def test_positional(capsys):
    """Without it `python -m tasks.bbh FOLDER --out OUT` is refused, or a missing FOLDER is None."""
    for argv in (["a", "--out", "b"], ["--out", "b", "a"]):
        assert parse_args(Copying, argv) == Copying("a", "b")
    assert "SOURCE" in refusal(capsys, "--out", "b", cls=Copying)
    assert "'more'" in refusal(capsys, "a", "more", "--out", "b", cls=Copying)
    assert helps(Copying)["source"] == "100%% of it is copied"


def test_comments_become_help():
    """Without it --help says nothing, or says what another field's comment says."""
    found = helps(Options)
    assert found["lr"] == "peak rate, 50%% of the largest (default: 0.5)"
    assert found["prompt"] == "what to ask; repeatable"  # an empty default is not shown
    assert found["target"] == "where to sit (default: ['q', 'k'])"
    assert found["list_"] == "print the pool and stop (default: False)"
    assert found["routing"] == "colours, default on a terminal"
    assert found["end"].startswith("which end is cut") and found["name"] == "of the run"


def test_inherited_fields_have_help():
    """Without it the options that scripts share have none: the comments stand in the parent's
    source."""
    found = helps(Options)
    assert found["model"] == "model folder (default: tiny)"
    assert found["seed"] == "where the randomness starts (default: 0)"
    assert found["steps"] == "steps of the child (default: 70)"
    assert helps(Common)["steps"] == "steps of the parent (default: 30)"


@pytest.mark.parametrize("cls", [Options, Needed])
def test_help_prints(capsys, cls):
    """Without it --help itself is a traceback: argparse takes a % in a comment or a default for a
    format."""
    with pytest.raises(SystemExit) as ended:
        parse_args(cls, ["--help"], prog="test")
    out = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert ("50% of the largest" in out and "--list" in out and "--list_" not in out) or "100%" in out


def test_commands(capsys, monkeypatch):
    """Without it `script COMMAND --options` takes one command's options for another's."""
    commands = {"adapters": Options, "base": Needed}
    assert parse_command(commands, ["adapters", "--steps", "3"]) == ("adapters", Options(steps=3))
    assert parse_command(commands, ["base", "--model", "x"]) == ("base", Needed("x"))
    monkeypatch.setattr("sys.argv", ["train.py", "adapters", "--seed", "5"])
    assert parse_command(commands) == ("adapters", Options(seed=5))
    for argv, words in (
        (["adaptors"], ["'adaptors'", "did you mean adapters"]),
        (["zzz"], ["'zzz'", "adapters, base"]),
        (["--steps", "3"], ["'--steps'"]),
        (["base", "--model", "x", "--steps", "3"], ["--steps"]),
    ):
        with pytest.raises(SystemExit) as ended:
            parse_command(commands, argv)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_commands_help(capsys, argv):
    """Without it somebody who calls the script bare doesn't learn which commands it has."""
    with pytest.raises(SystemExit) as ended:
        parse_command({"adapters": Options, "base": Needed}, argv)
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "adapters" in out and "base" in out


def test_command_help(capsys):
    """Without it `script COMMAND --help` shows the commands again and no option of the one asked
    about."""
    with pytest.raises(SystemExit) as ended:
        parse_command({"adapters": Options, "base": Common}, ["base", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "steps of the parent" in out and "--prompt" not in out


def test_nearest():
    """Without it a suggestion could be a name that has nothing to do with what was typed."""
    assert nearest("speling", ["spelling", "rhyme", "counting"]) == ", did you mean spelling?"
    assert nearest("zzz", ["spelling", "rhyme"]) == ""
    assert nearest("a", []) == ""
