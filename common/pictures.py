"""Shows a routing trace as coloured terminal text, a heat map in plain text, a self-contained HTML
page or an SVG picture.

A trace is a list of (text, [[adapter name, weight], ...]), one entry a token, weights averaged over
layers and modules. A token has the colour of its heaviest adapter. The legend names each adapter's
colour and its share of the weight.
"""

import contextlib
import html
import math
import re
import unicodedata
from collections.abc import Iterable
from operator import itemgetter

Colour = tuple[int, int, int]
Trace = list[tuple[str, list]]

# Distinct on dark and light backgrounds. Adapters beyond the list share colours, from the first on.
COLOURS: tuple[Colour, ...] = (
    (66, 135, 245), (235, 125, 30), (46, 170, 90), (214, 60, 70), (150, 100, 220), (160, 110, 60),
    (225, 100, 180), (20, 165, 165), (170, 160, 20), (110, 120, 220), (90, 150, 40), (200, 90, 130),
    (40, 140, 190), (190, 130, 90),
)  # fmt: skip
GREY = (128, 128, 128)  # text that no adapter computed


class Palette:
    """Adapter name -> colour, in order of appearance; each adapter's weight in the text so far."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.weight = dict.fromkeys(names, 0.0)  # `names` get their colours first

    @classmethod
    def of(cls, traces: Iterable[Trace]) -> "Palette":
        """Colours for text that is whole: the adapters that carry most of it get distinct ones."""
        seen = cls()
        for trace in traces:
            for _, adapters in trace:
                seen.colour(adapters)
        return cls(name for name, _, _ in seen.shares())

    def colour(self, adapters: list) -> Colour | None:
        """The colour of a token's heaviest adapter, None where none is active."""
        for name, weight in adapters:
            self.weight[name] = self.weight.get(name, 0.0) + weight
        heaviest, weight = max(adapters, key=itemgetter(1), default=(None, 0))
        if weight <= 0:
            return None
        return COLOURS[list(self.weight).index(heaviest) % len(COLOURS)]

    def shares(self) -> list[tuple[str, Colour, float]]:
        """[(name, colour, share of all weight)], heaviest first."""
        total = sum(self.weight.values()) or 1.0
        rows = []
        for index, (name, weight) in enumerate(self.weight.items()):
            rows.append((name, COLOURS[index % len(COLOURS)], weight / total))
        return sorted(rows, key=lambda row: -row[2])


def paint(text: str, colour: Colour | None, faint: bool = False) -> str:
    """`text` in a terminal colour, which ends before each line break, as pagers need."""
    if colour is None or not text:
        return text
    codes = [2, 38, 2, *colour] if faint else [38, 2, *colour]
    start = f"\x1b[{';'.join(map(str, codes))}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def _key(name, share):
    return f"■ {name} {share:.0%}"


def legend(palette: Palette, most: int = 8) -> str:
    """One line: the adapters used, each in its colour, with its share."""
    rows = palette.shares()
    shown = "  ".join(paint(_key(name, share), colour) for name, colour, share in rows[:most])
    return shown + (f"  and {len(rows) - most} more" if len(rows) > most else "")


def _html_span(role, text, adapters, colour):
    tip = ", ".join(f"{name} {weight:.2f}" for name, weight in adapters)
    style = f'class="{role}" style="--c:rgb{colour}" title="{html.escape(tip, quote=True)}"'
    return f"<span {style}>{html.escape(text)}</span>"


def html_page(traces: list[tuple[Trace, Trace]], title: str) -> str:
    """A page that needs no other file; `traces`: (prompt trace, answer trace) of each request."""
    palette = Palette.of(trace for pair in traces for trace in pair)
    body = ""
    for pair in traces:
        body += "<pre>"
        for role, trace in zip(("prompt", "answer"), pair, strict=True):
            for text, adapters in trace:
                body += _html_span(role, text, adapters, palette.colour(adapters) or GREY)
        body += "</pre>"
    keys = []
    for name, colour, share in palette.shares():
        keys.append(f'<b style="--c:rgb{colour}">{html.escape(_key(name, share))}</b>')
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>'
        "body{font:16px system-ui;max-width:60em;margin:2em auto;padding:0 1em}"
        "pre{white-space:pre-wrap;font:15px/1.7 ui-monospace,monospace}"
        "span{border-bottom:3px solid var(--c)}span.prompt{opacity:.55}"
        "b{color:var(--c);margin-right:1em}"
        f"</style><h1>{title}</h1>{body}<p>{' '.join(keys)}</p></html>\n"
    )


