"""The routing of one request as an SVG picture."""

import html
import re

from pictures.palette import GREY, Palette, Trace, key


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
        add(key(name, share) + "   ", colour, 1)
    rows = ""
    for number, spans in enumerate(lines, 1):
        rows += f'<text x="16" y="{8 + 22 * number}" xml:space="preserve">{spans}</text>'
    size = f"{32 + 9 * width} {24 + 22 * len(lines)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
        'font-family="ui-monospace,monospace" font-size="15">'
        f'<rect width="100%" height="100%" fill="white"/>{rows}</svg>\n'
    )
