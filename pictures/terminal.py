"""Answers on a terminal: text in the colour of the adapter that did most of each token's work."""

from pictures.palette import Colour, Palette, Trace, key


def paint(text: str, colour: Colour | None, faint: bool = False) -> str:
    """`text` in a terminal colour, which ends before each line break, as pagers need."""
    if colour is None or not text:
        return text
    codes = [2, 38, 2, *colour] if faint else [38, 2, *colour]
    start = f"\x1b[{';'.join(map(str, codes))}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def legend(palette: Palette, most: int = 8) -> str:
    """One line: the adapters used, each in its colour, with its share."""
    rows = palette.shares()
    shown = "  ".join(paint(key(name, share), colour) for name, colour, share in rows[:most])
    return shown + (f"  and {len(rows) - most} more" if len(rows) > most else "")


class Printer:
    """Answers on a terminal or a pipe: the first unfinished row streams, later rows wait."""

    def __init__(self, prompts: list[str], traces: list[Trace], routing: bool) -> None:
        self.prompts = prompts
        self.routing = routing
        self.row = -1
        self.palette = Palette()
        self.waiting = [[] for _ in prompts]
        self.done = [False] * len(prompts)
        self.traces = traces
        self.line_open = True  # the answer so far doesn't end with a line break
        self._next()

    def _next(self):
        self.row += 1
        if self.row < len(self.prompts) and self.routing:
            for text, adapters in self.traces[self.row]:
                self._write(text, adapters, faint=True)

    def _write(self, text, adapters, faint=False):
        shown = paint(text, self.palette.colour(adapters), faint) if self.routing else text
        print(shown, end="", flush=True)
        self.line_open = not text.endswith("\n") if text else self.line_open

    def push(self, token) -> None:
        """Takes one more token; prints it once all earlier rows are finished."""
        self.waiting[token.row].append(token)
        self.done[token.row] = token.finish is not None
        while self.row < len(self.prompts) and self.waiting[self.row]:
            for token in self.waiting[self.row]:
                self._write(token.text, token.adapters)
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
