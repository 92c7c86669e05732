"""The progress of long steps on standard error: a bar on a terminal, now and then a line elsewhere.

A log file or a pipe gets whole lines without carriage returns ("adapters: 120/300, 2:10 left, loss
0.51"). What ends within a few seconds shows nothing.
"""

import sys
import time
from collections.abc import Collection, Iterator

from tqdm import tqdm

from common.printable import printable

BEGIN = 2  # seconds without a bar
FIRST = 5  # seconds to the first line
EVERY = 10  # seconds between lines


class Bar(tqdm):
    """A bar whose texts may be any: a task's name, a file's."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """The text at the end of the bar."""
        super().set_postfix_str(printable(s), refresh)


def progress(what: str, total: int, done: int = 0) -> "Bar | Lines":
    """Shows how much of `total` is done, `done` at the start, and the time that is left.

    It goes into a `with`. In it update(n) counts n more, and set_postfix_str(text, refresh=False)
    adds a text. A bar within another one's step goes when it ends; its lines in a log
    stay.
    """
    what = printable(what)
    if sys.stderr.isatty():
        shown = {"file": sys.stderr, "mininterval": 1, "delay": BEGIN, "leave": None}
        return Bar(desc=what, total=total, initial=done, **shown)
    return Lines(what, total, done)


def track(items: Collection, what: str) -> Iterator:
    """The items one by one, with progress() of them."""
    with progress(what, len(items)) as bar:
        for item in items:
            yield item
            bar.update()


class Lines:
    """A bar's place where standard error is no terminal; the methods are tqdm's."""

    def __init__(self, what: str, total: int, done: int):
        self.what = what
        self.total = total
        self.done = done
        self.begin_done = done
        self.begin = time.monotonic()
        self.next_line = self.begin + FIRST
        self.shown = False
        self.text = ""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        """The last line, of what took long enough and didn't end by an error."""
        took = time.monotonic() - self.begin
        if kind is None and (self.shown or took >= FIRST):
            self._print(f" in {clock(took)}")

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """The text at the end of the next lines."""
        self.text = printable(text)

    def update(self, n: int = 1) -> None:
        """Counts n more; prints a line if one is due."""
        self.done += n
        now = time.monotonic()
        new = self.done - self.begin_done
        if now >= self.next_line and new and self.done < self.total:
            left = (now - self.begin) / new * (self.total - self.done)
            self._print(f", {clock(left)} left")
            self.next_line = now + EVERY

    def _print(self, time_text):
        text = f", {self.text}" if self.text else ""
        print(f"{self.what}: {self.done}/{self.total}{time_text}{text}", file=sys.stderr, flush=True)
        self.shown = True


def clock(seconds: float) -> str:
    """130 -> 2:10, 7325 -> 2:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
