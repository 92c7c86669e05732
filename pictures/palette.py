"""Adapters' colours, for the terminal, the page and pictures: each gives the first ones to the
adapters that matter most in it.

A trace is a list of (text, [[adapter name, weight], ...]), one entry a token, weights averaged over
layers and modules. A token has the colour of its heaviest adapter. A legend names each adapter's
colour and its share of the weight.
"""

from collections.abc import Iterable

from common.printable import printable

Colour = tuple[int, int, int]
Trace = list[tuple[str, list]]

# Colours that the colour-blind can tell apart, the first four best, and that are legible on white and
# on a terminal's near-black. A random search made the smallest distance in CIELAB as large as it could,
# in normal vision and in simulated protanopia, deuteranopia and tritanopia. The test measures it.
COLOURS: tuple[Colour, ...] = (
    (137, 70, 255), (213, 115, 0), (0, 130, 85), (162, 85, 166), (13, 157, 225), (255, 64, 141),
    (85, 93, 207), (82, 116, 41),
)  # fmt: skip
GREY: Colour = (128, 128, 128)  # text without a heaviest adapter, or whose adapter has no colour
# What tells apart adapters of one colour: the first eight are plain, the next eight underlined, ...
STYLES = ("", "underline", "italic", "underline italic")


def heaviest(adapters: list) -> str | None:
    """The name of a token's heaviest adapter, None where none is active or several weigh as much."""
    largest = max((weight for _, weight in adapters), default=0.0)
    names = [name for name, weight in adapters if weight == largest > 0]
    return names[0] if len(names) == 1 else None


class Palette:
    """Adapter name -> its look, in order of appearance; each adapter's weight in the text so far."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.weight = dict.fromkeys(names, 0.0)  # `names` get their colours first

    @classmethod
    def of(cls, traces: Iterable[Trace]) -> "Palette":
        """Looks for text that is known: the adapters that carry most of it get distinct colours."""
        seen = cls()
        for trace in traces:
            for _, adapters in trace:
                seen.colour(adapters)
        return cls(name for name, _, _ in seen.shares())

    def colour(self, adapters: list) -> Colour | None:
        """The colour of a token's heaviest adapter, None where there is none; counts its weights."""
        for name, weight in adapters:
            self.weight[name] = self.weight.get(name, 0.0) + weight
        name = heaviest(adapters)
        return None if name is None else COLOURS[self._place(name) % len(COLOURS)]

    def style(self, name: str | None) -> str:
        """What tells the adapter from others of its colour: one of STYLES, "" for no adapter."""
        return STYLES[self._place(name) // len(COLOURS) % len(STYLES)] if name else ""

    def _place(self, name):
        return list(self.weight).index(name)

    def shares(self) -> list[tuple[str, Colour, float]]:
        """[(name, colour, share of all weight)], heaviest first."""
        total = sum(self.weight.values()) or 1.0
        rows = []
        for place, (name, weight) in enumerate(self.weight.items()):
            rows.append((name, COLOURS[place % len(COLOURS)], weight / total))
        return sorted(rows, key=lambda row: -row[2])


def key(name: str, share: float) -> str:
    """A legend's entry for an adapter that has this share of all weight."""
    return f"■ {printable(name)} {share:.0%}"


def others(shares: list[tuple[str, Colour, float]]) -> list[str]:
    """The legend's one entry for all that it doesn't name, none where that is nothing."""
    if not shares:
        return []
    word = "others" if len(shares) > 1 else "other"
    return [f"{len(shares)} {word} {sum(share for _, _, share in shares):.0%}"]
