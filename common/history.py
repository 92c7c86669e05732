"""Arrow keys and a history of what was typed, for a prompt loop on a terminal."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

LINES = 1000  # kept at most


@contextlib.contextmanager
def line_history(words: Callable[[], list[str]]) -> Iterator[None]:
    """Inside it input() knows the lines of earlier sessions, and Tab completes one of words(); at its
    end the file has this session's lines too.

    Does nothing where standard input is no terminal or Python has no readline. A file that can't be
    read or written is not an error.
    """
    readline = _readline() if sys.stdin.isatty() else None
    if readline is None:
        yield
        return
    readline.set_completer(lambda text, j: [*filter(lambda w: w.startswith(text), words()), None][j])
    readline.set_completer_delims(" :=,")
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(LINES)
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        readline.read_history_file(history_file())
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            file = history_file()
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def _readline():
    try:
        import readline  # input() uses it as soon as it is imported
    except ImportError:
        return None
    return readline


def history_file() -> Path:
    """$XDG_STATE_HOME/nanomole/history; where that isn't an absolute path, below ~/.local/state."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path("~/.local/state").expanduser()
    return state / "nanomole" / "history"
