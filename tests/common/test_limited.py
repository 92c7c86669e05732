"""The limited process answers, is stopped where it must be, and leaves nothing behind."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import import_module
from pathlib import Path

import pytest

import helpers_limited as calls
from common import limited
from common.files import InputError
from common.limited import LimitedError, call_limited
from helpers_commands import ENVIRONMENT, ROOT

VALUES = [None, True, 3, -0.5, 10**30, "ß\n\u2028\ud800\0", [1, [2]], {"a": {"b": []}}, float("inf")]


def test_values_come_back_as_they_went():
    """A template or a tokenizer would see another text than the user's."""
    assert call_limited(calls.echo, *VALUES) == VALUES
    long = "日" * 500_000  # more than a pipe holds
    assert call_limited(calls.echo, long) == [long]


FAILURES = [
    (calls.endless, (), "takes more than 1 seconds"),
    (calls.hungry, (), "needs more than 1 GiB of memory"),
    (calls.long_answer, (), "gives more than 10,000,000 characters"),
    (calls.abort, (), "crashes"),
    (calls.leave, (), "crashes"),
    (calls.leave_politely, (), "SystemExit"),
    (calls.fail, ("why",), "why"),
    (calls.fail, ("",), "ValueError"),
    (calls.fail, ("a" * 10**7,), "aaaa"),
    (calls.panic, (), "index out of bounds"),
    (calls.no_json, (), "not JSON serializable"),
    (calls.echo, (date(2026, 1, 2),), "not a JSON value"),
    (calls.echo, (10**5000,), "not a JSON value"),
]


@pytest.mark.parametrize(("function", "arguments", "words"), FAILURES)
def test_what_fails_says_why_and_the_next_call_works(function, arguments, words):
    """A hang, a traceback, a killed program; or one bad template and no chat works any more."""
    with pytest.raises(LimitedError) as caught:
        call_limited(function, *arguments, seconds=1)
    assert words in str(caught.value) and len(str(caught.value)) < 1100
    assert call_limited(calls.echo, 7) == [7]


SLOW_IMPORT = """
import time
end = time.process_time() + 0.5
while time.process_time() < end:
    pass
def answer():
    return 7
"""


def test_a_call_leaves_time_for_the_next(tmp_path, monkeypatch):
    """Without it a call that just came in time ends the next one: what it imports and reads before its
    own time begins would be in the first one's."""
    (tmp_path / "slow_import.py").write_text(SLOW_IMPORT)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LimitedError):
        call_limited(calls.fail, "why")  # the process that replaces this one knows the folder
    call_limited(calls.use_up, seconds=1)
    assert call_limited(import_module("slow_import").answer) == 7


def test_a_call_that_only_waits_is_stopped(monkeypatch):
    """A sleeping process uses no CPU time, so the kernel's limit never comes."""
    monkeypatch.setattr(limited, "WALL_SECONDS", 1)
    with pytest.raises(LimitedError, match="takes more than 1 seconds"):
        call_limited(calls.asleep)


def test_input_errors_are_passed_on():
    """The line would name the file twice, or be taken for a fault of the library."""
    with pytest.raises(InputError, match="^file: field is 1, expected 2$"):
        call_limited(calls.refuse)


def test_what_a_library_prints_is_no_answer(capfd):
    """One print inside a library would be read as the answer; a panic's text would be a second
    line."""
    assert call_limited(calls.talkative) == "answer"
    assert capfd.readouterr() == ("", "")


def test_one_process_serves_all_calls_of_all_threads():
    """A process a call would cost each training example 50 ms, and two threads that write into one
    pipe would get each other's answers."""
    with ThreadPoolExecutor(7) as threads:
        answers = list(threads.map(lambda n: call_limited(calls.echo, "x" * n), range(0, 20_000, 101)))
        assert answers == [["x" * n] for n in range(0, 20_000, 101)]
        assert len(set(threads.map(lambda _: call_limited(calls.process_id), range(20)))) == 1


def test_a_forked_process_gets_one_of_its_own():
    """Parent and child would read each other's answers."""
    first = call_limited(calls.process_id)
    child = os.fork()
    if not child:
        own = call_limited(calls.process_id) != first and call_limited(calls.echo, 5) == [5]
        os._exit(0 if own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert call_limited(calls.process_id) == first


# What is left when the program ends ---------------------------------------------------------------

SCRIPT = """
import sys
import helpers_limited as calls
from common.endings import run_script
from common.limited import call_limited

def main():
    print(call_limited(calls.process_id), flush=True)
    {then}

run_script(main)
"""


def start(then):
    """A program of ours that does `then` after it started the limited process; (it, that's id)."""
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    line = [sys.executable, "-X", "dev", "-c", SCRIPT.format(then=then)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = subprocess.Popen(line, **pipes, text=True, env=environment, start_new_session=True)
    return program, int(program.stdout.readline())


def runs(process):
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(process):
    """Fails where the process is still there after 60 seconds."""
    end = time.monotonic() + 60
    while runs(process):
        assert time.monotonic() < end
        time.sleep(0.02)


def busy(process):
    """Waits until the process has used some CPU time after its start."""
    ticks = lambda: int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11])  # noqa: E731
    before = ticks()
    while ticks() < before + 10:
        time.sleep(0.02)


@pytest.mark.parametrize("then", ["pass", "sys.exit(0)", "call_limited(calls.echo, 3)"])
def test_a_program_ends_quietly(then):
    """Each command would leave a process behind, or end with a warning."""
    program, helper = start(then)
    assert program.communicate(timeout=60) == ("", "") and program.returncode == 0
    assert not runs(helper)


def test_ctrl_c_ends_a_call_in_one_line():
    """The terminal sends Ctrl-C to all processes in front: the limited one would add its traceback,
    or the program would wait for the end of its call."""
    program, helper = start("call_limited(calls.endless, seconds=1000)")
    busy(helper)
    os.killpg(program.pid, signal.SIGINT)
    assert program.communicate(timeout=60) == ("", "interrupted\n") and program.returncode == 130
    assert not runs(helper)


def test_after_ctrl_c_the_next_call_gets_its_own_answer():
    """An interactive session would read the stopped call's answer as that of the next one."""
    main = threading.main_thread().ident
    timer = threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        call_limited(calls.asleep)
    timer.join()
    assert call_limited(calls.echo, 5) == [5]


@pytest.mark.parametrize("then", ["call_limited(calls.endless, seconds=2)", "sys.stdin.read()"])
def test_a_killed_program_leaves_no_busy_process(then):
    """kill -9 runs no exit handlers: an endless template would go on for ever. One that waits for
    nothing but its next call ends at once."""
    program, helper = start(then)
    program.kill()
    program.communicate(timeout=60)
    wait_until_gone(helper)


def test_a_lower_limit_of_the_user_stays():
    """Raising a limit above the hard one is an error: no chat would work under ulimit -v."""
    code = "import helpers_limited as calls; from common.limited import call_limited\n"
    code += "print(call_limited(calls.echo, 3))"
    line = f"ulimit -v 900000; ulimit -t 50; {sys.executable} -c {shlex.quote(code)}"
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("[3]\n", "")
