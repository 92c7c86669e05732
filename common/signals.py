"""What Ctrl-C and SIGTERM do to a command: one line and status 130 or 143, never a traceback.

Only the standard library's quickest modules are imported here, because a command comes here before
all its other imports: torch's takes seconds, in which people press Ctrl-C.
"""

import contextlib
import os
import signal

ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it passes `except Exception` and runs `finally` blocks."""


def end_at_once() -> None:
    """From now on Ctrl-C and SIGTERM end the process where it stands: for as long as it holds nothing
    that has to be put in order, such as a lock or a file half written."""
    _handle(dict.fromkeys(ENDED, _end))


def raise_once() -> dict:
    """From now on Ctrl-C raises KeyboardInterrupt and SIGTERM Terminated; whichever comes next, while
    `finally` blocks run or because one hangs, ends the process at once. Returns for restore() what
    the two did before."""
    before = {number: signal.getsignal(number) for number in ENDED}
    _handle(dict.fromkeys(ENDED, _raise))
    return before


def restore(before: dict) -> None:
    """Ctrl-C and SIGTERM do what they did `before`. In a process that began with end_at_once() they
    do nothing: how it ends is decided, and Python takes a moment to end."""
    _handle({number: signal.SIG_IGN if what is _end else what for number, what in before.items()})


def _handle(handlers):
    for number, handler in handlers.items():
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's & ask for
            signal.signal(number, handler)


def _raise(number, frame):
    end_at_once()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _end(number, frame):
    with contextlib.suppress(OSError):  # standard error may be closed
        os.write(2, f"{ENDED[number]}\n".encode())
    os._exit(128 + number)
