"""Text from files and options that a terminal would obey: through every command that shows it, and not
one control character comes out."""

import json
import re
import shutil
import unicodedata

import pytest

from common.files import write_json, write_jsonl
from common.tensors import read_safetensors, write_safetensors
from helpers_commands import command
from helpers_models import write_adapters
from model import load_llama

# Clears the screen, sets its title, goes to the line's start, reorders text, ends the line.
EVIL = "a\x1b[2J\x1b]0;t\x07\r\u202e\x9b7m\x7f\u2028\nerror: b"
NAME = "a\x1b[2J\u202e"  # for what can't hold a line break
COLOURS = re.compile(r"\x1b\[(0|(1;)?38;2;\d+;\d+;\d+)m")
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.fixture(scope="module")
def evil(small_model, tmp_path_factory):
    """A folder where everything is named EVIL that may be: a model, a pool with a sample and a prompt of
    that text, an adapter whose config has it as field and as base, tasks."""
    root = tmp_path_factory.mktemp("evil") / EVIL
    shutil.copytree(small_model, root / "model")
    paths = write_adapters(root / "pool" / "adapters", load_llama(small_model), ["one", "two"])
    write_json(root / "pool" / "pool.json", {"adapters": ["one", "two"], "template": f"{EVIL} {{prompt}}"})
    for path in paths.values():
        write_jsonl(path / "samples.jsonl", [{"prompt": EVIL}])
        config = json.loads((path / "adapter_config.json").read_text())
        write_json(path / "adapter_config.json", config | {EVIL: EVIL, "base_model_name_or_path": EVIL})
    shutil.copytree(paths["one"], root / "plain" / EVIL)
    bad = shutil.copytree(paths["one"], root / "bad")
    tensors, metadata = read_safetensors(bad / "adapter_model.safetensors")
    write_safetensors(bad / "adapter_model.safetensors", {EVIL: tensors.popitem()[1], **tensors}, metadata)
    for folder, name in (("tasks", "one"), ("evil tasks", EVIL)):
        write_json(root / folder / name / "task.json", {"metric": "exact_match"})
        for split in ("train", "test"):
            write_jsonl(root / folder / name / f"{split}.jsonl", [{"prompt": EVIL, "response": EVIL}])
    write_jsonl(root / "lines.jsonl", [{"adapter": EVIL, "prompt": EVIL, "response": EVIL}])
    write_jsonl(root / "prompts.jsonl", [{"prompt": EVIL, "method": EVIL}])
    write_json(root / "index" / "config.json", json.loads((small_model / "config.json").read_text()))
    weights = {"weight_map": {EVIL: f"{EVIL}.safetensors"}}
    write_json(root / "index" / "model.safetensors.index.json", weights)
    (root / "index" / "tokenizer.model").write_bytes((small_model / "tokenizer.model").read_bytes())
    return root


