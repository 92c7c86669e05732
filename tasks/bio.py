"""Bio-benchmark (Jiang et al., 2025, arXiv 2503.04013) as task folders, one a file of questions.

FOLDER is a checkout of github.com/jiangjyjy/Bioinformatics_Benchmark. An entry's field `eval` says how it
is scored, and METRIC_OF has the metric for it. An answer of several fields is right if all are. RNA
structures are scored by recovery, where the paper has a distance between two graphs.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds, ends in one line
    from common.signals import end_at_once

    end_at_once()

import re
from pathlib import Path
from typing import Any

from common.endings import run_script
from common.fields import Number, check
from common.files import InputError, parse_json, read_text, warn
from common.options import parse_args
from common.printable import shown
from tasks.folders import Task
from tasks.metrics import STRUCTURE
from tasks.sources import SplitConfig, filled_text, find_files, split, write_tasks

# {eval in lower case: metric}. None: it needs another program or a judge, so the file is left out.
METRIC_OF = {
    "accuracy": "exact_match",
    "accuracy, points": "exact_match",
    "accuracy, macro-f1": "exact_match",
    "prediction accuracy": "recovery",
    "recovery rate": "recovery",
    "graph distance": "recovery",
    "rouge": "rouge_l",
    "word composition, semantic similarities, factuality": "rouge_l",
    "hmmscan": None,
    "infernal cm": None,
    "infernal cm model": None,
    "fluency, relevance, completeness, medical proficiency": None,
}


def read_entries(file: Path) -> list[dict]:
    """The entries of a file, which is a list or an object with one list. Raises InputError."""
    value = parse_json(read_text(file), file)
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not check(f"{file}: the whole", value, [dict]):
        raise InputError(f"{file}: no entry in it")
    return value


def metric_of(where: str, entry: dict) -> str | None:
    """The metric for an entry's `eval`, in place of which one set has a field "Accuracy". Raises
    InputError for an `eval` that isn't in METRIC_OF."""
    name = entry.get("eval", "accuracy" if "Accuracy" in entry else None)
    if not isinstance(name, str) or name.lower() not in METRIC_OF:
        raise InputError(f"{where}: eval is {shown(name)}, expected one of {'; '.join(METRIC_OF)}")
    return METRIC_OF[name.lower()]


def response_of(where: str, answer: Any) -> str:
    """The text of an answer: of a list of references the first, of an object its free_form_answer or,
    without one, a line "NAME: TEXT" for each field. Raises InputError."""
    if isinstance(answer, dict):
        answer = answer.get("free_form_answer", answer)
    if isinstance(answer, dict):
        fields = check(f"{where}: answer", answer, {str: str})
        answer = "\n".join(f"{name}: {text}" for name, text in fields.items())
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    answer = check(f"{where}: answer", answer, (str, Number(int, 0, 1_000_000)))
    return filled_text(where, "answer", str(answer))


def sequence_of(where: str, text: str) -> str:
    """The sequence in capital letters and without spaces, as the metric recovery compares it. Raises
    InputError for other characters than letters, or than dots and brackets."""
    sequence = "".join(text.split()).upper()
    if not re.fullmatch(rf"[A-Z]+|[{re.escape(STRUCTURE)}]+", sequence):
        raise InputError(f"{where}: answer is {shown(text)}, expected letters alone, or {STRUCTURE} alone")
    return sequence


def read_file(file: Path, share: float) -> Task | None:
    """The task of a file. Warns and returns None where no metric here can score it. Raises InputError,
    which names the entry."""
    entries = {f"{file}: entry {number}": entry for number, entry in enumerate(read_entries(file))}
    metrics = {metric_of(where, entry) for where, entry in entries.items()}
    if len(metrics) > 1:
        found = shown(sorted(map(str, metrics)))
        raise InputError(f"{file}: eval has metrics {found}, expected one for all entries")
    (metric,) = metrics
    if metric is None:
        warn(f"{file}: left out, as no metric here computes what its eval says")
        return None
    rows = []
    for where, entry in entries.items():
        prompt = filled_text(where, "question", entry.get("question"))
        response = response_of(where, entry.get("answer"))
        if metric == "recovery":
            response = sequence_of(where, response)
        rows.append({"prompt": prompt, "response": response})
    return split(file, metric, rows, share)


def main() -> None:
    """The command: reads every file, then writes the task folders."""
    args = parse_args(SplitConfig, description=__doc__)
    files = find_files(args.folder, "Bio-Benchmark/*/[!.]*.json")
    tasks = [task for file in files if (task := read_file(file, args.test))]
    if not tasks:
        raise InputError(f"{args.folder}: no file in it that a metric here can score")
    write_tasks(args.out, tasks)


if __name__ == "__main__":
    run_script(main)
