"""How a command ends: with one line and an exit status for bad input, Ctrl-C, SIGTERM, a closed pipe
and a full disk."""

import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
from collections.abc import Callable

from common.files import InputError, say
from common.processes import rank
from common.signals import ENDED, Terminated, raise_once, restore


def run_script(main: Callable[[], None]) -> None:
    """Runs `main()` as a command.

    InputError becomes one line and exit status 2. The status of Ctrl-C is 130, of SIGTERM 143, of a
    closed pipe 141.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without ó
    _keep_memory()
    gc.freeze()  # spares a later garbage collection all that was imported, which takes 0.1 s
    before = raise_once()
    try:
        status = _status_of(main)
        restore(before)  # here, where a signal that comes in this moment is still caught
    except KeyboardInterrupt:
        restore(before)
        status = _stopped_by(signal.SIGINT)
    except Terminated:
        restore(before)
        status = _stopped_by(signal.SIGTERM)
    finally:
        restore(before)
        _flush(sys.stdout)
        _flush(sys.stderr)
    if status:
        sys.exit(status)


def _status_of(main):
    """Runs main() -> the exit status; what went wrong has been said."""
    status = 0
    try:
        try:
            main()
        except SystemExit as end:  # argparse's, after --help and after an error
            status = end.code
        sys.stdout.flush()
    except InputError as error:
        print_error(error)
        return 2
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder that can't be written
        print_error(error)
        return 2
    return status


def print_error(error: InputError | OSError) -> None:
    """One line on standard error: what was wrong, or which file the system couldn't read or write."""
    message = error
    if isinstance(error, OSError):
        name = error.filename2 or error.filename or "standard output"  # a rename's target
        message = f"{name}: {error.strerror or error}"
    with contextlib.suppress(OSError):  # standard error may be a full disk, too
        say(f"error: {message}")


def _stopped_by(number):
    with contextlib.suppress(OSError):
        if rank() == 0:
            say(ENDED[number])
    return 128 + number


def _flush(stream):
    """Writes what `stream` holds. What can't be written is dropped, or Python would try once more at
    exit and say "Exception ignored"."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())


def _keep_memory():
    """Tells glibc to keep up to 1 GiB of freed memory.

    By default it returns large tensors to the system at once, and the next one needs its pages
    mapped and cleared again: a tenth of the time of a long prompt in a large model (LOG.md).
    """
    if mallopt := getattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt", None):
        M_TRIM_THRESHOLD = -1
        M_MMAP_THRESHOLD = -3  # malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**30)
