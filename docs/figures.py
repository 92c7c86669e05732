"""Draws the pictures of README.md and docs/: docs/figures/*.svg, from the JSON files beside them.

    python docs/figures.py

RUNS names those files and what writes them: of `eval.py` its results.json, of `bench.py` the last
line. Where a run takes hours, printed_*.json has, in the same format, what docs/results.md prints.
The drawings are SVG text made without a library, so the same data give the same bytes everywhere.
"""

import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # Python puts the script's own folder there alone

from common.files import InputError, run_script, write_text  # noqa: E402
from pictures.drawing import arrow, circle, line, page, path, rect, symbols, text, ticks, whisker  # noqa: E402

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
# What each method is, and the place of its colour: None for what the others are compared with.
METHODS = {
    "base": (None, "no adapter"),
    "oracle": (None, "each question by its own task's adapter"),
    "meteora_top1": (0, "MeteoRA's gates, one adapter a token"),
    "meteora_top2": (0, "MeteoRA's gates, two adapters a token"),
    "soft": (0, "the gates without top-k: all adapters"),
    "moe_top1": (0, "gates from the LM loss alone, top-1"),
    "moe_top3": (0, "gates from the LM loss alone, top-3"),
    "loraflow": (0, "LoRA-Flow: one mixture a token and layer"),
    "smear": (0, "SMEAR: one merged adapter a request"),
    "ramole": (0, "RAMoLE: 3 retrieved, a router weighs them"),
    "ramole, 28": (0, "RAMoLE with all 28 retrieved"),
    "lorahub": (0, "LoraHub: weights from five examples"),
    "lora_f": (1, "one adapter trained on all tasks' data"),
    "lora_b": (1, "one adapter trained evenly on all tasks"),
    "lora_f_224": (1, "lora_f of rank 224"),
    "lora_b_224": (1, "lora_b of rank 224"),
    "selection": (1, "the best adapter retrieved"),
    "mixture": (1, "3 retrieved, a third each"),
    "fusion": (1, "3 retrieved, mean of A and of B"),
    "adaptersoup": (1, "fusion for all prompts together"),
    "arrow": (2, "Arrow: the adapters' input directions"),
    "logo": (2, "LoGo: what the prompt's last token excites"),
    "uniform": (2, "all adapters, each 1/28"),
    "svd": (2, "SVD of the mean of B A, rank 8"),
    "ties_ab": (2, "TIES merge of A and of B"),
    "ties_ba": (2, "TIES merge of B A"),
    "dare_ab": (2, "DARE merge of A and of B"),
    "dare_ba": (2, "DARE merge of B A"),
    "average_ab": (2, "mean of A and of B"),
}
PEERS = ("transformers", "peft", "llama.cpp")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FORMULA = "y = W x + the sum over the k chosen adapters j of weight_j · scale_j · B_j A_j x"

# The idea -----------------------------------------------------------------------------------------


def gated_linear() -> str:
    """One gated Linear: x through W, through the adapters that the gate chose, and their sum."""
    rows = {"1": 150, "2": 192, "3": 234, "e": 300}  # adapter -> its y
    chosen = {"2": ("c0", "0.7", 600), "e": ("c1", "0.3", 520)}  # -> colour, weight, x of its ×
    parts = vector(40, 205, "x", "(n, i)") + vector(802, 192, "y", "(n, o)")
    parts += [path("M62 205H100V78"), arrow(100, 78, 268, 78), rect(270, 46, 150, 64, "wash")]
    parts += [text(345, 75, "W", "big mid"), text(345, 97, "(o, i), frozen", "dim mid")]
    parts += [path("M420 78H720"), arrow(720, 78, 720, 176), text(570, 68, "W x", "mid")]
    for j, y in rows.items():
        colour = chosen[j][0] if j in chosen else "pale"
        parts.append(arrow(100, y, 268, y, "" if j in chosen else "pale"))
        parts.append(path(f"M270 {y - 18}L326 {y - 8}V{y + 8}L270 {y + 18}Z", f"{colour} wash"))
        parts.append(path(f"M420 {y - 18}L364 {y - 8}V{y + 8}L420 {y + 18}Z", f"{colour} wash"))
        parts += [line(326, y, 364, y, colour), symbols(294, y + 5, f"A_{j}", f"{colour} mid")]
        parts.append(symbols(396, y + 5, f"B_{j}", f"{colour} mid"))
    parts += [text(296, 272, "⋮", "mid pale"), text(394, 272, "⋮", "mid pale")]
    parts += [text(296, 338, "(e, r, i)", "dim mid"), text(394, 338, "(e, o, r)", "dim mid")]
    for j, (colour, weight, x) in chosen.items():
        y = rows[j]
        parts += [arrow(420, y, x - 14, y, colour), circle(x, y, 12, f"{colour} wash")]
        parts.append(symbols(466, y - 9, f"scale_{j} B_{j} A_{j} x", f"{colour} mid small"))
        parts.append(text(x, y + 5, "×", f"{colour} mid"))
        parts.append(line(x, 366, x, y + 16, f"{colour} dotted"))
        parts.append(rect(x - 24, 370, 48, 28, f"{colour} wash"))
        parts.append(text(x, 389, weight, f"{colour} mid bold"))
        parts.append(symbols(x, 416, f"weight_{j}", f"{colour} mid small"))
    parts += [arrow(612, 192, 704, 192, "c0"), path("M532 300H720", "c1")]
    parts += [arrow(720, 300, 720, 208, "c1"), circle(720, 192, 14)]
    parts += [text(720, 198, "+", "big mid"), arrow(734, 192, 798, 192)]
    return page("One gated Linear", "", 860, 500, [*parts, *gate(chosen)])


