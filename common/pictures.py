"""A routing trace to coloured terminal text, a self-contained HTML page and a picture.

A trace is a list of (text, [[adapter name, weight], ...]), one entry a token, weights averaged over
layers and modules. A token has the colour of its heaviest adapter; the legend says which is which
and how much of the text each one carried.
"""

import html
import re

# Distinct on dark and light backgrounds, the nearest first; adapters beyond the list share colours
# in turn.
COLOURS = (
    (66, 135, 245), (235, 125, 30), (46, 170, 90), (214, 60, 70), (150, 100, 220), (160, 110, 60), (225, 100, 180),
    (20, 165, 165), (170, 160, 20), (110, 120, 220), (90, 150, 40), (200, 90, 130), (40, 140, 190), (190, 130, 90),
)  # fmt: skip


class Palette:
    """Adapter name -> colour, in order of appearance, and each one's share of the tokens coloured
    so far."""

    def __init__(self, names=()):
        self.weight = dict.fromkeys(names, 0.0)  # `names` get their colours first

    @classmethod
    def of(cls, traces):
        """Colours for text that is known whole: the adapters that carry most of it are told apart
        best."""
        seen = cls()
        for _, adapters in (token for trace in traces for token in trace):
            seen.colour(adapters)
        return cls(name for name, _, _ in seen.shares())

    def colour(self, adapters):
        """The colour of a token's heaviest adapter, None where none is active."""
        for name, weight in adapters:
            self.weight[name] = self.weight.get(name, 0.0) + weight
        if not adapters or max(weight for _, weight in adapters) <= 0:
            return None
        heaviest = max(adapters, key=lambda pair: pair[1])[0]
        return COLOURS[list(self.weight).index(heaviest) % len(COLOURS)]

    def shares(self):
        """[(name, colour, share of all weight)], heaviest first."""
        total = sum(self.weight.values()) or 1.0
        rows = [(n, COLOURS[j % len(COLOURS)], w / total) for j, (n, w) in enumerate(self.weight.items())]
        return sorted(rows, key=lambda row: -row[2])


def paint(text, colour, faint=False):
    """`text` in an RGB colour for the terminal; the colour ends before each line break, so that
    pagers keep up."""
    if colour is None or not text:
        return text
    start = f"\x1b[{'2;' if faint else ''}38;2;{';'.join(map(str, colour))}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def legend(palette, most=8):
    """One line: the adapters used, each in its colour, with its share."""
    rows = palette.shares()
    shown = "  ".join(paint(f"■ {name} {share:.0%}", colour) for name, colour, share in rows[:most])
    return shown + (f"  and {len(rows) - most} more" if len(rows) > most else "")


def html_page(traces, title):
    """A page that needs nothing else: traces is a list of (prompt trace, answer trace)."""
    palette = Palette.of(trace for pair in traces for trace in pair)
    body = []
    for prompt, answer in traces:
        spans = []
        for role, trace in (("prompt", prompt), ("answer", answer)):
            for text, adapters in trace:
                colour = palette.colour(adapters) or (128, 128, 128)
                tip = ", ".join(f"{name} {weight:.2f}" for name, weight in adapters)
                spans.append(
                    f'<span class="{role}" style="--c:rgb{colour}" title="{html.escape(tip, quote=True)}">'
                    f"{html.escape(text)}</span>"
                )
        body.append(f"<pre>{''.join(spans)}</pre>")
    keys = " ".join(f'<b style="--c:rgb{c}">■ {html.escape(n)} {s:.0%}</b>' for n, c, s in palette.shares())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>'
        "body{font:16px system-ui;max-width:60em;margin:2em auto;padding:0 1em}"
        "pre{white-space:pre-wrap;font:15px/1.7 ui-monospace,monospace}"
        "span{border-bottom:3px solid var(--c)}span.prompt{opacity:.55}b{color:var(--c);margin-right:1em}"
        f"</style><h1>{html.escape(title)}</h1>{''.join(body)}<p>{keys}</p></html>\n"
    )


def svg_picture(prompt, answer, width=96):
    """The two traces of one request as an SVG image: coloured text on white, lines broken at
    `width` characters, the prompt paler than the answer, the legend below."""
    palette = Palette.of((prompt, answer))
    lines = [[]]
    for opacity, trace in ((0.6, prompt), (1, answer)):
        for text, adapters in trace:
            red, green, blue = palette.colour(adapters) or (128, 128, 128)
            for part in re.findall(r"\n|[^\n]+", text):
                if part == "\n" or sum(len(shown) for shown, *_ in lines[-1]) + len(part) > width:
                    lines.append([])
                if part != "\n":
                    lines[-1].append((part, f"#{red:02x}{green:02x}{blue:02x}", opacity))
    lines += [[], []]
    for name, (red, green, blue), share in palette.shares()[:12]:
        key = f"■ {name} {share:.0%}   "
        if sum(len(shown) for shown, *_ in lines[-1]) + len(key) > width:
            lines.append([])
        lines[-1].append((key, f"#{red:02x}{green:02x}{blue:02x}", 1))
    rows = []
    for number, line in enumerate(lines, 1):
        spans = "".join(
            f'<tspan fill="{colour}" opacity="{opacity}">{html.escape(text)}</tspan>'
            for text, colour, opacity in line
        )
        rows.append(f'<text x="16" y="{8 + 22 * number}" xml:space="preserve">{spans}</text>')
    size = f"{32 + 9 * width} {24 + 22 * len(lines)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="ui-monospace,monospace" '
        f'font-size="15"><rect width="100%" height="100%" fill="white"/>{"".join(rows)}</svg>\n'
    )


class Printer:
    """Answers on a terminal or a pipe. The first unfinished row streams; rows behind it wait for
    their turn."""

    def __init__(self, prompts, traces, routing):
        self.prompts = prompts
        self.routing = routing
        self.row = -1
        self.palette = Palette()
        self.waiting = [[] for _ in prompts]
        self.done = [False] * len(prompts)
        self.traces = traces
        self.line_open = True  # the answer's last text doesn't end its line
        self._next()

    def _next(self):
        self.row += 1
        if self.row < len(self.prompts) and self.routing:
            for text, adapters in self.traces[self.row]:
                self._write(text, adapters, faint=True)

    def _write(self, text, adapters, faint=False):
        print(paint(text, self.palette.colour(adapters), faint) if self.routing else text, end="", flush=True)
        self.line_open = not text.endswith("\n") if text else self.line_open

    def push(self, token):
        """One more token; prints what its row's turn allows."""
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

    def close(self):
        """The legend, where there is routing to explain."""
        if self.routing and self.palette.weight:
            print(legend(self.palette))
