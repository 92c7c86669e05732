"""docs/figures/: each picture is what docs/figures.py draws from the committed runs, and has a reader."""

import json
import re
import shlex
import sys
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

import docs.figures as figures
import eval as evaluation
from bench import DecodeBench
from common.files import InputError
from common.options import parse_args
from helpers_commands import ROOT
from pictures.palette import COLOURS

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = figures.draw()
RUNS = {name: json.loads((figures.FIGURES / f"{name}.json").read_text("utf-8")) for name in figures.RUNS}
PAGES = [ROOT / "README.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def texts(svg):
    """[(x, y, words)] of a drawing, in the order of the file."""
    found = []
    for node in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        found.append((float(node.get("x")), float(node.get("y")), "".join(node.itertext())))
    return found


def place_of(name, words):
    """(x, y) of these words, which a drawing has once."""
    ((x, y, _),) = (text for text in texts(DRAWN[name]) if text[2] == words)
    return x, y


def row_of(name, first):
    """The words on the line that `first` begins, from left to right."""
    _, line = place_of(name, first)
    return [words for _, y, words in sorted(texts(DRAWN[name])) if abs(y - line) < 6]


def dots(name, y, fill=""):
    """The x of the dots on the line of a text at y, all or those whose style says `fill`."""
    found = []
    for node in ElementTree.fromstring(DRAWN[name]).iter(f"{SVG}use"):
        if abs(float(node.get("y")) - y) < 8 and fill in node.get("style"):
            found.append(float(node.get("x")))
    return sorted(found)


def shapes(name):
    """[(left, right, top, bottom, opacity)] of the boxes and bars that a drawing fills."""
    found = []
    for node in ElementTree.fromstring(DRAWN[name]).iter(f"{SVG}path"):
        opacity = re.search(r"fill-opacity: ([\d.]+)", node.get("style", ""))
        if opacity:
            points = [float(number) for number in re.findall(r"-?[\d.]+", node.get("d"))]
            x, y = points[::2], points[1::2]
            found.append((min(x), max(x), min(y), max(y), float(opacity[1])))
    return found


def scale(name, first, last):
    """Pixels a unit, and the x of 0, of an axis that two of its numbers give."""
    (x1, _), (x2, _) = place_of(name, str(first)), place_of(name, str(last))
    return (x2 - x1) / (last - first), x1 - first * (x2 - x1) / (last - first)


def test_the_committed_pictures_are_drawn_from_the_committed_runs():
    """Without it a picture goes on showing the figures of a run that its table no longer has."""
    assert {file.name for file in figures.FIGURES.glob("*.svg")} == DRAWN.keys()
    assert {file.stem for file in figures.FIGURES.glob("*.json")} == figures.RUNS.keys()
    for name, svg in DRAWN.items():
        committed = (figures.FIGURES / name).read_text("utf-8")
        # Positions differ by a pixel from one matplotlib to another; words and colours don't.
        assert [text[2] for text in texts(committed)] == [text[2] for text in texts(svg)], name
        assert re.findall(r"svg{.*}", committed) == re.findall(r"svg{.*}", svg), name
        assert len(committed.encode()) < 60_000


def test_the_same_data_give_the_same_bytes():
    """With a date or random ids in them, all pictures change in a commit that changes one."""
    assert figures.draw() == DRAWN


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_has_both_modes_and_no_ground(name):
    """One with a white ground, or with dark ink alone, is a blot on a dark page."""
    head, body = DRAWN[name].split("</style>")
    light, dark = (dict(re.findall(r"--(\w+):([^;]+)", part)) for part in head.split("@media"))
    used = set(re.findall(r"var\(--(\w+)\)", body))
    assert {"ink", "soft", "line", "c0", "sans"} <= used <= light.keys() == dark.keys()
    assert not re.search(r"#[0-9a-f]{6}\b|DejaVu", re.sub(r'"#\w+"|url\(#\w+\)', "", body))
    for index, colour in enumerate(COLOURS[:3]):
        assert light[f"c{index}"] == f"#{bytes(colour).hex()}"
        assert sum(bytes.fromhex(dark[f"c{index}"][1:])) > sum(colour)
    width, height = re.search(r'viewBox="0 0 (\d+) (\d+)"', head).groups()
    ground = ElementTree.fromstring(DRAWN[name]).find(f".//{SVG}path")
    assert f"{width} {height}" in ground.get("d") and ground.get("style") == "fill: none"
    assert f'width="{width}" height="{height}"' in head and 'role="img"' in head and "<title>" in head


@pytest.mark.parametrize("name", DRAWN)
def test_every_picture_has_a_reader(name):
    """A picture that no page shows is kept up for nobody."""
    links = [f"{page.parent.relative_to(ROOT)}/{figure}" for page in PAGES for figure in shown(page)]
    assert f"docs/figures/{name}" in {link.removeprefix("./") for link in links}


def shown(page):
    """The pictures that a page shows."""
    return re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text("utf-8"))


@pytest.mark.parametrize("name", [name for name, line in figures.RUNS.items() if line.startswith("eval.py")])
def test_a_run_is_the_one_that_its_command_makes(name):
    """A file of 30 examples a task, or of another pool, under the name of the whole run."""
    argv = shlex.split(figures.RUNS[name])[1:]
    options = asdict(parse_args(evaluation.Options, argv))
    for option, value in RUNS[name]["meta"]["options"].items():
        assert options.get(option, value) == value, option
    assert (figures.FIGURES / f"{name}.json").stat().st_size < 110_000


