"""Answers on a terminal: text in the colour of the adapter that did most of each token's work."""

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

    With `routing` the prompts are shown, too, and answers are bold where an adapter leads.
    """

    def __init__(self, prompts: list[str], traces: list[Trace], routing: bool) -> None:
        self.prompts = prompts
        self.routing = routing
        self.row = -1
        self.palette = Palette.of(traces)  # the adapters of the prompts get the first colours
        self.waiting = [[] for _ in prompts]
        self.done = [False] * len(prompts)
        self.traces = traces
        self.line_open = True  # the answer so far doesn't end with a line break
        self._next()

    def _next(self):
        self.row += 1
        if self.row < len(self.prompts) and self.routing:
            for text, adapters in self.traces[self.row]:
                self._write(text, adapters)

    def _write(self, text, adapters, weight=""):
        shown = text
        if self.routing:
            colour = self.palette.colour(adapters)
            shown = paint(text, colour, f"{weight} {self.palette.style(heaviest(adapters))}")
        print(shown, end="", flush=True)
        self.line_open = not text.endswith("\n") if text else self.line_open

    def push(self, token) -> None:
        """Takes one more token; prints it once all earlier rows are finished."""
        self.waiting[token.row].append(token)
        self.done[token.row] = token.finish is not None
        while self.row < len(self.prompts) and self.waiting[self.row]:
            for token in self.waiting[self.row]:
                self._write(token.text, token.adapters, "bold")
            self.waiting[self.row] = []
            if not self.done[self.row]:
                break
            if self.line_open:
                print()
            self.line_open = True
            self._next()

    def end_line(self) -> None:
        """Ends the line of an answer that is left half-way."""
        if self.line_open:
            print(flush=True)

    def close(self) -> None:
        """Prints the legend, where there is routing to explain."""
        if self.routing and self.palette.weight:
            print(legend(self.palette))
