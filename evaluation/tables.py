"""Results as Markdown tables."""

import math
from collections.abc import Iterable

from common.printable import printable
from common.tables import markdown


def mean_of(scores: dict[str, dict]) -> dict[str, float]:
    """The mean over the tasks, and half its 95 % interval over other examples of the same tasks."""
    halves = [(s["high"] - s["low"]) / 2 for s in scores.values()]
    mean = sum(s["score"] for s in scores.values()) / len(scores)
    return {"mean": round(mean, 2), "plus_minus": round(math.hypot(*halves) / len(scores), 2)}


def table(
    results: dict[str, dict], tasks: Iterable[str], ceiling: str | None = None, against: dict | None = None
) -> str:
    """A row a task, a column a method, score [low, high], as Markdown.

    The last rows are each method's share of the method `ceiling`, and its difference to the one that
    `against` is about, where there are such.
    """
    rows = []
    for name in tasks:
        row = []
        for result in results.values():
            score = result["tasks"][name]
            row.append(f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]")
        rows.append([f"{name} ({score['metric']})", str(score["n"]), *row])
    means = [f"{result['mean']:.1f} ± {result['plus_minus']:.1f}" for result in results.values()]
    rows.append(["mean", "", *means])
    if ceiling and (whole := results[ceiling]["mean"]):
        shares = [f"{100 * result['mean'] / whole:.1f} %" for result in results.values()]
        rows.append([f"of the {ceiling}", "", *shares])
    if against:
        cells = [difference_cell(against["tasks"], method, ".1f") for method in results]
        rows.append([f"mean less {against['method']}", "", *cells])
    lines = markdown(["task", "n", *results], rows)
    for method, result in results.items():
        if "gates" in result:
            gates = result["gates"]
            share = f"{gates['right']:.1f} % of {gates['tokens']} response tokens"
            first = f" (q, k, v of layer 0: {gates['first_qkv']:.1f} %)" if "first_qkv" in gates else ""
            lines.append(f"\n{printable(method)}: gates' first choice right on {share}{first}")
    found = {method: result["routing"]["ess"] for method, result in results.items() if "routing" in result}
    if found:
        numbers = [f"{printable(method)} {ess:.2f}" for method, ess in found.items()]
        lines.append(f"\neffective number of adapters a token: {', '.join(numbers)}")
    return "\n".join(lines) + "\n"


def difference_cell(differences: dict[str, dict], method: str, digits: str) -> str:
    """A method's difference with its interval, "" where it has none."""
    if method not in differences:
        return ""
    value, low, high = (
        format(differences[method][key], f"+{digits}") for key in ("difference", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def cosines_line(alike: dict) -> str:
    """The mean and the largest of the adapters' cosines, and of which two that is."""
    pair = ", ".join(map(printable, alike["pair"]))
    return f"\ncosines of the pool's adapters: mean {alike['mean']:.3f}, largest {alike['largest']:.3f} ({pair})\n"


def composite_table(
    results: dict[str, dict], composite: dict[str, dict[str, dict]], against: dict | None = None
) -> str:
    """A row a method: its mean over the tasks, then attempted and right questions, as Markdown.

    `composite` is {questions in a prompt: {method: what score_composites() returned}}; of `against`
    each method's difference in right questions.
    """
    compared = against["composite"] if against else {}
    header = ["method", "tasks"]
    for n in composite:
        header += [f"{n}: attempted", f"{n}: right"]
        header += [f"{n}: right, less {against['method']}"] if n in compared else []
    rows = []
    for method, result in results.items():
        row = [method, f"{result['mean']:.1f}"]
        for n, scores in composite.items():
            row += composite_cells(scores[method]) if method in scores else ["", ""]
            row += [difference_cell(compared[n], method, ".2f")] if n in compared else []
        rows.append(row)
    lines = markdown(header, rows)
    counts = {score["n"] for scores in composite.values() for score in scores.values()}
    for count in counts:
        lines.append(f"\nquestions a prompt, {count} prompts of each size; tasks: mean in percent")
    return "\n".join(lines) + "\n"


def composite_cells(score: dict) -> list[str]:
    """Attempted and right questions with their intervals."""
    cells = []
    for key in ("attempted", "right"):
        cells.append(f"{score[key]:.2f} [{score[f'{key}_low']:.2f}, {score[f'{key}_high']:.2f}]")
    if "temperature" in score:
        cells[-1] += f" at temperature {score['temperature']:g}"
    return cells