def gate(chosen: dict[str, tuple]) -> list[str]:
    """The lower part of gated_linear(): G x, and the way from its e scores to k weights."""
    scores = {"1": 12, "2": 44, "3": 20, "…": 0, "e": 34}
    parts = [path("M100 205V384"), arrow(100, 384, 138, 384), rect(140, 352, 104, 64, "wash thick")]
    parts += [text(192, 381, "G", "big mid"), text(192, 403, "(e, i), trained", "dim mid")]
    parts += [arrow(244, 384, 268, 384), text(335, 438, "scores G x", "dim mid")]
    for number, (j, score) in enumerate(scores.items()):
        x = 276 + 26 * number
        if score:
            colour = chosen[j][0] if j in chosen else "pale"
            parts.append(rect(x, 404 - score, 16, score, f"{colour} solid bare"))
        parts.append(text(x + 8, 420, j, "mid small"))
    parts += [arrow(412, 384, 490, 384), text(450, 374, "top-k, k = 2", "mid small")]
    return [*parts, text(450, 402, "softmax", "mid small"), symbols(16, 484, FORMULA, "bold")]


def vector(x: float, y: float, name: str, shape: str) -> list[str]:
    """A column of numbers around y, its name above and its shape below."""
    cells = [rect(x, y - 60 + 20 * number, 18, 20, "wash") for number in range(6)]
    return [*cells, text(x + 9, y - 72, name, "big mid"), text(x + 9, y + 80, shape, "dim mid")]


# The results --------------------------------------------------------------------------------------


def composite(runs: dict[str, dict]) -> str:
    """Right answers of ten questions in one prompt, by method."""
    scores = {}
    for name in ("printed_composite", "merges", "tiny"):
        scores |= runs[name]["composite"]["10"]
    order = sorted(scores, key=lambda method: -scores[method]["right"])
    top, left, right = 80, 390, 670
    bottom = top + 26 * len(order)

    def to_x(value):
        return left + (right - left) * value / 10

    parts = legend("trained to choose", "one adapter for all tasks", "nothing trained to choose")
    parts += ticks(to_x, range(0, 11, 2), top, bottom, "right answers of ten, mean of all prompts")
    for row, method in enumerate(order):
        y = top + 26 * row + 13
        kind = colour_of(method)
        low, middle, high = (scores[method][key] for key in ("right_low", "right", "right_high"))
        parts += [*label(method, y), whisker(to_x(middle), to_x(low), to_x(high), y, kind)]
        parts.append(text(to_x(high) + 12, y + 4, f"{middle:.2f}", kind))
        parts.append(text(to_x(high) + 46, y + 4, f"[{low:.2f}, {high:.2f}]", "dim"))
    note = f"tiny/, {scores['base']['n']} prompts of ten questions each; in brackets 95 % intervals over the prompts."
    return page("Ten questions of ten tasks in one prompt", note, 800, bottom + 78, parts)


