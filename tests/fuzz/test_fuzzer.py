"""The fuzzer itself: it notices what it is there for, and its cases can be made again."""

import pytest

from fuzz.cases import NAMES, kinds_of, make_case
from fuzz.judge import judge
from fuzz.plan import ANY, MUST, ORACLE, SAME, Plan
from fuzz.server import Server

# A program that does what its argument says.
STUB = r"""
import json, os, subprocess, sys, time
how = sys.argv[1]
if how == "traceback":
    raise ValueError("5")
elif how == "library":
    print("thread panicked at src/lib.rs", file=sys.stderr)
    sys.exit("error: a panic")
elif how == "loop":
    while True:
        pass
elif how == "sleep":
    time.sleep(60)
elif how == "child":
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
elif how == "memory":
    bytearray(10**12)
elif how == "abort":
    os.abort()
elif how == "status":
    sys.exit(1)
elif how == "refuse":
    print("warning: a field", "method: base", "error: a field is 5", sep="\n", file=sys.stderr)
    sys.exit(2)
elif how == "refuse twice":
    print("error: one", "error: two", sep="\n", file=sys.stderr)
    sys.exit(2)
elif how == "no reason":
    sys.exit(2)
elif how == "usage":
    print("usage: x", "error: no", sep="\n", file=sys.stderr)
    sys.exit(2)
elif how == "long":
    print("error: " + "x" * 3000, file=sys.stderr)
    sys.exit(2)
elif how == "too late":
    print("half an answer")
    print("error: a field is 5", file=sys.stderr)
    sys.exit(2)
elif how == "escape in an answer":
    print("\x1b[2J")
elif how == "escape in an error":
    print("error: \x9b31m", file=sys.stderr)
    sys.exit(2)
elif how == "marks":
    print("error: \u202etxt", file=sys.stderr)
    sys.exit(2)
elif how == "carriage return":
    print("warning: a\rb", file=sys.stderr)
elif how == "not UTF-8":
    sys.stdout.buffer.write(b"\xff\n")
said = {"prompt_tokens": [{"id": 2}], "tokens": [{"id": 5 if how == "another answer" else 3}]}
print(json.dumps(said | {"seconds": time.time(), "tokens_per_second": 7}))
"""
FAILS = {
    "traceback": "traceback", "library": "traceback", "memory": "traceback", "loop": "hang", "sleep": "hang",
    "child": "hang", "abort": "crash", "status": "crash", "refuse twice": "untidy", "no reason": "untidy",
    "usage": "untidy", "long": "untidy", "too late": "untidy", "escape in an answer": "escape",
    "escape in an error": "escape", "marks": "escape", "carriage return": "escape", "not UTF-8": "escape",
}  # fmt: skip


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """judge() of a command of STUB."""
    root = tmp_path_factory.mktemp("stub")
    (root / "stub.py").write_text(STUB)
    server = Server(root, scripts=(), cpu=1, wall=2)

    def run(how, expect, right=None):
        plan = Plan(["stub.py", how, "--json"], "", expect, folder=root)
        undamaged = [{"prompt_tokens": [{"id": 2}], "tokens": [{"id": 3}]}]
        return judge(plan, server.run(plan.argv, root), lambda: [undamaged, []], lambda plan: right).what

    yield run
    server.close()


@pytest.mark.parametrize("how", FAILS)
def test_failures_are_noticed(how, stub):
    """A fuzzer that takes a traceback or an escape sequence for an answer passes forever."""
    assert stub(how, ANY) == FAILS[how]


def test_the_oracle_decides(stub):
    """Without it a folder that was changed on purpose, and is read rightly, counts as a failure."""
    assert stub("another answer", ORACLE, right=[[2], [5]]) == "right"
    assert stub("another answer", ORACLE, right="it can't be read") == "silent"


@pytest.mark.parametrize(
    ("how", "expect", "what"),
    [
        ("refuse", MUST, "refused"),
        ("refuse", SAME, "refused"),
        ("fine", SAME, "same"),
        ("fine", ORACLE, "same"),
        ("fine", MUST, "silent"),
        ("fine", ANY, "other"),
        ("another answer", SAME, "silent"),
        ("another answer", ORACLE, "silent"),
        ("another answer", ANY, "other"),
    ],
)
def test_answers_are_compared(how, expect, what, stub):
    """Without it an answer that silently changed counts as the right one, or no answer ever does."""
    assert stub(how, expect) == what


def test_same_seed_same_case(world, tmp_path):
    """Without it a failure can't be run again, or another seed tries nothing new."""
    for number in range(len(NAMES)):
        made = described(world, tmp_path / "case", 3, number)
        assert described(world, tmp_path / "case", 3, number) == made, NAMES[number]
    assert described(world, tmp_path / "case", 5, number) != made


# Kinds of files whose command names what only the damage makes.
DAMAGE_IS_NAMED = {"names of adapters", "names of tasks", "samples for --init"}
FILES = [name for name in kinds_of("kinds_model", "kinds_pool", "kinds_runs") if name not in DAMAGE_IS_NAMED]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_undamaged_commands_answer(kind, runner, tmp_path):
    """Without it a kind's command may be refused whatever the damage is: then all its cases pass."""
    answered = 0
    for seed in range(11):
        plan = make_case(runner.world, tmp_path / "case", seed, NAMES.index(kind))
        if plan.expect != MUST:
            assert runner.undamaged(plan)  # which asserts status 0
            answered += 1
    assert answered


def described(world, folder, seed, number):
    """All that a case consists of."""
    plan = make_case(world, folder, seed, number)
    files = {}
    for file in folder.rglob("*"):
        if file.is_symlink():
            files[str(file)] = file.readlink()
        elif file.is_file():
            files[str(file)] = file.read_bytes()
    return plan, files
