"""Draws the pictures of README.md and docs/: docs/figures/*.svg, from the JSON files beside them.

    python docs/figures.py

RUNS names those files and what writes them: of `eval.py` its results.json, of `bench.py` the last
line. Where a run takes hours, printed_*.json has, in the same format, what docs/results.md prints.
matplotlib draws them; with one version of it the same data give the same bytes.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # Python puts the script's own folder there alone

from common.endings import run_script  # noqa: E402
from common.files import InputError, write_text  # noqa: E402
from docs.canvas import C0, C1, C2, INK, LINE, MONO, SOFT, STYLE, label, page, svg_of  # noqa: E402
from docs.gated_linear import gated_linear  # noqa: E402

MERGES = "uniform,arrow,svd,average_ab,ties_ab,ties_ba,dare_ab,dare_ba"
RETRIEVED = "ramole,selection,mixture,fusion,adaptersoup"
OTHERS = "logo,meteora_top1,meteora_top2,arrow,uniform"
TRAINED = "base,oracle,meteora_top1,meteora_top2,lora_f,lora_b"
DECODE = "bench.py decode --model SMOLLM2-135M-INSTRUCT --dtype float32 --tokens 4"
RUNS = {
    "tiny": f"eval.py --methods {TRAINED} --composite 3,5,10",
    "merges": f"eval.py --methods {MERGES} --composite 10",
    "own": f"eval.py --methods base,oracle,{RETRIEVED},{OTHERS}",
    "own_28": "eval.py --methods ramole --retrieve 28",
    "without": f"eval.py --methods base,{RETRIEVED},{OTHERS} --ood",
    "without_28": "eval.py --methods ramole --retrieve 28 --ood",
    "printed_composite": "runs/compare.sh",
    "printed_own": "runs/ramole.sh",
    "printed_without": "runs/ramole.sh",
    "decode": f"{DECODE} --gguf FILE",
    "decode_adapters": f"{DECODE} --e 4,28,128 --no-peers",
}
# (method, the place of its colour or None for what the others are compared with, what it is)
METHODS = (
    ("base", None, "no adapter"),
    ("oracle", None, "each question by its own task's adapter"),
    ("meteora_top1", 0, "MeteoRA's gates, one adapter a token"),
    ("meteora_top2", 0, "MeteoRA's gates, two adapters a token"),
    ("soft", 0, "the gates without top-k: all adapters"),
    ("moe_top1", 0, "gates from the LM loss alone, top-1"),
    ("moe_top3", 0, "gates from the LM loss alone, top-3"),
    ("loraflow", 0, "LoRA-Flow: one mixture a token and layer"),
    ("smear", 0, "SMEAR: one merged adapter a request"),
    ("ramole", 0, "RAMoLE: 3 retrieved, a router weighs them"),
    ("ramole, 28", 0, "RAMoLE with all 28 retrieved"),
    ("lorahub", 0, "LoraHub: weights from five examples"),
    ("lora_f", 1, "one adapter trained on all tasks' data"),
    ("lora_b", 1, "one adapter trained evenly on all tasks"),
    ("lora_f_224", 1, "lora_f of rank 224"),
    ("lora_b_224", 1, "lora_b of rank 224"),
    ("selection", 1, "the best adapter retrieved"),
    ("mixture", 1, "3 retrieved, a third each"),
    ("fusion", 1, "3 retrieved, mean of A and of B"),
    ("adaptersoup", 1, "fusion for all prompts together"),
    ("arrow", 2, "Arrow: the adapters' input directions"),
    ("logo", 2, "LoGo: what the prompt's last token excites"),
    ("uniform", 2, "all adapters, each 1/28"),
    ("svd", 2, "SVD of the mean of B A, rank 8"),
    ("ties_ab", 2, "TIES merge of A and of B"),
    ("ties_ba", 2, "TIES merge of B A"),
    ("dare_ab", 2, "DARE merge of A and of B"),
    ("dare_ba", 2, "DARE merge of B A"),
    ("average_ab", 2, "mean of A and of B"),
)
PLACE = {method: place for method, place, _ in METHODS}
ABOUT = {method: about for method, _, about in METHODS}
PEERS = ("transformers", "peft", "llama.cpp")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# The results --------------------------------------------------------------------------------------


def composite(runs: dict[str, dict]) -> "Axes":
    """Right answers of ten questions in one prompt, by method."""
    scores = {}
    for name in ("printed_composite", "merges", "tiny"):
        scores |= runs[name]["composite"]["10"]
    order = sorted(scores, key=lambda method: -scores[method]["right"])
    note = f"tiny/, {scores['base']['n']} prompts of ten questions each; "
    note += "in brackets 95 % intervals over the prompts."
    ax = method_page("Ten questions of ten tasks in one prompt", note, order, range(0, 11, 2))
    ax.set_xlabel("right answers of ten, mean of all prompts")
    legend(ax, "trained to choose", "one adapter for all tasks", "nothing trained to choose")
    for row, method in enumerate(order):
        low, mean, high = (scores[method][key] for key in ("right_low", "right", "right_high"))
        dot(ax, mean, row, low, high, colour_of(method))
        label(ax, high, row, f"{mean:.2f}", 12, color=colour_of(method))
        label(ax, high, row, f"[{low:.2f}, {high:.2f}]", 46, size=12, color=SOFT)
    return ax


def gate_accuracy(runs: dict[str, dict]) -> "Axes":
    """How often each gate's first choice is the task's own adapter, by layer and module."""
    gates = runs["tiny"]["methods"]["meteora_top2"]["gates"]
    modules = [f"self_attn.{module}" for module in ATTENTION] + [f"mlp.{module}" for module in MLP]
    layers = 1 + max(int(path.split(".")[2]) for path in gates["linears"])
    title = "How often a gate's first choice is the task's own adapter"
    note = f"tiny/, top-2 gates, {gates['tokens']:,} response tokens of 28 tasks' test splits."
    bottom = 96 + 44 * layers
    ax = page(title, note, (760, bottom + 92), (92, 96, 736, bottom), xlim=(-0.5, 6.5))
    ax.set(ylim=(layers - 0.5, -0.5), xticks=[], yticks=[])
    for middle, words in ((1.5, "attention"), (5, "MLP")):
        label(ax, middle, -0.5, words, up=36, ha="center", weight="bold")
    for column, module in enumerate(modules):
        label(ax, column, -0.5, module.partition(".")[2], up=14, ha="center", family=MONO)
    for layer in range(layers):
        label(ax, -0.5, layer, f"layer {layer}", -12, ha="right")
        for column, module in enumerate(modules):
            share = gates["linears"][f"model.layers.{layer}.{module}"]
            shade = 0.055 * max(0, share - 90)
            edge = "none" if shade else LINE
            ax.bar(column, 0.91, 0.96, layer - 0.455, color=(C0, shade), edgecolor=edge)
            label(ax, column, layer, f"{share:.1f}", ha="center")
    shading = "Percent of response tokens. Below 90 a cell has no colour; at 100 its colour is strongest."
    blind = "q, k and v of layer 0 see the token's embedding alone, which can't tell the task."
    for up, words in ((-20, shading), (-40, blind)):
        label(ax, -0.5, layers - 0.5, words, up=up, size=12, color=SOFT)
    return ax


def own_adapter(runs: dict[str, dict]) -> "Axes":
    """Right answers with each task's own adapter in the pool and without it, by method."""
    own, without = (results(runs, setting) for setting in ("own", "without"))
    order = sorted(own, key=lambda method: -without.get(method, {"mean": 100})["mean"])
    tasks = runs["own"]["methods"]["base"]["tasks"].values()
    note = f"tiny/, {sum(task['n'] for task in tasks):,} test prompts; lines are 95 % intervals."
    title = "A task's own adapter in the pool, and without it"
    ax = method_page(title, note, order, range(0, 101, 20))
    ax.set_xlabel("exact match in percent, mean of 28 tasks")
    names = ("trained to mix adapters", "retrieved", "nothing trained to choose")
    legend(ax, *names, "own adapter in the pool", "without it")
    for row, method in enumerate(order):
        for scores, side, ha in ((without, -1, "right"), (own, 1, "left")):
            if method in scores:
                mean, half = scores[method]["mean"], scores[method]["plus_minus"]
                colour = colour_of(method)
                dot(ax, mean, row, mean - half, mean + half, colour, hollow=side < 0)
                look = {"ha": ha, "size": 12, "color": colour}
                label(ax, mean + side * half, row, f"{mean:.1f}", 8 * side, **look)
    return ax