def svg_picture(prompt: Trace, answer: Trace, width: int = 96) -> str:
    """The two traces of one request as an SVG image of coloured text on white.

    Lines break at `width` characters, the prompt is paler than the answer, the legend comes last.
    """
    palette = Palette.of((prompt, answer))
    lines = [""]  # each a row of <tspan>
    length = 0  # of the last one, in characters

    def break_line():
        nonlocal length
        lines.append("")
        length = 0

    def add(text, colour, opacity):
        nonlocal length
        if length + len(text) > width:
            break_line()
        fill = "#" + bytes(colour).hex()
        lines[-1] += f'<tspan fill="{fill}" opacity="{opacity}">{html.escape(text)}</tspan>'
        length += len(text)

    for opacity, trace in ((0.6, prompt), (1, answer)):
        for text, adapters in trace:
            colour = palette.colour(adapters) or GREY
            for part in re.findall(r"\n|[^\n]+", text):
                if part == "\n":
                    break_line()
                else:
                    add(part, colour, opacity)
    break_line()
    break_line()
    for name, colour, share in palette.shares()[:12]:
        add(_key(name, share) + "   ", colour, 1)
    rows = ""
    for number, spans in enumerate(lines, 1):
        rows += f'<text x="16" y="{8 + 22 * number}" xml:space="preserve">{spans}</text>'
    size = f"{32 + 9 * width} {24 + 22 * len(lines)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
        'font-family="ui-monospace,monospace" font-size="15">'
        f'<rect width="100%" height="100%" fill="white"/>{rows}</svg>\n'
    )


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


# The heat map ------------------------------------------------------------------------------------

SHADES = (" ▁▂▃▄▅▆▇█", " .:-=+*#%@")  # the first that the output's encoding can, the second can always


def heat_map(prompt: Trace, answer: Trace, width: int = 100, encoding: str = "utf-8") -> str:
    """The two traces of one request as plain text: a column for each token, as wide as its text, a row
    for each adapter that took part, shaded by the adapter's weight there.

    Lines break at `width` characters. Above the rows stand the tokens' texts, | between them.
    """
    palette = Palette()
    for _, adapters in (*prompt, *answer):
        palette.colour(adapters)
    labels = {name: f"{share:5.0%} {name}" for name, _, share in palette.shares() if share > 0}
    if not labels:
        return "no adapter took part"
    shades = SHADES[0] if _can_encode(SHADES[0], encoding) else SHADES[1]
    margin = min(max(map(len, labels.values())), max(6, width // 3))
    lines = []
    for title, trace in (("prompt", prompt), ("answer", answer)):
        for columns in _wrap_tokens(trace, width - margin - 1, encoding):
            lines.append(f"{title:<{margin}} " + "|".join(text for text, _ in columns))
            for name, label in labels.items():
                shaded = [_shade(text, adapters, name, shades) for text, adapters in columns]
                if any(map(str.strip, shaded)):
                    row = f"{label[:margin]:<{margin}} " + " ".join(shaded)
                    lines.append(row.rstrip())
            title = ""
    return "\n".join([*lines, f"{shades[1]} to {shades[-1]}: a weight above 0 to 1, % of all weight"])


def _wrap_tokens(trace, room, encoding):
    """[(text, adapters)] in lines of at most `room` columns, but for a token that is wider. Line breaks
    and what can't be printed are escaped, an empty text is a space."""
    lines = [[]]
    used = 0
    for text, adapters in trace:
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        text = text.encode(encoding, "backslashreplace").decode(encoding) or " "
        if lines[-1] and used + _width(text) > room:
            lines.append([])
            used = 0
        lines[-1].append((text, adapters))
        used += _width(text) + 1
    return lines if lines[0] else []


def _shade(text, adapters, name, shades):
    """The shade of adapter `name`'s weight at a token, as wide as its text: the first for none, the
    last for 1 and more."""
    weight = dict(adapters).get(name, 0.0)
    level = math.ceil(min(weight, 1.0) * (len(shades) - 1))
    return shades[max(level, 0)] * _width(text)


def _width(text):
    """The columns that a text takes on a terminal: Chinese characters take two, accents none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _can_encode(text, encoding):
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(encoding)
        return True
    return False
