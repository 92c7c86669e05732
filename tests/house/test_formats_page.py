"""docs/formats.md, done: files broken as it says are refused with the line that it shows, and the keys
that it lists are those of the files that the commands write."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from common.files import MARK
from common.llama_folder import NEUTRAL, ROPE_FIELDS, SIZES
from common.tensors import read_metadata, read_safetensors, write_safetensors
from helpers_commands import ROOT, command
from pool.adapters import HARMLESS, REFUSED
from tasks.metrics import METRICS
from tasks.tiny import write

PAGE = (ROOT / "docs" / "formats.md").read_text("utf-8")
SECTIONS = {}  # {heading: the text below it}
for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
    heading, _, below = section.partition("\n")
    SECTIONS[heading] = below
INTRODUCTION = " ".join(PAGE.partition("\n## ")[0].split())
COMMANDS = dict(re.findall(r"`python ((?:train\.py gates|\w+\.py)) ([^`]+)`", INTRODUCTION))
# [(file, what is wrong with it, command, line that it prints)]
ROWS = re.findall(r"^\| `([^`]*)` \| (.*) \| `(\w+\.py.*)` \| `(error: .*)` \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folders of the embedded tasks, few examples each. Don't write into it."""
    folder = tmp_path_factory.mktemp("tasks")
    write(folder, train=3, test=2, documents=0)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A copy of tiny/, as commands write through links. Don't write into it."""
    return shutil.copytree(ROOT / "tiny", tmp_path_factory.mktemp("copy") / "tiny")


def linked(source, folder):
    """A copy of a folder whose files are links, so that breaking one is replacing it."""
    return shutil.copytree(source, folder, copy_function=lambda a, b: Path(b).symlink_to(a))


# Breaking a file ----------------------------------------------------------------------------------


def change_fields(file, fields):
    return json.dumps(json.loads(file.read_text("utf-8")) | json.loads(fields)).encode()


def keep_bytes(file, count):
    return file.read_bytes()[: int(count)]


def change_tensors(file, name, value=None):
    tensors, metadata = read_safetensors(file)
    tensor = tensors.pop(name)
    if value is not None:
        tensors[name] = tensor.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(value).to(tensor))
    return tensors, metadata


def change_metadata(file, fields):
    tensors, metadata = read_safetensors(file)
    return tensors, metadata | json.loads(fields)


# {what the page says is wrong: function of the file and what the pattern found -> its new content}
WRONG = {
    r"missing": lambda file: None,
    r"`(\{.*\})`": change_fields,
    r"cut to (\d+) bytes": keep_bytes,
    r"the text `(.*)`": lambda file, text: f"{text}\n".encode(),
    r"a copy of `(.*)`": lambda file, other: Path(other).read_bytes(),
    r"no tensor `(.*)`": change_tensors,
    r"a NaN in `(.*)`": lambda file, name: change_tensors(file, name, float("nan")),
    r"metadata `(\{.*\})`": change_metadata,
}


def break_file(file, wrong):
    """Makes the file what the page says that it is."""
    (how,) = [pattern for pattern in WRONG if re.fullmatch(pattern, wrong)]
    new = WRONG[how](file, *re.fullmatch(how, wrong).groups())
    file.unlink(missing_ok=True)  # a link
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(new, tuple):
        write_safetensors(file, *new)
    elif new is not None:
        file.write_bytes(new)


