"""Ctrl-C and SIGTERM at every moment of a command: one line, its status, and nothing left in disorder.

Each process says where it is before the signal is sent: nothing here depends on how fast it runs.
"""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest

from helpers_commands import ENVIRONMENT, ROOT
from helpers_models import write_adapters, write_llama
from helpers_terminal import OUTPUT, Terminal, heard
from helpers_training import options
from model import load_llama

SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
both = pytest.mark.parametrize("number", SIGNALS, ids=["Ctrl-C", "SIGTERM"])


@contextmanager
def started(*args, path=()):
    """A Python process with pipes for its standard streams, killed at the end of the test."""
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    line = [sys.executable, *map(str, args)]
    process = subprocess.Popen(line, env=environment, text=True, preexec_fn=heard, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ends(process, number):
    """What the process wrote, after the signal: its status is the signal's, its last line says so."""
    process.send_signal(number)
    out, err = process.communicate(timeout=OUTPUT)
    status, line = SIGNALS[number]
    assert process.returncode == status and err.splitlines()[-1] == line, (process.returncode, err)
    assert "Traceback" not in err and "Exception ignored" not in err
    return out, err.splitlines()[:-1]


# At its beginning ---------------------------------------------------------------------------------


COMMANDS = [["generate.py"], ["train.py", "base"], ["eval.py"], ["bench.py", "layer"]]
COMMANDS += [["-c", f"from common import console; console.{name}()"] for name in ("generate", "evaluate")]


@both
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_while_torch_is_imported(command, number, tmp_path):
    """Importing torch takes seconds, in which people see that they mistyped a prompt: Without it they
    get twenty lines of traceback. The torch here says that it is being imported, and waits."""
    (tmp_path / "torch.py").write_text('print("importing", flush=True)\n__import__("signal").pause()\n')
    script, *rest = command
    with started(ROOT / script if script.endswith(".py") else script, *rest, path=[tmp_path]) as process:
        assert process.stdout.readline() == "importing\n"
        assert ends(process, number) == ("", [])


# While it answers ---------------------------------------------------------------------------------

# A generate.py whose first forward says so and waits.
PREFILL = """
from common.signals import end_at_once
end_at_once()
import signal, sys
import decoding.respond, generate
from common.endings import run_script
def decode(*args):
    print("prefill", file=sys.stderr, flush=True)
    signal.pause()
decoding.respond.decode = decode
run_script(generate.main)
"""


@pytest.fixture(scope="module")
def endless(small_model, tmp_path_factory):
    """Options of generate.py for a model that never stops, in colour."""
    root = tmp_path_factory.mktemp("endless")
    folder = write_llama(root / "small", max_position_embeddings=99991, eos_token_id=None)
    (folder / "tokenizer.model").write_bytes((small_model / "tokenizer.model").read_bytes())
    args = ["--model", folder, "--no-compile", "--max_new_tokens", 90001, "--method", "mix:one=0.25,two=1"]
    for name, path in write_adapters(root, load_llama(folder), ["one", "two"]).items():
        args += ["--adapter", f"{name}={path}"]
    return args


@both
def test_in_the_first_forward(endless, number):
    """Without it an empty line would stand where no answer has begun."""
    with started("-c", PREFILL, *endless, "--prompt", "the fox") as process:
        while process.stderr.readline() != "prefill\n":
            assert process.poll() is None
        assert ends(process, number) == ("", [])


@both
def test_while_an_answer_streams(endless, number):
    """Without it what the shell prints next stands at the end of half an answer, and a pipe has half
    a line."""
    with started(ROOT / "generate.py", *endless, "--prompt", "the fox") as process:
        assert process.stdout.read(3)
        out, err = ends(process, number)
        assert out.endswith("\n") and [line.split(":")[0] for line in err] == ["method", "template"]


@pytest.mark.parametrize("moment", ["first forward", "answer", "batch"])
def test_ctrl_c_on_a_terminal(endless, tmp_path, moment):
    """A terminal shows ^C where the cursor stands: Without it "interrupted" stands in the middle of
    the answer, or right after the ^C, or in the colour of an adapter."""
    code = ["-c", PREFILL] if moment == "first forward" else [ROOT / "generate.py"]
    count = 2 if moment == "batch" else 1
    terminal = Terminal(tmp_path, *code, *endless, *["--prompt", "the fox"] * count)
    try:
        terminal.wait_for("prefill\r\n" if moment == "first forward" else "\x1b[1;")
        terminal.type("\x03")
        screen = terminal.rest()
    finally:
        terminal.close()
    assert terminal.process.returncode == 130 and screen.endswith("\r\ninterrupted\r\n"), screen[-99:]
    codes = re.findall(r"\x1b\[[0-9;]*m", screen)
    assert codes[-1:] == ([] if moment == "first forward" else ["\x1b[0m"])
    assert (screen == "^C\r\ninterrupted\r\n") == (moment == "first forward")


# In the prompt loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("answering", [True, False])
def test_sigterm_ends_the_prompt_loop(endless, tmp_path, answering):
    """Without it a session outlives the machine's shutdown until it is killed, and what was typed
    isn't in the history; or the last line stands beside the prompt."""
    terminal = Terminal(tmp_path, ROOT / "generate.py", *endless, "--interactive")
    try:
        terminal.wait_for("> ")
        terminal.type("the dog\n" if answering else "/new\n")
        terminal.wait_for("\x1b[0m" if answering else "> ")
        end = partial(terminal.process.send_signal, signal.SIGTERM)
        screen = terminal.send_until(end, "terminated\r\n") + terminal.rest()
    finally:
        terminal.close()
    assert terminal.process.returncode == 143 and screen.endswith("\r\nterminated\r\n"), screen[-99:]
    assert "Traceback" not in screen
    kept = (tmp_path / "nanomole" / "history").read_text()
    assert kept == ("the dog\n" if answering else "/new\n")


def test_ctrl_c_stops_one_answer_after_another(endless, tmp_path):
    """Without it the second Ctrl-C of a session, or one at its prompt, ends it with all its turns."""
    terminal = Terminal(tmp_path, ROOT / "generate.py", *endless, "--interactive")
    try:
        for _ in range(3):
            terminal.wait_for("> ")
            terminal.type("the dog\n")
            terminal.wait_for("\x1b[0m")
            terminal.type("\x03")
            assert terminal.wait_for("stopped\r\n").endswith("\r\nstopped\r\n")
            terminal.wait_for("> ")
            terminal.type("the f")
            terminal.wait_for("the f")
            terminal.send_until(lambda: terminal.type("\x03"), "\n")
        terminal.wait_for("> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(OUTPUT) == 0
    finally:
        terminal.close()


# While it trains and writes -----------------------------------------------------------------------

# A train.py that says when it has saved a checkpoint.
TRAIN = """
import train
from common.endings import run_script
from training.loop import Checkpoint
save = Checkpoint.save
def saved(*args):
    save(*args)
    print("saved", flush=True)
Checkpoint.save = saved
run_script(train.main)
"""


def test_a_trainer_can_go_on(tmp_path):
    """Without it a run that the machine's shutdown ended leaves a lock, says nothing of --resume, or
    has to be begun anew."""
    args = vars(options("base", None, tmp_path / "out", steps=3000, save_every=1))
    line = ["base", *(f"--{key}={value}" for key, value in args.items() if type(value) in (str, int, float))]
    line += ["--no-compile"]
    with started("-c", TRAIN, *line) as process:
        assert process.stdout.readline() == "saved\n"
        _, err = ends(process, signal.SIGTERM)
        assert err[-1] == "warning: stopped; --resume goes on from the last checkpoint"
    run = tmp_path / "out" / "runs" / "base"
    assert {file.name for file in run.iterdir()} == {"checkpoint.safetensors", "config.json", "log.csv"}
    assert not list((tmp_path / "out").rglob("*.lock"))
    with started("-c", TRAIN, *line, "--resume") as process:
        assert process.stdout.readline() == "saved\n"
        ends(process, signal.SIGTERM)
    steps = [row.split(",")[0] for row in (run / "log.csv").read_text().splitlines()[1:]]
    assert steps == [str(1 + j) for j in range(len(steps))] and len(steps) >= 2


# Writes a file in a locked folder; when half of it is done it says so and waits.
WRITE = """
import os, signal, sys
from common.endings import run_script
from common.files import write_text
from common.locks import alone
def wait(*args):
    print("writing", flush=True)
    signal.pause()
os.fsync = wait
def main():
    with alone(sys.argv[1]):
        write_text(sys.argv[1] + "/file", "new")
run_script(main)
"""


@both
def test_nothing_is_left_of_what_was_written(number, tmp_path):
    """Without it half a file of gigabytes stays on the disk, and the lock of a process that is gone."""
    (tmp_path / "file").write_text("old")
    with started("-c", WRITE, tmp_path) as process:
        assert process.stdout.readline() == "writing\n"
        assert ends(process, number) == ("", [])
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


# A command whose end takes time: main()'s, and after it Python's own.
SLOW_END = """
import atexit, signal, sys
from common.signals import end_at_once
end_at_once()
from common.endings import run_script
def wait(where):
    print(where, flush=True)
    sys.stdin.readline()
def main():
    try:
        wait("main")
    finally:
        wait("finally")
atexit.register(wait, "exit")
run_script(main)
"""


@both
def test_a_second_signal(number):
    """Without it the second Ctrl-C of an impatient user gives the traceback that the first did not;
    or a `finally` that hangs can't be ended."""
    with started("-c", SLOW_END) as process:
        assert process.stdout.readline() == "main\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "finally\n"
        assert ends(process, number) == ("", [])
    with started("-c", SLOW_END) as process:
        assert process.stdout.readline() == "main\n"
        process.send_signal(number)
        assert process.stdout.readline() == "finally\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "exit\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate("\n", timeout=OUTPUT)
        assert (process.returncode, err) == (SIGNALS[number][0], SIGNALS[number][1] + "\n")


def test_who_ignores_signals_goes_on_ignoring_them(tmp_path):
    """Without it the Ctrl-C meant for another program ends what a script runs in the background, to
    which its shell gave Ctrl-C to ignore."""
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)" + SLOW_END
    with started("-c", code) as process:
        assert process.stdout.readline() == "main\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("\n\n\n", timeout=OUTPUT)
        assert (process.returncode, out, err) == (0, "finally\nexit\n", "")