def gate_accuracy(runs: dict[str, dict]) -> str:
    """How often each gate's first choice is the task's own adapter, by layer and module."""
    gates = runs["tiny"]["methods"]["meteora_top2"]["gates"]
    columns = [("self_attn", module) for module in ATTENTION] + [("mlp", module) for module in MLP]
    layers = 1 + max(int(path.split(".")[2]) for path in gates["linears"])
    left, top, width, height = 92, 96, 92, 44
    parts = [text(left + 2 * width, 64, "attention", "mid bold")]
    parts.append(text(left + 5.5 * width, 64, "MLP", "mid bold"))
    for column, (block, module) in enumerate(columns):
        middle = left + (column + 0.5) * width
        parts.append(text(middle, top - 10, module, "code mid"))
        for layer in range(layers):
            share = gates["linears"][f"model.layers.{layer}.{block}.{module}"]
            shade = 0.55 * max(0.0, share - 90) / 10
            cell = (middle - width / 2 + 2, top + layer * height + 2, width - 4, height - 4)
            parts.append(rect(*cell, "c0 solid bare", shade) if shade else rect(*cell, "grid"))
            parts.append(text(middle, top + layer * height + 27, f"{share:.1f}", "mid"))
    for layer in range(layers):
        parts.append(text(left - 12, top + layer * height + 27, f"layer {layer}", "end"))
    bottom = top + layers * height
    shading = "Percent of response tokens. The colour goes from 90 (none) to 100 (full)."
    blind = "q, k and v of layer 0 see the token's embedding alone, which can't tell the task."
    parts += [text(left, bottom + 26, shading, "dim"), text(left, bottom + 46, blind, "dim")]
    note = f"tiny/, top-2 gates, {gates['tokens']:,} response tokens of 28 tasks' test splits."
    title = "How often a gate's first choice is the task's own adapter"
    return page(title, note, 760, bottom + 92, parts)


def own_adapter(runs: dict[str, dict]) -> str:
    """Right answers with each task's own adapter in the pool and without it, by method."""
    own, without = (results(runs, setting) for setting in ("own", "without"))
    order = sorted(own, key=lambda method: -without.get(method, {"mean": 100})["mean"])
    top, left, right = 80, 410, 750
    bottom = top + 26 * len(order)

    def to_x(value):
        return left + (right - left) * value / 100

    parts = legend("trained to mix adapters", "retrieved", "nothing trained to choose")
    parts += [circle(555, 52, 4, "solid"), text(566, 56, "own adapter in the pool")]
    parts += [circle(745, 52, 4), text(756, 56, "without it")]
    parts += ticks(to_x, range(0, 101, 20), top, bottom, "exact match in percent, mean of 28 tasks")
    for row, method in enumerate(order):
        y = top + 26 * row + 13
        parts += label(method, y)
        kind = colour_of(method)
        for scores, side in ((without, -1), (own, 1)):
            if method in scores:
                mean, half = scores[method]["mean"], scores[method]["plus_minus"]
                low, high = to_x(mean - half), to_x(mean + half)
                parts.append(whisker(to_x(mean), low, high, y, kind, hollow=side < 0))
                x, anchor = (high + 8, "start") if side > 0 else (low - 8, "end")
                parts.append(text(x, y + 4, f"{mean:.1f}", f"small {anchor} {kind}"))
    tasks = runs["own"]["methods"]["base"]["tasks"].values()
    note = f"tiny/, {sum(task['n'] for task in tasks):,} test prompts; lines are 95 % intervals."
    title = "A task's own adapter in the pool, and without it"
    return page(title, note, 840, bottom + 78, parts)


def results(runs: dict[str, dict], setting: str) -> dict[str, dict]:
    """{method: its scores} of all runs in a setting, "own" or "without"."""
    widest = {"ramole, 28": runs[f"{setting}_28"]["methods"]["ramole"]}
    return runs[f"printed_{setting}"]["methods"] | widest | runs[setting]["methods"]


# Speed --------------------------------------------------------------------------------------------


def decode(runs: dict[str, dict]) -> str:
    """Milliseconds a token of one request, beside other programs."""
    run = runs["decode"]
    rows = [row for row in run["table"] if row["batch"] == 1 and "compiled" not in row["row"]]
    rows.sort(key=lambda row: row["ms"])
    top, left, right = 56, 240, 690
    bottom = top + 34 * len(rows)
    most = 20 * math.ceil(max(row["high"] for row in rows) / 20)

    def to_x(value):
        return left + (right - left) * value / most

    parts = ticks(to_x, range(0, most + 1, 20), top, bottom, "ms a token")
    for number, row in enumerate(rows):
        y = top + 34 * number + 17
        peer = row["row"].startswith(PEERS)
        kind = "" if peer else "c0"
        name = row["row"] if peer else f"nanoMoLE, {row['row']}"
        parts.append(text(left - 12, y + 4, name, f"end {kind}"))
        parts.append(rect(left, y - 10, to_x(row["ms"]) - left, 20, f"{kind} solid bare", 0.55))
        parts.append(line(to_x(row["low"]), y, to_x(row["high"]), y, kind))
        parts.append(text(to_x(row["high"]) + 10, y + 4, f"{row['ms']:.3g} ms", kind))
    note = f"One request, {machine(run)}; median, and a line from quartile to quartile."
    return page("Decoding beside other programs", note, 800, bottom + 78, parts)


