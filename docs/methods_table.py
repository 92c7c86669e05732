"""Rewrites the blocks of docs/methods.md that are data: the table of all methods, and each section's facts.

    python docs/methods_table.py

A block stands between `<!-- begin NAME: python docs/methods_table.py -->` and `<!-- end NAME -->`. NAME is
`table`, or the classes of methods/ that a section is about. A new method is in the table at once; its section
is written by hand.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
BLOCK = re.compile(r"(<!-- begin (.+?): python docs/methods_table\.py -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def render(text: str, methods: tuple) -> str:
    """The page's text with each block computed anew; `methods` are classes as in methods.METHODS. Raises
    InputError for a block about a class that is not among them."""
    from common.files import InputError

    classes = {method.__name__: method for method in methods}
    linked = sections(text)

    def block(match):
        begin, name, end = match.groups()
        if name == "table":
            lines = table(methods, linked)
        elif strangers := [one for one in name.split() if one not in classes]:
            expected = "expected classes of the table in methods/__init__.py"
            raise InputError(f"{PAGE}: block {name!r}: {strangers[0]}, {expected}")
        else:
            lines = facts([classes[one] for one in name.split()])
        return begin + "\n".join(lines) + "\n" + end

    return BLOCK.sub(block, text)


def sections(text: str) -> dict[str, str]:
    """{class: heading of the section whose block names it}."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading = part.splitlines()[0]
        for _, name, _ in BLOCK.findall(part):
            found |= dict.fromkeys(name.split(), heading)
    return found


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def table(methods: tuple, linked: dict[str, str]) -> list[str]:
    """A row for each method; `linked` {class: heading} says which have a section."""
    from common.tables import markdown

    rows = []
    for method in methods:
        heading = linked.get(method.__name__, "")
        section = f"[{heading}](#{anchor(heading)})" if heading else ""
        commands = [f"`{command}`" for command in dict.fromkeys(made_by(method).values()) if command]
        cells = [code(method.names), method.about, method.decides, ", ".join(commands)]
        rows.append([*cells, file_of(method), section])
    return markdown(["method", "what it is", "decides", "made by", "file", "section"], rows)


def facts(methods: list) -> list[str]:
    """What a section begins with: names, paper, file, how often they decide, the command that trains them."""
    papers = {}
    decides = {}
    commands = {}
    for method in methods:
        papers |= dict.fromkeys(method.names, ", ".join(map(arxiv, filter(None, method.paper.split(", ")))))
        decides |= dict.fromkeys(method.names, method.decides)
        commands |= {name: command and f"`python {command}`" for name, command in made_by(method).items()}
    about = ["Names: " + code(commands)]
    about += [f"Paper: {grouped(papers)}"] if any(papers.values()) else []
    about += ["File: " + ", ".join(dict.fromkeys(map(file_of, methods)))]
    made = f"Made by: {grouped(commands)}" if any(commands.values()) else "Nothing to train"
    return [f"- {'. '.join(about)}.", f"- Decides: {grouped(decides)}. {made}."]


def made_by(method: type) -> dict[str, str]:
    """{name: the command that makes its files, "" where it needs none}."""
    if isinstance(method.made_by, str):
        return dict.fromkeys(method.names, method.made_by)
    return {name: method.parse(name).made_by for name in method.names}  # it depends on the name


def file_of(method: type) -> str:
    """The file that a method is in, as a link."""
    file = method.__module__.replace(".", "/") + ".py"
    return f"[{file}](../{file})"


def grouped(values: dict[str, str]) -> str:
    """{name: value} as text: the value, or, where names differ, each value with its names."""
    names_of = {}
    for name, value in values.items():
        names_of.setdefault(value, []).append(name)
    if len(names_of) == 1:
        return next(iter(names_of))
    return "; ".join(f"{value} ({code(names)})" for value, names in names_of.items() if value)


def code(names) -> str:
    """`a`, `b`."""
    return ", ".join(f"`{name}`" for name in names)


def arxiv(number: str) -> str:
    """An arXiv number as a link."""
    return f"[arXiv {number}](https://arxiv.org/abs/{number})"


def main() -> None:
    """Writes the page where a block has changed."""
    from common.files import read_text, write_text
    from methods import METHODS

    text = read_text(PAGE)
    if (new := render(text, METHODS)) != text:
        write_text(PAGE, new)
        print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from common.endings import run_script

    run_script(main)
