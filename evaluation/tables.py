"""Results as Markdown tables."""

import math


def mean_of(scores):
    """The mean over the tasks, and half its 95 % interval over other examples of the same tasks."""
    half = math.hypot(*((s["high"] - s["low"]) / 2 for s in scores.values())) / len(scores)
    mean = sum(s["score"] for s in scores.values()) / len(scores)
    return {"mean": round(mean, 2), "plus_minus": round(half, 2)}


def table(results, tasks, ceiling=None):
    """A row a task, a column a method, score [low, high], as Markdown; shares of the method
    `ceiling` where there is one."""
    methods = list(results)
    lines = ["| task | n | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    for name in tasks:
        cells = [results[m]["tasks"][name] for m in methods]
        shown = [f"{c['score']:.1f} [{c['low']:.1f}, {c['high']:.1f}]" for c in cells]
        lines.append(f"| {name} ({cells[0]['metric']}) | {cells[0]['n']} | " + " | ".join(shown) + " |")
    means = [f"{results[m]['mean']:.1f} ± {results[m]['plus_minus']:.1f}" for m in methods]
    lines.append("| mean | | " + " | ".join(means) + " |")
    if ceiling and (whole := results[ceiling]["mean"]):
        shares = [f"{100 * results[m]['mean'] / whole:.1f} %" for m in methods]
        lines.append(f"| of the {ceiling} | | " + " | ".join(shares) + " |")
    lines += [
        f"\n{m}: gates' first choice right on {results[m]['gates']['right']:.1f} % of {results[m]['gates']['tokens']} "
        f"response tokens (q, k, v of layer 0: {results[m]['gates']['first_qkv']:.1f} %)"
        for m in methods
        if "gates" in results[m]
    ]
    return "\n".join(lines) + "\n"


def composite_table(results, composite):
    """A row a method: its mean over the tasks, and for each size the attempted and right questions
    of a prompt, as Markdown."""
    heads = [f"{n}: {key}" for n in composite for key in ("attempted", "right")]
    lines = ["| method | tasks | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for method, result in results.items():
        cells = []
        for r in (composite[n].get(method) for n in composite):
            cells += [f"{r[key]:.2f} [{r[key + '_low']:.2f}, {r[key + '_high']:.2f}]" if r else ""
                      for key in ("attempted", "right")]  # fmt: skip
            cells[-1] += f" at temperature {r['temperature']:g}" if r and "temperature" in r else ""
        lines.append(f"| {method} | {result['mean']:.1f} | " + " | ".join(cells) + " |")
    for count in {r["n"] for methods in composite.values() for r in methods.values()}:
        lines.append(f"\nquestions a prompt, {count} prompts of each size; tasks: mean in percent")
    return "\n".join(lines) + "\n"
