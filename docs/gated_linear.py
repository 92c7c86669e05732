"""The drawing of one gated Linear, docs/figures/gated_linear.svg, in coordinates that are its pixels."""

from typing import TYPE_CHECKING

from docs.canvas import C0, C1, INK, LINE, SOFT, label, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMULA = "y = W x + the sum over the k chosen adapters j of weightⱼ · scaleⱼ · Bⱼ Aⱼ x"


def gated_linear() -> "Axes":
    """One gated Linear: x through W, through the adapters that the gate chose, and their sum."""
    ax = page("One gated Linear", "", (860, 496), (0, 0, 860, 496), xlim=(0, 860), ylim=(496, 0))
    ax.axis("off")
    for x, y, name, shape in ((45, 210, "x", "(n, i)"), (815, 198, "y", "(n, o)")):
        for number in range(6):
            box(ax, x - 9, x + 9, y - 50 + 20 * number, 10)
        label(ax, x, y - 76, name, size=19, ha="center")
        label(ax, x, y + 76, shape, size=12, ha="center", color=SOFT)
    ax.plot([54, 100, 100, 100], [210, 210, 84, 390], color=INK)
    arrow(ax, (100, 84), (270, 84))
    matrix(ax, 270, 420, 84, "W", "(o, i), frozen")
    arrow(ax, (420, 84), (730, 184), turn=True)
    label(ax, 575, 72, "W x", size=15, ha="center")
    chosen = {"₂": (C0, "0.7", 660), "ₑ": (C1, "0.3", 576)}  # adapter -> colour, weight, x of its ×
    for j, y in {"₁": 156, "₂": 198, "₃": 240, "ₑ": 306}.items():
        colour, weight, x = chosen.get(j, (LINE, "", 0))
        arrow(ax, (100, y), (270, y), INK if j in chosen else LINE)
        ax.plot([326, 364], [y, y], color=colour)
        for name, wide, narrow in (("A", 270, 326), ("B", 420, 364)):
            box(ax, wide, narrow, y, 18, colour, 9)
            look = {"size": 15, "ha": "center", "color": colour if j in chosen else SOFT}
            label(ax, (wide + narrow) / 2, y, name + j, **look)
        if j in chosen:
            arrow(ax, (420, y), (x - 12, y), colour)
            label(ax, 432, y - 14, f"scale{j} B{j} A{j} x", size=15, color=colour)
            node(ax, x, y, "×", colour)
            ax.plot([x, x], [y + 12, 375], color=colour, linestyle=(0, (1.5, 3)))
            box(ax, x - 26, x + 26, 390, 15, colour)
            label(ax, x, 390, weight, size=14, ha="center", color=colour, weight="bold")
            label(ax, x, 420, f"weight{j}", size=14, ha="center", color=colour)
    for x, shape in ((298, "(e, r, i)"), (392, "(e, o, r)")):
        label(ax, x, 273, "⋮", size=15, ha="center", color=SOFT)
        label(ax, x, 340, shape, size=12, ha="center", color=SOFT)
    arrow(ax, (672, 198), (718, 198), C0)
    arrow(ax, (588, 306), (730, 212), C1, turn=True)
    node(ax, 730, 198, "+")
    arrow(ax, (742, 198), (805, 198))
    gate(ax)
    label(ax, 16, 476, FORMULA, size=14, weight="bold")
    return ax


def gate(ax: "Axes") -> None:
    """The lower part of gated_linear(): G x, and the way from its e scores to k weights."""
    arrow(ax, (100, 390), (140, 390))
    matrix(ax, 140, 244, 390, "G", "(e, i), trained")
    arrow(ax, (244, 390), (272, 390))
    scores = {"1": (12, LINE), "2": (44, C0), "3": (20, LINE), "…": (0, LINE), "e": (34, C1)}
    for number, (j, (score, colour)) in enumerate(scores.items()):
        ax.bar(290 + 27 * number, -score, 17, 410, color=colour)
        label(ax, 290 + 27 * number, 420, j, ha="center")
    label(ax, 344, 440, "scores G x", size=12, ha="center", color=SOFT)
    arrow(ax, (420, 390), (544, 390))
    label(ax, 480, 376, "top-k, k = 2", ha="center")
    label(ax, 480, 404, "softmax", ha="center")


def box(
    ax: "Axes", left: float, right: float, y: float, half: float, colour: str = INK, right_half: float = 0
) -> None:
    """A box around y, of half this height, or of another height at its right side."""
    far = right_half or half
    corners = [left, right, right, left], [y - half, y - far, y + far, y + half]
    edge = {"edgecolor": colour, "linewidth": 1.5, "joinstyle": "round"}
    ax.fill(*corners, facecolor=(colour, 0.09), **edge)


def matrix(ax: "Axes", left: float, right: float, y: float, name: str, shape: str) -> None:
    """A large box with a name and a shape."""
    box(ax, left, right, y, 34)
    label(ax, (left + right) / 2, y, name, up=8, size=19, ha="center")
    label(ax, (left + right) / 2, y, shape, up=-15, size=12, ha="center", color=SOFT)


def node(ax: "Axes", x: float, y: float, sign: str, colour: str = INK) -> None:
    """A circle in which two values meet."""
    ax.plot(x, y, "o", markersize=24, markeredgecolor=colour, markerfacecolor=(colour, 0.09))
    label(ax, x, y, sign, size=17, ha="center", color=colour)


def arrow(ax: "Axes", start: tuple, end: tuple, colour: str = INK, turn: bool = False) -> None:
    """An arrow that is straight, or level at first and then upright."""
    way = "angle,angleA=0,angleB=90,rad=0" if turn else "arc3"
    look = {"arrowstyle": "->", "color": colour, "linewidth": 1.5, "mutation_scale": 14}
    ax.annotate("", end, start, arrowprops=look | {"shrinkA": 0, "shrinkB": 0, "connectionstyle": way})