@pytest.mark.parametrize("row", ROWS, ids=[f"{file}-{wrong[:40]}" for file, wrong, *_ in ROWS])
def test_a_broken_file_gets_the_line_that_the_page_shows(row, tiny, tasks, tmp_path, monkeypatch):
    """Who searches the page for the line on their screen must find it, word for word."""
    file, wrong, line, printed = row
    monkeypatch.chdir(tmp_path)
    linked(tiny, tmp_path / "tiny")
    linked(tasks, tmp_path / "my-tasks")
    break_file(tmp_path / file, wrong)
    (name,) = [name for name in COMMANDS if line.startswith(name)]
    done = command(*shlex.split(f"{name} {COMMANDS[name]} {line.removeprefix(name)}"), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert [y for y in done.stderr.splitlines() if y.startswith("error: ")] == [printed]


def test_every_row_is_tried():
    """A row that the pattern above doesn't match would be a claim that nothing holds."""
    assert len(ROWS) == PAGE.count("`error: ") >= 25 and len(COMMANDS) == 3


# The keys of what is written ----------------------------------------------------------------------


def documented(heading, name):
    """The keys in a section's table, each a list of parts; a part in capitals is any name. Where a
    cell says in which files keys are, those of the file `name`."""
    (table,) = re.findall(r"^\| key \|.*\n\|---.*\n((?:\|.*\n)+)", SECTIONS[heading], re.MULTILINE)
    keys = []
    for row in table.splitlines():
        cells = row.strip("| ").split(" | ")
        if not name or name in cells[1].split(", "):
            for key in re.findall(r"`([^`]*)`", cells[0]):
                before, _, names = key.rstrip("}").partition("{")
                keys += [f"{before}{last}".split(".") for last in names.split(",")]
    return keys


def leaves(value, path=()):
    """The paths of all values that aren't objects; of a list the objects in it count."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from leaves(inner, path)
    else:
        yield path


def matches(key, path):
    """Whether a documented key is the path or something around it."""
    parts = zip(key, path, strict=False)
    return len(key) <= len(path) and all(part.isupper() or part == name for part, name in parts)


def check_keys(heading, value, name=""):
    """A section's keys are those of the value, none missing and none besides."""
    keys = documented(heading, name)
    paths = set(leaves(value))
    assert [path for path in paths if not any(matches(key, path) for key in keys)] == []
    assert [key for key in keys if not any(matches(key, path) for path in paths)] == []


def test_the_keys_of_the_pool_and_its_parts():
    """Who reads these files with a program of their own needs every key, and no key that is gone."""
    tiny = ROOT / "tiny"
    check_keys("The pool", json.loads((tiny / "pool.json").read_text("utf-8")))
    for name, file in (("gates", "gates/meteora_top2"), ("retriever", "retriever"), ("router", "router")):
        check_keys("Trained parts", read_metadata(tiny / f"{file}.safetensors"), name)


def run(*args, cwd):
    done = command(*args, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small_pool(tiny, tasks, tmp_path_factory):
    """A folder with my-pool, three of tiny/'s adapters, and my-tasks, their tasks."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("german", "plural", "sort_list"):
        linked(tiny / "adapters" / name, folder / "my-pool" / name)
        linked(tasks / name, folder / "my-tasks" / name)
    return folder


def test_the_keys_of_a_training_run(small_pool):
    """A run's folder is what people plot and compare."""
    line = ["--model", ROOT / "tiny", "--pool", "my-pool", "--tasks", "my-tasks", "--template"]
    line += ["[INST] {prompt} [/INST]\n", "--seed", 7]
    run("train.py", "gates", *line, "--steps", 2, cwd=small_pool)
    folder = small_pool / "my-pool" / "runs" / "gates_top2"
    check_keys("Training runs", json.loads((folder / "config.json").read_text("utf-8")))
    columns = (folder / "log.csv").read_text("utf-8").partition("\n")[0]
    assert f"`{columns}`" in SECTIONS["Training runs"]
    assert not (folder / "checkpoint.safetensors").exists()
    run("train.py", "lorahub", *line, "--steps", 2, "--shots", 2, cwd=small_pool)
    searched = json.loads((small_pool / "my-pool" / "baselines" / "lorahub.json").read_text("utf-8"))
    check_keys("Trained parts", searched, "lorahub.json")


def test_the_keys_of_results_and_answers(tasks, tmp_path):
    """Results are read by programs, and a key that is not documented gets guessed at."""
    asked = ["--only", "german", "--only", "plural", "--limit", 2, "--composite", 2, "--composites", 4]
    asked += ["--methods", "oracle,meteora_top2,selection", "--composite_temperature", "1,2"]
    asked += ["--against", "oracle"]
    run("eval.py", "--tasks", tasks, *asked, "--out", "report", cwd=tmp_path)
    report = tmp_path / "report"
    check_keys("Results", json.loads((report / "results.json").read_text("utf-8")))
    for line in (report / "answers.jsonl").read_text("utf-8").splitlines():
        assert all(f"`{key}`" in SECTIONS["Results"] for key in json.loads(line))
    for file in report.iterdir():
        name = re.sub(r"2-meteora_top2", "N-METHOD", file.name)
        assert f"`{name}`" in SECTIONS["Results"]
    printed = run("generate.py", "--method", "selection", "--prompt", "hi", "--json", cwd=tmp_path)
    check_keys("What `--json` prints", json.loads(printed))


def test_every_field_that_is_read_or_refused_is_named():
    """A field that decides whether a folder loads and is not on the page costs a look into the source."""
    needed = {
        "The model folder": [*NEUTRAL, *SIZES, *ROPE_FIELDS, *ROPE_FIELDS["llama3"]],
        "A PEFT adapter": [*REFUSED, *HARMLESS],
        "Tasks, examples, prompts": METRICS,
        "Training runs": MARK.values(),
    }
    for heading, names in needed.items():
        assert [name for name in names if not re.search(rf"\b{name}\b", SECTIONS[heading])] == [], heading