ANSWER = [
    "generate.py",
    "--model",
    "ROOT/model",
    "--pool",
    "ROOT/pool",
    "--prompt",
    EVIL,
    "--max_new_tokens",
    "3",
]
EVAL = ["eval.py", "--model", "ROOT/model", "--pool", "ROOT/pool", "--max_new_tokens", "2"]
TRAIN = ["train.py", "adapters", "--model", "ROOT/model", "--pool", "ROOT/new", "--steps", "1"]
# {what is shown: (exit status, command line)}
LINES = {
    "list": (0, [*ANSWER[:5], "--list"]),
    "answer in colour": (0, [*ANSWER, "--method", "mix:one=1", "--routing"]),
    "retrieved": (0, [*ANSWER, "--method", "selection", "--json"]),
    "picture": (0, [*ANSWER, "--method", "adapter:one", "--json", "--svg", "ROOT/a.svg", "--html", "ROOT/a.html"]),
    "chosen name": (2, [*ANSWER, "--method", EVIL]),
    "mix": (2, [*ANSWER, "--mix", f"{EVIL}=1"]),
    "exclude": (2, [*ANSWER, "--exclude", EVIL]),
    "template": (2, [*ANSWER, "--template", EVIL]),
    "option": (2, [*ANSWER, f"--{EVIL}"]),
    "argument": (2, [*ANSWER, EVIL]),
    "choice": (2, [*ANSWER, "--dtype", EVIL]),
    "number": (2, [*ANSWER, "--top_k", EVIL]),
    "model": (2, ["generate.py", "--model", f"ROOT/{EVIL}", "--prompt", "a"]),
    "adapter": (2, [*ANSWER, "--adapter", f"{EVIL}=ROOT/bad"]),
    "folder": (2, [*ANSWER, "--pool", "ROOT/plain"]),
    "tensor": (2, [*ANSWER, "--adapter", "three=ROOT/bad"]),
    "shard": (2, ["generate.py", "--model", "ROOT/index", "--prompt", "a"]),
    "method of a line": (2, [*ANSWER, "--prompts", "ROOT/prompts.jsonl"]),
    "html": (2, [*ANSWER, "--html", f"ROOT/{EVIL}/page.html"]),
    "export": (0, [*ANSWER[:5], "--export", "ROOT/exported", "--mix", "one=0.5,two=0.5"]),
    "table": (0, [*EVAL, "--tasks", "ROOT/tasks", "--methods", "base,oracle", "--only", "one",
                  "--out", "ROOT/out"]),
    "only": (2, [*EVAL, "--tasks", "ROOT/tasks", "--only", EVIL, "--out", "ROOT/out"]),
    "task": (2, [*EVAL, "--tasks", "ROOT/evil tasks", "--out", "ROOT/out"]),
    "task of a line": (2, [*EVAL, "--tasks", "ROOT/lines.jsonl", "--out", "ROOT/out"]),
    "trained": (0, [*TRAIN, "--tasks", "ROOT/tasks"]),
    "trained name": (2, [*TRAIN, "--tasks", "ROOT/evil tasks"]),
    "trained line": (2, [*TRAIN, "--tasks", "ROOT/lines.jsonl"]),
    "kind": (2, ["train.py", "gates", "--kind", EVIL]),
    "command": (2, ["train.py", EVIL]),
    "bench": (2, ["bench.py", "decode", "--model", f"ROOT/{EVIL}"]),
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_no_control_character_comes_out(line, evil):
    """Without it an adapter from the hub clears the screen, hides the warning above it, or forges a
    line of ours."""
    status, args = LINES[line]
    done = command(*(arg.replace("ROOT", str(evil)) for arg in args))
    shown = done.stdout + done.stderr
    if line == "answer in colour":
        shown = COLOURS.sub("", shown)
    elif line == "retrieved":
        assert json.loads(done.stdout)["prompt"] == EVIL
    assert done.returncode == status, shown
    assert not [c for c in shown if unicodedata.category(c) in HIDDEN and c != "\n"], shown
    errors = [y for y in done.stderr.splitlines() if y.startswith("error: ")]
    assert len(errors) == (status == 2) and "Traceback" not in shown
    assert not errors or "\\x1b" in errors[0]


def test_the_prompt_loop_stays_clean(evil):
    """Without it a line that is pasted into the loop can do what a file can't, or end the session."""
    typed = [f"/add {NAME}=x", "/add a=\0", f"/add b={'x' * 300}", f"/remove {NAME}", f"/method {NAME}!"]
    typed += [f"/mix {NAME}=1", "/adapters", "/method mix:one=1", f"hi {NAME}", "/route"]
    args = [arg.replace("ROOT", str(evil)) for arg in ANSWER[:5]]
    done = command(*args, "--interactive", "--routing", "--max_new_tokens", "3", stdin="\n".join(typed))
    errors = [y for y in done.stderr.splitlines() if y.startswith("error: ")]
    assert done.returncode == 0 and len(errors) == 6, done.stderr
    shown = COLOURS.sub("", done.stdout + done.stderr)
    assert not [c for c in shown if unicodedata.category(c) in HIDDEN and c != "\n"]
    assert shown.count("\\u202e") >= 10  # in errors, the list, the coloured prompt and the map
