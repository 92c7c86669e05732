"""GSM8K (Cobbe et al., 2021) as the task folder gsm8k, with its own train and test split.

FOLDER is a checkout of github.com/openai/grade-school-math. The response is the final number alone or,
with --steps, the worked solution, which ends in "#### 72". The metric gsm8k reads the number after "####",
else the last one, so adapters trained with either have comparable scores.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds, ends in one line
    from common.signals import end_at_once

    end_at_once()

import re
from dataclasses import dataclass
from pathlib import Path

from common.endings import run_script
from common.files import InputError, read_jsonl
from common.options import parse_args
from common.printable import shown
from tasks.folders import Task
from tasks.sources import Row, SourceConfig, filled_text, write_tasks

FINAL = re.compile(r"####\s*(-?[0-9,]*\.?[0-9]+)\s*$")
ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator's: <<48/2=24>>


@dataclass
class Gsm8kConfig(SourceConfig):
    """Options of `python -m tasks.gsm8k`."""

    steps: bool = False  # responses are the worked solutions, not the final numbers alone


def read_split(file: Path, steps: bool) -> list[Row]:
    """The rows of a file of {"question", "answer"} lines. Raises InputError that names the question."""
    rows = []
    for number, line in enumerate(read_jsonl(file, ("question", "answer")), 1):
        where = f"{file}: question {number}"
        final = FINAL.search(line["answer"])
        if not final:
            end = shown(line["answer"][-40:])
            raise InputError(f"{where}: answer ends in {end}, expected #### and a number")
        response = ANNOTATION.sub("", line["answer"]) if steps else final[1].replace(",", "")
        rows.append({"prompt": filled_text(where, "question", line["question"]), "response": response})
    if not rows:
        raise InputError(f"{file}: no question in it")
    return rows


def main() -> None:
    """The command: reads both splits, then writes the task folder."""
    args = parse_args(Gsm8kConfig, description=__doc__)
    data = Path(args.folder) / "grade_school_math" / "data"
    train = read_split(data / "train.jsonl", args.steps)
    test = read_split(data / "test.jsonl", args.steps)
    write_tasks(args.out, [Task("gsm8k", "gsm8k", train, test)])


if __name__ == "__main__":
    run_script(main)
