"""BIG-Bench Hard (Suzgun et al., 2022) as task folders, one a file of bbh/, scored by exact match.

FOLDER is a checkout of github.com/suzgunmirac/BIG-Bench-Hard.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds, ends in one line
    from common.signals import end_at_once

    end_at_once()

from pathlib import Path

from common.endings import run_script
from common.fields import read_field
from common.files import read_json
from common.options import parse_args
from tasks.folders import Task
from tasks.sources import SplitConfig, filled_text, find_files, split, write_tasks


def read_file(file: Path, share: float) -> Task:
    """The task of a file {"examples": [{"input", "target"}]}. Raises InputError that names the entry."""
    rows = []
    for number, entry in enumerate(read_field(file, read_json(file), "examples", [dict])):
        where = f"{file}: examples[{number}]"
        prompt = filled_text(where, "input", entry.get("input"))
        rows.append({"prompt": prompt, "response": filled_text(where, "target", entry.get("target"))})
    return split(file, "exact_match", rows, share)


def main() -> None:
    """The command: reads every file, then writes the task folders."""
    args = parse_args(SplitConfig, description=__doc__)
    files = find_files(args.folder, "bbh/[!.]*.json")
    write_tasks(args.out, [read_file(file, args.test) for file in files])


if __name__ == "__main__":
    run_script(main)