def results(runs: dict[str, dict], setting: str) -> dict[str, dict]:
    """{method: its scores} of all runs in a setting, "own" or "without"."""
    widest = {"ramole, 28": runs[f"{setting}_28"]["methods"]["ramole"]}
    return runs[f"printed_{setting}"]["methods"] | widest | runs[setting]["methods"]


# Speed --------------------------------------------------------------------------------------------


def decode(runs: dict[str, dict]) -> "Axes":
    """Milliseconds a token of one request, beside other programs."""
    run = runs["decode"]
    rows = [row for row in run["table"] if row["batch"] == 1 and "compiled" not in row["row"]]
    rows.sort(key=lambda row: row["ms"])
    bottom = 56 + 34 * len(rows)
    note = f"One request, {machine(run)}; median, and a line from quartile to quartile."
    ax = page("Decoding beside other programs", note, (800, bottom + 78), (240, 56, 690, bottom))
    ax.set(xlabel="ms a token", yticks=[], ylim=(len(rows) - 0.5, -0.5))
    for number, row in enumerate(rows):
        peer = row["row"].startswith(PEERS)
        colour = INK if peer else C0
        quartiles = [[row["ms"] - row["low"]], [row["high"] - row["ms"]]]
        ax.barh(number, row["ms"], 0.6, color=(colour, 0.55), xerr=quartiles, ecolor=colour)
        name = row["row"] if peer else f"nanoMoLE, {row['row']}"
        label(ax, 0, number, name, -12, ha="right", color=colour)
        label(ax, row["high"], number, f"{row['ms']:.3g} ms", 10, color=colour)
    ax.grid(axis="x")
    return ax


