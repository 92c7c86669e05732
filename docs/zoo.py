"""Prints the table of all methods in docs/results.md, from what runs/zoo.sh wrote.

    python docs/zoo.py out/zoo

OUT/with and OUT/without are folders of eval.py, with each task's own adapter in the pool and without it. Beside
them are those of runs that differ: -28 with 28 adapters retrieved, -drlora over the pool that DR-LoRA made.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # Python puts the script's own folder there alone

from common.endings import run_script  # noqa: E402
from common.files import InputError, read_json, read_text  # noqa: E402
from common.tables import markdown  # noqa: E402
from common.tensors import read_safetensors  # noqa: E402
from evaluation.paired import compare_on_tasks  # noqa: E402
from evaluation.tables import difference_cell  # noqa: E402
from tasks.folders import Task  # noqa: E402

RENAMED = {"-28": {"ramole": "ramole, 28 retrieved"}, "-drlora": {}}
ANCHORS = {"with": "meteora_top2", "without": "ramole, 28 retrieved"}  # the others' differences are to these


def read_runs(out: Path, setting: str) -> tuple[dict, dict, list[dict]]:
    """OUT/SETTING and the runs beside it -> ({method: its results}, {size: {method: its composites}}, rows of
    answers.jsonl on single prompts)."""
    methods = {}
    composite = {}
    rows = []
    for suffix, names in {"": {}, **RENAMED}.items():
        folder = out / f"{setting}{suffix}"
        results = read_json(folder / "results.json")
        for name, found in results["methods"].items():
            methods[names.get(name, name)] = found
        for size, scores in results["composite"].items():
            for name, found in scores.items():
                composite.setdefault(size, {})[names.get(name, name)] = found
        for line in read_text(folder / "answers.jsonl").splitlines():
            row = json.loads(line)
            if "task" in row:
                rows.append(row | {"method": names.get(row["method"], row["method"])})
    return methods, composite, rows


def compared(methods: dict, rows: list[dict], other: str) -> dict[str, dict]:
    """{method: its paired difference to `other`}."""
    tasks = {}
    for name, scored in methods[other]["tasks"].items():
        test = [row for row in rows if row["task"] == name and row["method"] == other]
        tasks[name] = Task(name, scored["metric"], [], test)
    return compare_on_tasks(rows, tasks, other, seed=0)


def read_speed(out: Path) -> dict[str, dict]:
    """{method: the row of `bench.py methods`}."""
    found = {}
    for name in ("speed-drlora.txt", "speed.txt"):
        table = json.loads(read_text(out / name).splitlines()[-1])["table"]
        found |= {row["row"]: row for row in table}
    return found


def trained_parameters(out: Path, method: str) -> int | None:
    """How many numbers the method's own parts have; None where nothing but the adapters is trained."""
    method = method.removesuffix(", 28 retrieved")
    pool = out / ("drlora" if method == "drlora" else "pool")
    files = (
        pool / "gates" / f"{method}.safetensors",
        pool / "baselines" / method / "adapter_model.safetensors",
        pool / f"{method.replace('ramole', 'router')}.safetensors",
    )
    for file in filter(Path.exists, files):
        tensors, _ = read_safetensors(file)
        return sum(tensor.numel() for tensor in tensors.values())
    return None


def table(out: Path) -> Iterator[list]:
    """The rows: all methods, the best with the own adapter first."""
    methods, composite, rows = read_runs(out, "with")
    without, _, rows_without = read_runs(out, "without")
    less = {"with": compared(methods, rows, ANCHORS["with"])}
    less["without"] = compared(without, rows_without, ANCHORS["without"])
    speed = read_speed(out)
    for name in sorted(methods, key=lambda name: -methods[name]["mean"]):
        found = methods[name]
        hidden = without.get(name)
        ten = composite["10"].get(name)
        step = speed.get(name.removesuffix(", 28 retrieved"), {})
        trained = trained_parameters(out, name)
        yield [
            f"`{name}`",
            f"{found['mean']:.1f} ± {found['plus_minus']:.1f}",
            difference_cell(less["with"], name, ".1f"),
            f"{ten['right']:.2f} [{ten['right_low']:.2f}, {ten['right_high']:.2f}]" if ten else "",
            f"{hidden['mean']:.1f} ± {hidden['plus_minus']:.1f}" if hidden else "",
            difference_cell(less["without"], name, ".1f"),
            f"{found['routing']['ess']:.2f}" if "routing" in found else "",
            f"{step['ms']:.1f}" if step and "28" not in name else "",
            f"{trained:,}" if trained else "",
        ]


def main() -> None:
    """The command: reads the folder's runs and prints the table."""
    if len(sys.argv) != 2:
        raise InputError("expected one folder, which runs/zoo.sh has filled: python docs/zoo.py out/zoo")
    header = ["method", "with", f"less {ANCHORS['with']}", "right of ten", "without"]
    header += [f"less {ANCHORS['without']}", "adapters a token", "ms a token", "parameters"]
    print(*markdown(header, table(Path(sys.argv[1]))), sep="\n")


if __name__ == "__main__":
    run_script(main)