@pytest.mark.parametrize("name", [name for name, line in figures.RUNS.items() if line.startswith("bench.py")])
def test_the_commands_of_the_benchmarks_exist(name):
    """Whoever measures again types them."""
    assert parse_args(DecodeBench, shlex.split(figures.RUNS[name])[2:]).tokens == 4


def test_the_composite_shows_each_method_with_its_own_score():
    """A score beside another method's name is the worst that a picture can do."""
    scores = {}
    for run in ("tiny", "merges", "printed_composite"):
        assert not scores.keys() & RUNS[run]["composite"]["10"].keys()  # a method is drawn from one run
        scores |= RUNS[run]["composite"]["10"]
    assert {score["n"] for score in scores.values()} == {200}
    unit, zero = scale("composite.svg", 0, 10)
    order = []
    for method, score in scores.items():
        low, high = score["right_low"], score["right_high"]
        about = figures.ABOUT[method]
        row = row_of("composite.svg", method)
        assert row == [method, about, f"{score['right']:.2f}", f"[{low:.2f}, {high:.2f}]"]
        _, y = place_of("composite.svg", method)
        assert dots("composite.svg", y) == pytest.approx([zero + unit * score["right"]], abs=0.5)
        order.append((y, -score["right"]))
    assert [right for _, right in sorted(order)] == sorted(right for _, right in order)


def test_gate_accuracy_shows_each_gate_in_its_layer_and_column():
    """Columns in another order than their names, and layer 1's figures in layer 2's row."""
    name = "gate_accuracy.svg"
    cells = [text for text in texts(DRAWN[name]) if re.fullmatch(r"\d+\.\d", text[2])]
    linears = RUNS["tiny"]["methods"]["meteora_top2"]["gates"]["linears"]
    assert len(cells) == len(linears) == 28
    for path, share in linears.items():
        _, _, layer, _, module = path.split(".")
        (column, _), (_, row) = place_of(name, module), place_of(name, f"layer {layer}")
        (words,) = (words for x, y, words in cells if abs(x - column) < 6 and abs(y - row) < 6)
        assert words == f"{share:.1f}", path
        opacity = 0.0  # where there is no fill
        for left, right, top, bottom, shade in shapes(name):
            opacity += shade if left < column < right and top < row < bottom else 0
        assert opacity == pytest.approx(0.055 * max(0, share - 90), abs=0.01), path


def test_own_adapter_shows_without_it_left_of_with_it():
    """The two settings exchanged would say that methods do better without the adapter."""
    unit, zero = scale("own_adapter.svg", 0, 100)
    for method in figures.results(RUNS, "own"):
        scores = []
        for setting in ("without", "own"):
            run, key = (f"{setting}_28", "ramole") if method == "ramole, 28" else (setting, method)
            printed = RUNS[f"printed_{setting}"]["methods"]
            score = RUNS[run]["methods"].get(key) or printed.get(method)
            scores += [score["mean"]] if score else []
        row = row_of("own_adapter.svg", method)
        about = figures.ABOUT[method]
        assert row == [method, about, *(f"{score:.1f}" for score in scores)], method
        _, y = place_of("own_adapter.svg", method)
        assert dots("own_adapter.svg", y, "fill-opacity: 0;") == dots("own_adapter.svg", y)[: len(scores) - 1]
        assert dots("own_adapter.svg", y) == pytest.approx([zero + unit * score for score in scores], abs=0.5)


def test_speed_shows_the_milliseconds_of_the_tables():
    """A bar of another row's time, or a percentage of another base, is quoted as it stands."""
    rows = [row for row in RUNS["decode"]["table"] if row["batch"] == 1 and "compiled" not in row["row"]]
    bars = shapes("decode.svg")
    unit = max(right - left for left, right, *_ in bars) / max(row["ms"] for row in rows)
    assert len(bars) == len(rows)
    for row in rows:
        (words,) = (text[2] for text in texts(DRAWN["decode.svg"]) if text[2].endswith(row["row"]))
        assert row_of("decode.svg", words) == [words, f"{row['ms']:.3g} ms"]
        _, y = place_of("decode.svg", words)
        (width,) = (right - left for left, right, top, bottom, _ in bars if top < y < bottom)
        assert width == pytest.approx(unit * row["ms"], abs=0.5)


def test_more_adapters_are_compared_with_the_base_of_their_run():
    """A percentage of another run's base, or a time above another number of adapters."""
    times = {row["row"]: row["ms"] for row in RUNS["decode_adapters"]["table"]}
    place_of("adapters.svg", f"base, {times['base']:.3g} ms")
    for e in (4, 28, 128):
        ms = times[f"{e} adapters"]
        x, _ = place_of("adapters.svg", f"{ms:.3g} ms, +{100 * ms / times['base'] - 100:.0f} %")
        assert x == pytest.approx(place_of("adapters.svg", str(e))[0], abs=1)


def test_a_missing_run_is_named_with_its_command(tmp_path, monkeypatch):
    """Without it the one who deleted a file to measure again is left with a traceback."""
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    with pytest.raises(InputError, match=r"tiny\.json is missing: eval\.py --methods base,oracle"):
        figures.draw()


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    """It is an optional package: most who train and generate don't have it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        figures.draw()
