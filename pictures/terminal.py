"""Answers on a terminal: text in the colour of the adapter that did most of each token's work."""

import sys

from common.printable import in_lines
from pictures.palette import Colour, Palette, Trace, heaviest, key, others

CODES = {"bold": 1, "italic": 3, "underline": 4}


def paint(text: str, colour: Colour | None, style: str = "") -> str:
    """`text` in a terminal colour and a style ("bold underline", ...).

    Both end before each line break, as pagers need.
    """
    if colour is None or not text:
        return text
    codes = [*(CODES[word] for word in style.split()), 38, 2, *colour]
    start = f"\x1b[{';'.join(map(str, codes))}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def legend(palette: Palette, most: int = 8) -> str:
    """One line: the `most` heaviest adapters and all of 2 % or more, each as its text looks."""
    rows = [row for row in palette.shares() if row[2] > 0]
    most = max(most, sum(share >= 0.02 for _, _, share in rows))
    shown = [paint(key(name, share), colour, palette.style(name)) for name, colour, share in rows[:most]]
    return "  ".join([*shown, *others(rows[most:])])


class Printer:
    """Answers on a terminal or a pipe: the first unfinished row streams, later rows wait.

    With `routing` the prompts are shown, too, and answers are bold where an adapter leads. A pipe
    without colours gets the answers as they are; elsewhere hidden characters become their escapes. It
    goes into a `with`, whose end prints the legend or, after Ctrl-C or an error, ends the line.
    """

    def __init__(self, count: int, routing: bool) -> None:
        self.count = count  # of prompts
        self.routing = routing
        self.terminal = sys.stdout.isatty()
        self.row = -1
        self.waiting = [[] for _ in range(count)]
        self.done = [False] * count
        self.last = ""  # the last character of the row so far

    def begin(self, traces: list[Trace]) -> None:
        """Takes the traces of the prompts, which are shown where there is routing."""
        self.traces = traces
        self.palette = Palette.of(traces)  # the adapters of the prompts get the first colours
        self._next()

    def _next(self):
        self.row += 1
        self.last = ""
        if self.row < self.count and self.routing:
            for text, adapters in self.traces[self.row]:
                self._write(text, adapters)

    def _write(self, text, adapters, weight=""):
        shown = in_lines(text) if self.routing or self.terminal else text
        if self.routing:
            colour = self.palette.colour(adapters)
            shown = paint(shown, colour, f"{weight} {self.palette.style(heaviest(adapters))}")
        self.last = text[-1:] or self.last
        print(shown, end="", flush=True)

    def push(self, token) -> None:
        """Takes one more token; prints it once all earlier rows are finished."""
        self.waiting[token.row].append(token)
        self.done[token.row] = token.finish is not None
        while self.row < self.count and self.waiting[self.row]:
            for token in self.waiting[self.row]:
                self._write(token.text, token.adapters, "bold")
            self.waiting[self.row] = []
            if not self.done[self.row]:
                break
            if self.last != "\n":
                print()
            self._next()

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if kind is None:
            if self.routing and self.palette.weight:
                print(legend(self.palette))
            return
        if self.routing and self.last:
            print("\x1b[0m", end="")
        pressed = kind is KeyboardInterrupt and self.terminal  # which shows ^C
        if self.last not in ("", "\n") or pressed:
            print(flush=True)
