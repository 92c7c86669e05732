"""The routing of one request as an SVG picture, for a page, light or dark, or for a paper."""

import html
import re
from collections import Counter

from pictures.columns import columns, visible
from pictures.palette import GREY, Colour, Palette, Trace, heaviest, key, others

COLUMN = 9.6  # pixels from column to column: 0.6 of the font's size, as most monospaced fonts have it
LINE = 24  # pixels from line to line
MARGIN = 16
# The adapters' colours serve on white and on black, the labels follow the reader's theme. What no
# adapter of the legend leads is grey and thin.
STYLE = (
    "text{font:600 16px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
    ".rest{font-weight:400}"
    ".label{font:14px system-ui,sans-serif;fill:#59636e}"
    "@media(prefers-color-scheme:dark){.label{fill:#9198a1}}"
)


class _Drawing:
    """Words in lines of at most `width` columns; `line` and `column` are where it goes on."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.line = 0.5
        self.column = 0
        self.widest = 50  # columns, enough for the labels
        self.texts = []  # each a <text>

    def break_line(self, lines: float = 1) -> None:
        self.line += lines
        self.column = 0

    def label(self, text: str) -> None:
        """A line that says what comes after it."""
        self._place(text, 'class="label"')
        self.break_line()

    def write(self, text: str, colour: Colour) -> None:
        """Coloured text. A token's word that no longer fits begins a new line."""
        for part in re.findall(r"\n| +|[^\n ]+", text.expandtabs(4)):
            if part == "\n":
                self.break_line()
            elif part[0] == " ":
                self.column += len(part)
            else:
                self.word(visible(part), colour)

    def word(self, text: str, colour: Colour) -> None:
        """Coloured text that stays together, as wide as its columns whatever the reader's font."""
        wide = columns(text)
        if self.column and self.column + wide > self.width:
            self.break_line()
        rest = 'class="rest" ' if colour == GREY else ""
        length = f' textLength="{COLUMN * wide:g}"' if wide else ""  # an accent by itself has none
        self._place(text, f'{rest}fill="#{bytes(colour).hex()}"{length}')
        self.column += wide
        self.widest = max(self.widest, self.column)

    def _place(self, text, attributes):
        x = MARGIN + COLUMN * self.column
        y = MARGIN + LINE * self.line
        self.texts.append(f'<text x="{x:g}" y="{y:g}" {attributes}>{html.escape(text)}</text>\n')

    def svg(self) -> str:
        """The image."""
        across = 2 * MARGIN + COLUMN * self.widest
        down = 2 * MARGIN + LINE * self.line
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{across:g}" height="{down:g}" '
            f'viewBox="0 0 {across:g} {down:g}">\n<style>{STYLE}</style>\n{"".join(self.texts)}</svg>\n'
        )


def leaders(*traces: Trace) -> list[str]:
    """The adapters that are a token's heaviest, those of the first trace first, and in each trace
    those that lead the most characters."""
    led = {}
    for trace in traces:
        count = Counter()
        for text, adapters in trace:
            count[heaviest(adapters)] += len(text)
        led |= dict.fromkeys(name for name, _ in count.most_common() if name and name not in led)
    return list(led)


def svg_picture(prompt: Trace, answer: Trace, width: int = 90, most: int = 6) -> str:
    """The two traces of one request as an SVG image of coloured text on no background.

    Lines break at `width` columns. `most` adapters have colours and stand in the legend, each with
    its share of all weight: those that lead most of the answer, then of the prompt, then the
    heaviest. The rest is grey.
    """
    heavy = Palette.of((prompt, answer)).weight
    named = list(dict.fromkeys([*leaders(answer, prompt), *heavy]))[:most]
    palette = Palette(named)
    drawing = _Drawing(width)
    for title, trace in (("Prompt", prompt), ("The model's answer", answer)):
        drawing.label(title)
        for text, adapters in trace:
            colour = palette.colour(adapters)
            drawing.write(text, colour if heaviest(adapters) in named else GREY)
        drawing.break_line(1.5 if drawing.column else 0.5)
    shares = [row for row in palette.shares() if row[2] > 0]
    shares.sort(key=lambda row: row[0] not in named)
    if shares:
        drawing.label("Adapters, each with its share of all routing weight")
    legend = [(key(name, share), colour) for name, colour, share in shares[: len(named)]]
    legend += [(f"■ {text}", GREY) for text in others(shares[len(named) :])]
    drawing.width = drawing.widest
    for text, colour in legend:
        drawing.word(visible(text), colour)
        drawing.column += 3
    return drawing.svg()
