"""What the README says, done: its first command, its Python, its options, its embedded model."""

import json
import re
import shlex
import subprocess
import sys

import pytest

import bench
import eval as evaluation
import generate
import train
from common.options import build_parser
from helpers_commands import ROOT, command
from tasks.tiny import TinyTasksConfig

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
LINES = re.sub(r"\\\n\s*", "", "\n".join(text for _, text in BLOCKS))
COMMANDS = re.findall(r"python (?:-m )?(\w+\.\w+) (.*?)(?:\s+#.*)?$", LINES, re.MULTILINE)


def test_the_first_command_answers():
    """The first thing that a newcomer types must work as it stands there, offline."""
    install, _, first = BLOCKS[0][1].strip().partition(" && ")
    assert install == "pip install -r requirements.txt"
    script, *args = shlex.split(first)[1:]
    done = command(script, *args)
    assert done.returncode == 0 and done.stdout == "mice\n", (done.stdout, done.stderr)
    assert done.stderr.startswith("method: meteora (")


def test_what_it_shows_is_what_it_prints():
    """A transcript that nobody can repeat is worse than none."""
    (shown,) = (text for _, text in BLOCKS if text.startswith("$ "))
    parts = shown.split("$ ")[1:]
    assert len(parts) == 2
    for part in parts:
        line, expected = re.fullmatch(r'((?:[^"]|"[^"]*")*?)\n(.*)', part, re.DOTALL).groups()
        done = command(*shlex.split(line)[1:])
        assert done.stderr + done.stdout == expected, line


def run_example(word):
    """The output of the README's Python that holds `word`."""
    (code,) = (text for language, text in BLOCKS if language == "python" and word in text)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_gate_of_your_own_learns():
    """Who forks this to try a gate starts from these lines; that it learns shows that nothing else
    is needed."""
    *steps, answers = run_example("class KeyGate").splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in steps]
    assert len(losses) == 20 and sum(losses[-3:]) < 0.7 * sum(losses[:3]) and answers.startswith("[")


def test_the_python_example_runs():
    """An example that people copy breaks silently when a name changes."""
    *tokens, answers = run_example("stream").splitlines()
    assert "Haus" in answers and any("plural" in line for line in tokens)


def test_every_option_in_a_command_exists():
    """A README that names an option which is gone sends its readers into an error."""
    scripts = {"generate.py": generate.Options, "eval.py": evaluation.Options, "tasks.tiny": TinyTasksConfig}
    classes = {name: cls for name, (cls, *_) in (train.COMMANDS | bench.COMMANDS).items()}
    seen = 0
    for script, rest in COMMANDS:
        first = rest.split()[0] if rest else ""
        cls = scripts.get(script) or classes[first]
        known = build_parser(cls)._option_string_actions
        for option in re.findall(r"(--\w+)", rest):
            assert option in known, (script, option)
            seen += 1
    assert seen > 20


def test_every_embedded_adapter_answers_its_task_and_composites(tmp_path):
    """A model committed with the wrong adapters, gates or tokenizer answers, and answers nonsense."""
    args = ["--limit", 5, "--methods", "oracle,meteora", "--composite", 3, "--composites", 11]
    args += ["--dtype", "float32"]
    done = command("eval.py", *args, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert min(results["methods"][method]["mean"] for method in ("oracle", "meteora")) >= 93, done.stdout
    assert min(r["right"] for r in results["composite"]["3"].values()) >= 2.4, done.stdout