def adapters(runs: dict[str, dict]) -> str:
    """Milliseconds a token by the number of adapters in the pool."""
    run = runs["decode_adapters"]
    times = {row["row"]: row["ms"] for row in run["table"] if row["batch"] == 1}
    pools = {}  # adapters in the pool -> ms
    for name, ms in times.items():
        if re.fullmatch(r"\d+ adapters", name):
            pools[int(name.split()[0])] = ms
    base = times["base"]
    left, right, top, bottom = 90, 640, 64, 284
    most = 5 * math.ceil(max(times.values()) / 5)

    def to_x(e):
        share = math.log(e / min(pools)) / math.log(max(pools) / min(pools))
        return left + 60 + (right - left - 120) * share

    def to_y(ms):
        return bottom - (bottom - top) * ms / most

    parts = [text(16, top - 10, "ms a token")]
    for ms in range(0, most + 1, 5):
        parts.append(line(left, to_y(ms), right, to_y(ms), "grid"))
        parts.append(text(left - 10, to_y(ms) + 4, f"{ms}", "dim end"))
    parts.append(line(left, to_y(base), right, to_y(base), "dashed"))
    parts.append(text(right + 10, to_y(base) + 4, f"base, {base:.3g} ms"))
    points = [f"{to_x(e):.1f} {to_y(ms):.1f}" for e, ms in pools.items()]
    parts.append(path("M" + "L".join(points), "c0"))
    for e, ms in pools.items():
        parts.append(circle(to_x(e), to_y(ms), 4, "c0 solid"))
        above = f"{ms:.3g} ms, +{100 * (ms / base - 1):.0f} %"
        parts.append(text(to_x(e), to_y(ms) - 12, above, "c0 mid"))
        parts.append(text(to_x(e), bottom + 18, f"{e}", "dim mid"))
    axis = "adapters in the pool; a token uses two"
    parts.append(text((left + right) / 2, bottom + 38, axis, "mid"))
    return page("What more adapters cost", f"One request, {machine(run)}.", 800, bottom + 78, parts)


# What they share ----------------------------------------------------------------------------------


def legend(*names: str) -> list[str]:
    """What the colours mean, each said in its colour."""
    parts = []
    x = 16
    for index, name in enumerate(names):
        parts += [circle(x + 5, 52, 4, f"c{index} solid"), text(x + 16, 56, name, f"c{index}")]
        x += 40 + 7 * len(name)
    return parts


def colour_of(method: str) -> str:
    """The class of a method's colour."""
    place = METHODS[method][0]
    return "" if place is None else f"c{place}"


def label(method: str, y: float) -> list[str]:
    """A method's name and what it is, at the left of its row."""
    name = text(16, y + 4, method, f"code {colour_of(method)}")
    return [name, text(132, y + 4, METHODS[method][1], "dim")]


def machine(run: dict) -> str:
    """The model, and the machine that a run of bench.py was measured on."""
    where = f"{run['threads']} threads of {run['processor']}, {run['GB/s']:g} GB/s"
    return f"SmolLM2-135M, {run['dtype']}, {where}"


def draw() -> dict[str, str]:
    """{file name: SVG} of all figures. Raises InputError where a run's file is missing."""
    runs = {}
    for name, command in RUNS.items():
        file = FIGURES / f"{name}.json"
        if not file.exists():
            raise InputError(f"{file} is missing: {command} writes it")
        runs[name] = json.loads(file.read_text("utf-8"))
    drawn = {"gated_linear.svg": gated_linear()}
    for figure in (composite, gate_accuracy, own_adapter, decode, adapters):
        drawn[f"{figure.__name__}.svg"] = figure(runs)
    return drawn


def main() -> None:
    """The command: draws all figures."""
    for name, svg in draw().items():
        write_text(FIGURES / name, svg)
        print(f"wrote docs/figures/{name}")


if __name__ == "__main__":
    run_script(main)
