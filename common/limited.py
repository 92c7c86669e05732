"""Calls that could go on forever, in a helper process that can be stopped.

Patterns, chat templates and tokenizer.json come with downloads. Each can ask for endless time or
memory, or crash the library that reads it. Nothing stops a thread from outside, but a process has
limits that the kernel enforces. The helper starts at the first call, which takes about 0.1 s, and is
kept for the next ones, which take half a millisecond. After a call that failed it is replaced, so
that nothing of that call is left.
"""

import atexit
import contextlib
import importlib
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import InputError

MEMORY = 1 << 30  # bytes of address space
OUTPUT = 10_000_000  # characters of an answer
WALL_SECONDS = 60  # for a call that waits instead of computing

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import common.limited as m; m.serve()"
_helpers = {}  # process id -> its helper: after a fork two processes must not share one


class LimitedError(Exception):
    """A call that failed or was stopped. The message is short, and says why."""


def call_limited(function: Callable, *arguments: Any, seconds: int = 2) -> Any:
    """function(*arguments), in the helper process, with at most `seconds` of CPU time.

    `function` is at the top level of a module of ours; arguments and result are JSON values. Raises
    LimitedError where it raises anything but InputError, crashes, or needs more than the limits.
    """
    try:
        request = json.dumps([function.__module__, function.__name__, arguments, seconds])
    except (TypeError, ValueError, RecursionError) as error:
        raise LimitedError(f"not a JSON value: {error}") from None
    return _helpers.setdefault(os.getpid(), _Helper()).call(request, seconds)


class _Helper:
    """The process, while there is one. Its lock lets any thread call."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = None

    def call(self, request, seconds):
        with self.lock:
            if self.process is None:
                self._start()
            try:
                answer = self._exchange(request, seconds)
            except BaseException:  # after Ctrl-C, too, the call would go on
                self._stop()
                raise
            return answer

    def _start(self):
        paths = json.dumps([*map(str, sys.path), str(Path(__file__).parent.parent)])
        line = [sys.executable, "-IB", "-c", START, paths]  # -I: no json.py of the current folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # In a session of its own it doesn't get the terminal's Ctrl-C; it ends when its stdin does.
        self.process = subprocess.Popen(line, **pipes, start_new_session=True)
        atexit.register(self._stop)

    def _stop(self):
        atexit.unregister(self._stop)
        # A process that was forked from the helper's inherits this object, and leaves the helper alone.
        if self.process is not None and _helpers.get(os.getpid()) is self:
            self.process.kill()
            self.process.communicate()
        self.process = None

    def _exchange(self, request, seconds):
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
            answers = select.poll()
            answers.register(self.process.stdout, select.POLLIN)
            if not answers.poll(1000 * WALL_SECONDS):
                self.process.kill()
            line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise LimitedError(_how_it_ended(self.process.wait(), seconds))
        kind, value = json.loads(line)
        if kind == "bad input":
            raise InputError(value)
        if kind == "error":
            raise LimitedError(value)
        return value


def _how_it_ended(status, seconds):
    if status == -signal.SIGXCPU:
        return f"takes more than {seconds} seconds"
    if status == -signal.SIGKILL:
        return f"takes more than {WALL_SECONDS} seconds, or too much memory"
    return f"crashes, or needs more than {MEMORY >> 30} GiB of memory (status {status})"


# In the helper ------------------------------------------------------------------------------------


def serve() -> None:
    """The helper's whole life: answers the calls on stdin until that ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what a library prints
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    for request in sys.stdin:
        module, name, arguments, seconds = json.loads(request)
        function = getattr(importlib.import_module(module), name)
        _limit_time(seconds)
        answers.write(_answer(function, arguments) + "\n")
        answers.flush()
        _limit_time(WALL_SECONDS)  # to read and import what the next call names


def _answer(function, arguments):
    """The call's outcome as JSON: [kind, value]."""
    try:
        answer = json.dumps(["result", function(*arguments)])
    except InputError as error:
        return json.dumps(["bad input", str(error)])
    except MemoryError:
        return json.dumps(["error", f"needs more than {MEMORY >> 30} GiB of memory"])
    except Exception as error:
        return json.dumps(["error", str(error)[:1000] or type(error).__name__])
    except BaseException as error:  # a panic in a library written in Rust
        return json.dumps(["error", f"{type(error).__name__}: {str(error)[:1000]}"])
    if len(answer) > OUTPUT:
        return json.dumps(["error", f"gives more than {OUTPUT:,} characters"])
    return answer


def _limit_time(seconds):
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))


def _limit(kind, most):
    """Lowers the process's own limit; a lower one that the user set stays."""
    hard = resource.getrlimit(kind)[1]
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(ValueError):  # macOS has no limit of the address space
        resource.setrlimit(kind, (soft, hard))
