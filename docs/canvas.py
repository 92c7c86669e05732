"""How the figures of docs/ look: an empty page with axes, words on it, and the page as SVG.

matplotlib draws in stand-ins for colours and fonts; in the SVG they are CSS variables, so that ink
is dark on a light page and light on a dark one, and words are in the reader's own font.
"""

import io
import re
from typing import TYPE_CHECKING

from pictures.palette import COLOURS, Colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONTS = 'system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif'
MONO_FONTS = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace'


def css(colour: Colour, white: float = 0) -> str:
    """A colour of the palette as #rrggbb, mixed with a share of white."""
    return "#" + bytes(round(value + white * (255 - value)) for value in colour).hex()


INK, SOFT, LINE = "#000001", "#000002", "#000003"
C0, C1, C2 = map(css, COLOURS[:3])
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"
# What matplotlib writes -> the CSS variable that takes its place, with its value on a light page and
# on a dark one.
VARIABLES = {
    INK: ("ink", "#3a424b", "#d4dae1"),
    SOFT: ("soft", "#636b74", "#9ba3ac"),
    LINE: ("line", "#d3d6da", "#3a414a"),
    C0: ("c0", C0, css(COLOURS[0], white=0.25)),
    C1: ("c1", C1, css(COLOURS[1], white=0.25)),
    C2: ("c2", C2, css(COLOURS[2], white=0.25)),
    f"'{SANS}'": ("sans", FONTS, FONTS),
    f"'{MONO}'": ("mono", MONO_FONTS, MONO_FONTS),
}
STYLE = {
    "figure.dpi": 72,  # a point is a pixel
    "figure.facecolor": "none", "axes.facecolor": "none",
    "svg.fonttype": "none", "svg.hashsalt": "nanoMoLE", "text.parse_math": False,
    "font.family": SANS, "font.size": 13, "text.color": INK,
    "axes.labelcolor": INK, "axes.labelpad": 8,
    "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 1,
    "xtick.color": SOFT, "xtick.labelsize": 12, "xtick.major.size": 0, "xtick.major.pad": 6,
    "ytick.color": SOFT, "ytick.labelsize": 12, "ytick.major.size": 0, "ytick.major.pad": 8,
    "lines.linewidth": 1.5, "lines.markersize": 8, "lines.markeredgewidth": 1.5,
    "legend.frameon": False, "legend.borderpad": 0, "legend.borderaxespad": 0,
    "legend.handlelength": 1.2, "legend.handletextpad": 0.1, "legend.columnspacing": 1.2,
    **dict.fromkeys([f"axes.spines.{side}" for side in ("left", "right", "top", "bottom")], False),
}  # fmt: skip


def page(title: str, note: str, size: tuple[int, int], sides: tuple, **settings) -> "Axes":
    """The axes of a new figure, which has its title on top and at the bottom a note on the data.

    `size` is the figure's width and height in pixels. `sides` are the left, top, right and bottom of
    the axes, in pixels from the figure's upper left corner.
    """
    from matplotlib.figure import Figure

    width, height = size
    left, top, right, bottom = sides
    figure = Figure((width / 72, height / 72))
    figure.suptitle(title, x=16 / width, y=1 - 14 / height, ha="left", size=17, weight="bold")
    figure.text(16 / width, 14 / height, note, size=12, color=SOFT)
    place = (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
    return figure.add_axes(place, **settings)


def label(
    ax: "Axes", x: float, y: float, words: str, right: float = 0, up: float = 0, size: float = 13, **look
) -> None:
    """Words on the line through a point of the axes, moved by pixels."""
    moved = {"xytext": (right, up - 0.34 * size), "textcoords": "offset points"}
    ax.annotate(words, (x, y), size=size, annotation_clip=False, **moved, **look)


def svg_of(ax: "Axes") -> str:
    """The figure as SVG: text stays text, the page shows through, light and dark are the reader's."""
    file = io.StringIO()
    metadata = {"Title": ax.figure.get_suptitle(), "Date": None, "Creator": None}
    ax.figure.savefig(file, format="svg", metadata=metadata)
    svg = file.getvalue()
    light = ""
    dark = ""
    for drawn, (name, on_light, on_dark) in VARIABLES.items():
        svg = svg.replace(drawn, f"var(--{name})")
        light += f"--{name}:{on_light};"
        dark += f"--{name}:{on_dark};"
    style = f"\nsvg{{{light}}}\n@media (prefers-color-scheme:dark){{svg{{{dark}}}}}\n</style>"
    svg = svg.replace("</style>", style, 1).replace("<svg ", '<svg role="img" ', 1)
    return re.sub(r'="([\d.]+)pt"', r'="\1"', svg)  # a point is a pixel
