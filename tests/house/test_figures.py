"""docs/figures/: each picture is what docs/figures.py draws from the committed runs, and has a reader."""

import json
import re
import shlex
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

import docs.figures as figures
import eval as evaluation
from bench import DecodeBench
from common.files import InputError
from common.options import parse_args
from helpers_commands import ROOT

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = figures.draw()
RUNS = {name: json.loads((figures.FIGURES / f"{name}.json").read_text("utf-8")) for name in figures.RUNS}
PAGES = [ROOT / "README.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def words(name):
    """[(y, x, words)] of a drawing, from top to bottom and from left to right."""
    found = []
    for node in ElementTree.fromstring(DRAWN[name]).iter(f"{SVG}text"):
        found.append((float(node.get("y")), float(node.get("x")), "".join(node.itertext())))
    return sorted(found)


def row_of(name, label):
    """The words on the line that `label` begins."""
    (line,) = {y for y, _, text in words(name) if text == label}
    return [text for y, _, text in words(name) if y == line]


def test_the_committed_pictures_are_drawn_from_the_committed_runs():
    """Without it a picture goes on showing the figures of a run that its table no longer has."""
    assert {file.name for file in figures.FIGURES.glob("*.svg")} == DRAWN.keys()
    assert {file.stem for file in figures.FIGURES.glob("*.json")} == figures.RUNS.keys()
    for name, svg in DRAWN.items():
        assert (figures.FIGURES / name).read_text("utf-8") == svg, f"{name}: python docs/figures.py"
        assert len(svg.encode()) < 60_000


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
    order = []
    for method, score in scores.items():
        low, high = score["right_low"], score["right_high"]
        row = row_of("composite.svg", method)
        assert row[0] == method and row[2:] == [f"{score['right']:.2f}", f"[{low:.2f}, {high:.2f}]"]
        (y,) = (y for y, _, text in words("composite.svg") if text == method)
        order.append((y, -score["right"]))
    assert [right for _, right in sorted(order)] == sorted(right for _, right in order)


def test_gate_accuracy_shows_each_gate_in_its_layer_and_column():
    """Columns in another order than their names, and layer 1's figures in layer 2's row."""
    found = words("gate_accuracy.svg")
    columns = {text: x for _, x, text in found if text.endswith("_proj")}
    cells = {(y, x): text for y, x, text in found if re.fullmatch(r"\d+\.\d", text)}
    linears = RUNS["tiny"]["methods"]["meteora_top2"]["gates"]["linears"]
    assert len(cells) == len(linears) == 28
    for path, share in linears.items():
        _, _, layer, _, module = path.split(".")
        (y,) = (y for y, _, text in found if text == f"layer {layer}")
        assert cells[y, columns[module]] == f"{share:.1f}", path


def test_own_adapter_shows_without_it_left_of_with_it():
    """The two settings exchanged would say that methods do better without the adapter."""
    for method in figures.results(RUNS, "own"):
        row = row_of("own_adapter.svg", method)
        shares = []
        for setting in ("without", "own"):
            run, key = (f"{setting}_28", "ramole") if method == "ramole, 28" else (setting, method)
            printed = RUNS[f"printed_{setting}"]["methods"]
            score = RUNS[run]["methods"].get(key) or printed.get(method)
            shares += [f"{score['mean']:.1f}"] if score else []
        assert row[:1] + row[2:] == [method, *shares], method


def test_speed_shows_the_milliseconds_of_the_tables():
    """A bar of another row's time, or a percentage of another base, is quoted as it stands."""
    for row in RUNS["decode"]["table"]:
        if row["batch"] == 1 and "compiled" not in row["row"]:
            (text,) = (text for _, _, text in words("decode.svg") if text.endswith(row["row"]))
            assert f"{row['ms']:.3g} ms" in row_of("decode.svg", text)
    times = {row["row"]: row["ms"] for row in RUNS["decode_adapters"]["table"]}
    texts = [text for _, _, text in words("adapters.svg")]
    assert f"base, {times['base']:.3g} ms" in texts
    for e in (4, 28, 128):
        ms = times[f"{e} adapters"]
        assert f"{ms:.3g} ms, +{100 * ms / times['base'] - 100:.0f} %" in texts


def test_a_missing_run_is_named_with_its_command(tmp_path, monkeypatch):
    """Without it the one who deleted a file to measure again is left with a traceback."""
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    with pytest.raises(InputError, match=r"tiny\.json is missing: eval\.py --methods base,oracle"):
        figures.draw()