def adapters(runs: dict[str, dict]) -> "Axes":
    """Milliseconds a token by the number of adapters in the pool."""
    run = runs["decode_adapters"]
    times = {row["row"]: row["ms"] for row in run["table"] if row["batch"] == 1}
    base = times["base"]
    note = f"One request, {machine(run)}."
    ax = page("What more adapters cost", note, (800, 362), (70, 76, 640, 284), xscale="log")
    ax.set_title("ms a token", loc="left", x=-0.035, pad=12, size=12, color=SOFT)
    ax.set_xlabel("adapters in the pool, on a logarithmic axis; a token uses two")
    pools = {}  # adapters in the pool -> ms
    for name, ms in times.items():
        if re.fullmatch(r"\d+ adapters", name):
            pools[int(name.split()[0])] = ms
    ax.plot(pools.keys(), pools.values(), "o-", color=C0)
    most = 5 * math.ceil(max(times.values()) / 5)
    ax.set(xlim=(min(pools) / 1.6, max(pools) * 1.6), ylim=(0, most))
    ax.set_xticks(list(pools), [f"{e}" for e in pools])
    ax.set_xticks([], minor=True)
    ax.axhline(base, color=SOFT, linestyle=(0, (4, 3)))
    label(ax, ax.get_xlim()[1], base, f"base, {base:.3g} ms", 10)
    for e, ms in pools.items():
        words = f"{ms:.3g} ms, +{100 * (ms / base - 1):.0f} %"
        label(ax, e, ms, words, up=16, ha="center", color=C0)
    ax.grid(axis="y")
    return ax


# What they share ----------------------------------------------------------------------------------


def method_page(title: str, note: str, order: list[str], ticks: range) -> "Axes":
    """Axes with a row for each method, its name and what it is to the left of them."""
    bottom = 80 + 26 * len(order)
    ax = page(title, note, (840, bottom + 78), (400, 80, 720, bottom))
    ax.set(xlim=(0, ticks[-1]), xticks=ticks, ylim=(len(order) - 0.5, -0.5), yticks=[])
    ax.grid(axis="x")
    for row, method in enumerate(order):
        label(ax, 0, row, method, 16 - 400, family=MONO, color=colour_of(method))
        label(ax, 0, row, ABOUT[method], 132 - 400, size=12, color=SOFT)
    return ax


def legend(ax: "Axes", *names: str) -> None:
    """What the three colours mean; a fourth name explains the full dots, a fifth the hollow ones."""
    looks = ((C0, C0), (C1, C1), (C2, C2), (INK, INK), (INK, "none"))
    for name, (colour, fill) in zip(names, looks, strict=False):
        ax.plot([], [], "o", color=colour, markerfacecolor=fill, label=name)
    corner = (13 / ax.figure.bbox.width, 1 - 44 / ax.figure.bbox.height)
    look = {"loc": "upper left", "bbox_to_anchor": corner, "labelcolor": "linecolor"}
    ax.figure.legend(ncols=len(names), **look)


def dot(ax: "Axes", x: float, y: float, low: float, high: float, colour: str, hollow: bool = False) -> None:
    """A dot with its interval, which is not drawn inside the dot, as that may be hollow."""
    fill = "none" if hollow else colour
    ax.plot(x, y, "o", color=colour, markerfacecolor=fill, clip_on=False)
    radius = 4 / ax.bbox.width * ax.get_xlim()[1]
    ax.hlines(y, min(low, x - radius), x - radius, colour, clip_on=False)
    ax.hlines(y, x + radius, max(high, x + radius), colour, clip_on=False)


def colour_of(method: str) -> str:
    """The colour of a method."""
    place = PLACE[method]
    return INK if place is None else (C0, C1, C2)[place]


def machine(run: dict) -> str:
    """The model, and the machine that a run of bench.py was measured on."""
    where = f"{run['threads']} threads of {run['processor']}, {run['GB/s']:g} GB/s"
    return f"SmolLM2-135M, {run['dtype']}, {where}"


def draw() -> dict[str, str]:
    """{file name: SVG} of all figures. Raises InputError where a run's file or matplotlib is missing."""
    try:
        import matplotlib.style
    except ImportError:
        raise InputError("the pictures need a package that is not here: pip install matplotlib") from None
    runs = {}
    for name, command in RUNS.items():
        file = FIGURES / f"{name}.json"
        if not file.exists():
            raise InputError(f"{file} is missing: {command} writes it")
        runs[name] = json.loads(file.read_text("utf-8"))
    with matplotlib.style.context(["default", STYLE]):  # whatever the settings of this machine
        drawn = {"gated_linear.svg": svg_of(gated_linear())}
        for figure in (composite, gate_accuracy, own_adapter, decode, adapters):
            drawn[f"{figure.__name__}.svg"] = svg_of(figure(runs))
    return drawn


def main() -> None:
    """The command: draws all figures."""
    for name, svg in draw().items():
        write_text(FIGURES / name, svg)
        print(f"wrote docs/figures/{name}")


if __name__ == "__main__":
    run_script(main)
