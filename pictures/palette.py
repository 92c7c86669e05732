"""One colour an adapter, the same on the terminal, in pictures and on the page.

A trace is a list of (text, [[adapter name, weight], ...]), one entry a token, weights averaged over
layers and modules. A token has the colour of its heaviest adapter. A legend names each adapter's
colour and its share of the weight.
"""

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


def key(name: str, share: float) -> str:
    """A legend's entry for an adapter that has this share of all weight."""
    return f"■ {name} {share:.0%}"
