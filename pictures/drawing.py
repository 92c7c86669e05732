"""SVG drawings as text: lines, boxes, arrows, words, axes, each with classes of one style.

A drawing has no background, and its ink follows the reader's light or dark mode. The classes c0, c1
and c2 are the first of the palette's colours, a little paler on a dark page; a shape without one is
drawn in ink.
"""

import html
import math
import re
from collections.abc import Iterable

from pictures.palette import COLOURS

STYLE = """\
svg{color:#3a424b}
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:currentColor}
.title{font-size:17px;font-weight:600}
.big{font-size:19px}
.bold{font-weight:600}
.dim{font-size:12px;opacity:.75}
.small{font-size:12px}
.thick{stroke-width:3}
.dotted{stroke-dasharray:2 4}
.code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.mid{text-anchor:middle}
.end{text-anchor:end}
line,path,rect,circle{stroke:currentColor;stroke-width:1.5;fill:none}
.grid{stroke-width:1;opacity:.2}
.dashed{stroke-dasharray:5 4;opacity:.6}
.pale{opacity:.3}
.solid{fill:currentColor}
.wash{fill:currentColor;fill-opacity:.09}
.bare{stroke:none}
"""
DARK = "#d4dae1"  # the ink on a dark page


def page(title: str, note: str, width: int, height: int, parts: Iterable[str]) -> str:
    """The SVG file: title on top, `parts`, and at the bottom what the data are."""
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    light = ""
    dark = f"svg{{color:{DARK}}}"
    for index, colour in enumerate(COLOURS[:3]):
        paler = [value + (255 - value) // 4 for value in colour]
        light += f".c{index}{{color:#{bytes(colour).hex()}}}\n"
        dark += f".c{index}{{color:#{bytes(paler).hex()}}}"
    style = f"{STYLE}{light}@media (prefers-color-scheme:dark){{{dark}}}\n"
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">']
    lines += [f"<title>{html.escape(title)}</title>", f"<style>\n{style}</style>"]
    lines += [text(16, 28, title, "title"), *parts, text(16, height - 14, note, "dim")]
    return "\n".join([*lines, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words at (x, y), of the classes `kind`."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{html.escape(words, quote=False)}</text>'


def symbols(x: float, y: float, words: str, kind: str = "") -> str:
    """text() of mathematics: the letter after an _ is set low, as in A_j."""
    low = r'<tspan dy="4" font-size="75%">\1</tspan><tspan dy="-4">&#8203;</tspan>'
    return re.sub(r"_(\w)", low, text(x, y, words, kind))


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    """A straight line."""
    return path(f"M{x1:g} {y1:g}L{x2:g} {y2:g}", kind)


def path(d: str, kind: str = "") -> str:
    """A path, `d` as in SVG."""
    return f'<path d="{d}" class="{kind}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str = "", opacity: float = 1) -> str:
    """A rectangle."""
    shade = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    size = f'width="{width:g}" height="{height:g}" rx="3"'
    return f'<rect x="{x:g}" y="{y:g}" {size} class="{kind}"{shade}/>'


def circle(x: float, y: float, r: float, kind: str = "") -> str:
    """A circle."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" class="{kind}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    """A straight arrow."""
    turn = math.atan2(y2 - y1, x2 - x1)
    ends = [(x2 - 7 * math.cos(turn + s), y2 - 7 * math.sin(turn + s)) for s in (0.45, -0.45)]
    (ax, ay), (bx, by) = ends
    tip = path(f"M{ax:.1f} {ay:.1f}L{x2:g} {y2:g}L{bx:.1f} {by:.1f}", kind)
    return line(x1, y1, x2, y2, kind) + tip


def ticks(to_x, values: Iterable[float], top: float, bottom: float, label: str) -> list[str]:
    """Vertical grid lines at `values` with their numbers below, and the axis's label."""
    values = list(values)
    parts = []
    for value in values:
        x = to_x(value)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 16, f"{value:g}", "dim mid")]
    middle = (to_x(values[0]) + to_x(values[-1])) / 2
    return [*parts, text(middle, bottom + 36, label, "mid")]


def whisker(x: float, low: float, high: float, y: float, kind: str, hollow: bool = False) -> str:
    """A dot with its interval."""
    sides = line(low, y, x - 4, y, kind) if x - low > 4 else ""
    sides += line(x + 4, y, high, y, kind) if high - x > 4 else ""
    return sides + circle(x, y, 4, kind if hollow else f"{kind} solid")
