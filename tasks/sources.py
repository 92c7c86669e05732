"""Published benchmarks as task folders: what tasks/bio.py, tasks/bbh.py and tasks/gsm8k.py share.

Each of these reads the files of a checkout, checks every entry, and writes OUT/NAME/train.jsonl,
test.jsonl and task.json. Where a benchmark has no training split, a hash of the prompt makes one.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from common.fields import Number, check
from common.files import InputError, say, write_json, write_jsonl
from pool.folder import check_adapter_name, check_twice
from tasks.folders import Task, load_tasks

Row = dict[str, str]  # {"prompt", "response"}


@dataclass
class SourceConfig:
    """Options of the commands that read a benchmark."""

    folder: str = field(metadata={"positional": True})  # checkout of the benchmark's repository
    out: str  # folder to write the task folders into


@dataclass
class SplitConfig(SourceConfig):
    """Options for a benchmark without a training split."""

    test: Annotated[float, Number(float, 0.01, 0.99)] = 0.2  # share of the questions kept for testing


def find_files(folder: str | Path, pattern: str) -> list[Path]:
    """The files of `folder` that match the glob `pattern`, sorted. Raises InputError where none does."""
    found = sorted(Path(folder).glob(pattern))
    if not found:
        plain = pattern.replace("[!.]", "")
        raise InputError(f"{folder}: no file {plain} in it, expected a checkout of the benchmark")
    return found


def filled_text(where: str, field_name: str, value: Any) -> str:
    """`value`, checked to be a text that isn't blank. Raises InputError, which begins with `where`."""
    text = check(f"{where}: {field_name}", value, str)
    if not text.strip():
        raise InputError(f"{where}: {field_name} is {text!r}, expected a text that isn't empty")
    return text


def in_test(prompt: str, share: float) -> bool:
    """Whether a prompt is in the test split, which gets about `share` of the prompts. It depends on the
    prompt alone, not on other prompts or their order, and equal prompts stay together."""
    return int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) < share * 2**32


def split(file: Path, metric: str, rows: list[Row], share: float) -> Task:
    """A Task of the rows, named after the file, split by in_test(). Raises InputError for an empty split."""
    test = [row for row in rows if in_test(row["prompt"], share)]
    train = [row for row in rows if not in_test(row["prompt"], share)]
    if not train or not test:
        found = f"{len(rows)} questions, {len(train)} for training and {len(test)} for testing"
        raise InputError(f"{file}: {found} at --test {share}, expected at least one of each")
    return Task(file.stem, metric, train, test)


def write_tasks(out: str | Path, tasks: list[Task]) -> None:
    """Writes OUT/NAME for every task, and prints a line for each.

    A folder gets its name once it is complete. Until then it is .NAME.partial, which no command reads.
    An existing folder with the same examples stays. Raises InputError for one with other examples,
    before anything is written.
    """
    check_twice(out, [task.name for task in tasks])
    new = []
    for task in tasks:
        check_adapter_name(task.name, out, "task")
        folder = Path(out) / task.name
        if not folder.exists():
            new.append(task)
        elif not (folder / "task.json").exists() or load_tasks(out, [task.name])[task.name] != task:
            raise InputError(f"{folder}: holds other examples: remove it, or choose another --out")
    for task in new:
        partial = Path(out) / f".{task.name}.partial"
        write_jsonl(partial / "train.jsonl", task.train)
        write_jsonl(partial / "test.jsonl", task.test)
        write_json(partial / "task.json", {"metric": task.metric})
        partial.rename(Path(out) / task.name)
    for task in tasks:
        sizes = f"{len(task.train)} train, {len(task.test)} test, metric {task.metric}"
        say(f"wrote {Path(out) / task.name}: {sizes}")
