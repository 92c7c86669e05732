"""Prints the table of all methods in docs/results.md, from what runs/all_methods.sh wrote.

    python docs/all_methods.py out/all_methods

OUT/with and OUT/without are folders of eval.py, with each task's own adapter in the pool and without it. Beside
them are -28, with 28 adapters retrieved, and -drlora, over the pool that DR-LoRA made. OUT-speed.txt and
OUT-speed-drlora.txt are what `bench.py methods` printed.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # Python puts the script's own folder there alone

from common.endings import run_script  # noqa: E402
from common.files import InputError, read_json, read_text  # noqa: E402
from common.tables import markdown  # noqa: E402
from common.tensors import read_safetensors  # noqa: E402
from evaluation.paired import compare_on_tasks  # noqa: E402
from evaluation.tables import difference_cell  # noqa: E402
from methods import FALLBACK  # noqa: E402
from methods.batch import listed_method  # noqa: E402
from pool.folder import PoolFolder  # noqa: E402
from tasks.folders import Task  # noqa: E402

ANCHORS = {"with": "meteora_top2", "without": "ramole, 28 retrieved"}  # the others' differences are to these


def read_runs(out: Path, setting: str) -> tuple[dict, dict, list[dict]]:
    """OUT/SETTING and the runs beside it -> ({method: its results, and "pool", the folder}, {size: {method: its
    composites}}, rows of answers.jsonl on single prompts)."""
    methods = {}
    composite = {}
    rows = []
    for suffix, added in (("", ""), ("-28", ", 28 retrieved"), ("-drlora", "")):
        folder = out / f"{setting}{suffix}"
        results = read_json(folder / "results.json")
        options = results["meta"]["options"]
        for name, found in results["methods"].items():
            methods[name + added] = found | {"pool": Path(options["pool"] or options["model"])}
        for size, scores in results["composite"].items():
            for name, found in scores.items():
                composite.setdefault(size, {})[name + added] = found
        for line in read_text(folder / "answers.jsonl").splitlines():
            row = json.loads(line)
            if "task" in row:
                rows.append(row | {"method": row["method"] + added})
    return methods, composite, rows


def compared(methods: dict, rows: list[dict], other: str) -> dict[str, dict]:
    """{method: its paired difference to `other`}."""
    tasks = {}
    for name, scored in methods[other]["tasks"].items():
        test = [row for row in rows if row["task"] == name and row["method"] == other]
        tasks[name] = Task(name, scored["metric"], [], test)
    return compare_on_tasks(rows, tasks, other, seed=0)


def read_speed(out: Path) -> dict[str, dict]:
    """{method: its row of `bench.py methods`}."""
    found = {}
    for suffix in ("-speed-drlora.txt", "-speed.txt"):
        table = json.loads(read_text(Path(f"{out}{suffix}")).splitlines()[-1])["table"]
        found |= {row["row"]: row for row in table}
    return found


def parameters(pool: Path, name: str) -> int:
    """How many numbers the files hold that the method's training made. What experts share, which each of
    their files has, counts once."""
    method = listed_method(name) or FALLBACK.parse(name)
    place = SimpleNamespace(folder=PoolFolder(pool, {}))
    files = []
    if hasattr(method, "folder"):
        files = [method.folder(place) / "adapter_model.safetensors"]
    elif hasattr(method, "file"):
        file = method.file(place)
        files = [file]
        if file.is_relative_to(pool / "baselines"):  # a pool of its own
            files += file.parents[1].glob("adapters/*/adapter_model.safetensors")
    tensors = {}
    for file in files:
        for key, tensor in read_safetensors(file)[0].items():
            tensors[key, tensor.view(torch.uint8).numpy().tobytes()] = tensor.numel()
    return sum(tensors.values())


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
        step = speed.get(name.partition(",")[0], {})
        trained = parameters(found["pool"], name.partition(",")[0])
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
        raise InputError("expected one folder, which runs/all_methods.sh has filled")
    header = ["method", "with", f"less {ANCHORS['with']}", "right of ten", "without"]
    header += [f"less {ANCHORS['without']}", "adapters a token", "ms a token", "parameters"]
    print(*markdown(header, table(Path(sys.argv[1]))), sep="\n")


if __name__ == "__main__":
    run_script(main)
