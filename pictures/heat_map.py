"""A routing trace as a heat map in plain text."""

import contextlib
import math

from pictures.columns import columns, visible
from pictures.palette import Palette, Trace

SHADES = (" ▁▂▃▄▅▆▇█", " .:-=+*#%@")  # the first that the output's encoding can, the second can always


def heat_map(prompt: Trace, answer: Trace, width: int = 100, encoding: str = "utf-8") -> str:
    """The two traces of one request as plain text: a column for each token, as wide as its text, a row
    for each adapter that took part, shaded by the adapter's weight there.

    Lines break at `width` characters. Above the rows stand the tokens' texts, | between them.
    """
    palette = Palette()
    for _, adapters in (*prompt, *answer):
        palette.colour(adapters)
    labels = {name: f"{share:5.0%} {visible(name)}" for name, _, share in palette.shares() if share > 0}
    if not labels:
        return "no adapter took part"
    shades = SHADES[0] if _can_encode(SHADES[0], encoding) else SHADES[1]
    margin = min(max(map(len, labels.values())), max(6, width // 3))
    lines = []
    for title, trace in (("prompt", prompt), ("answer", answer)):
        for line in _wrap_tokens(trace, width - margin - 1, encoding):
            lines.append(f"{title:<{margin}} " + "|".join(text for text, _ in line))
            for name, label in labels.items():
                shaded = [_shade(text, adapters, name, shades) for text, adapters in line]
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
        text = visible(text).encode(encoding, "backslashreplace").decode(encoding) or " "
        if lines[-1] and used + columns(text) > room:
            lines.append([])
            used = 0
        lines[-1].append((text, adapters))
        used += columns(text) + 1
    return lines if lines[0] else []


def _shade(text, adapters, name, shades):
    """The shade of adapter `name`'s weight at a token, as wide as its text: the first for none, the
    last for 1 and more."""
    weight = dict(adapters).get(name, 0.0)
    level = math.ceil(min(weight, 1.0) * (len(shades) - 1))
    return shades[max(level, 0)] * columns(text)


def _can_encode(text, encoding):
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(encoding)
        return True
    return False
