"""What the README says, done: its first command, its Python, its map, its figures, its embedded model."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from helpers_commands import ENVIRONMENT, ROOT, command, python, repository_copy
from moe_lora import MeteoraGate, MultiLoRALinear

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def test_the_first_command_prints_what_it_shows():
    """The first thing that a newcomer types must work as it stands there, offline, and print what
    stands below it."""
    install, _, first = BLOCKS[0][1].strip().partition(" && ")
    assert install == "pip install -r requirements.txt"
    done = command(*shlex.split(first)[1:])
    assert done.stderr + done.stdout == BLOCKS[1][1]


def python_block(word):
    """The README's Python that holds `word`."""
    (code,) = (text for language, text in BLOCKS if language == "python" and word in text)
    return code


def test_the_forward_that_it_shows_is_the_shipped_one():
    """Without it the fifteen lines that explain the method could explain another one."""
    n, i, o, e, r, k = 11, 7, 5, 13, 3, 2
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x, W, G = draw(n, i), draw(o, i), draw(e, i)
    A, B, scale = draw(e, r, i), draw(e, o, r), draw(e)
    base = torch.nn.Linear(i, o, bias=False, dtype=torch.float64)
    base.weight.data = W
    shipped = MultiLoRALinear(base, A, B, scale, MeteoraGate(G, k))
    code = python_block("def gated_linear")
    assert len(code.splitlines()) <= 15
    names = {}
    exec(code, names)
    # Logits and weights are float32 in the shipped one.
    torch.testing.assert_close(
        names["gated_linear"](x, W, A, B, scale, G, k), shipped(x), rtol=1e-5, atol=1e-5
    )


def test_the_gate_of_your_own_is_the_examples():
    """Who copies the class from here and the loop from there needs them to fit."""
    assert python_block("class KeyGate") in (ROOT / "examples" / "key_gate.py").read_text()


@pytest.mark.slow
def test_a_gate_of_your_own_learns():
    """Who forks this to try a gate starts from these lines; that it learns shows that nothing else
    is needed."""
    line = [sys.executable, "-m", "examples.key_gate"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    *steps, answers = done.stdout.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in steps]
    assert len(losses) == 20 and sum(losses[-3:]) < 0.7 * sum(losses[:3]) and answers.startswith("[")


def test_the_python_example_runs():
    """An example that people copy breaks silently when a name changes."""
    done = python(python_block("stream"))
    assert done.returncode == 0, done.stderr
    *tokens, answers = done.stdout.splitlines()
    assert "Haus" in answers and any("plural" in line for line in tokens)


@pytest.mark.slow
def test_the_way_from_tasks_to_a_pool(tmp_path):
    """Who follows the commands under Training must arrive. Here they take fewer examples and steps than
    they say."""
    repository_copy(tmp_path)
    less = {"tasks.tiny": "--train 20 --test 2 --documents 3", "eval.py": "--limit 1 --max_new_tokens 9"}
    how = {"cwd": tmp_path, "env": ENVIRONMENT | {"PYTHONPATH": ""}, "capture_output": True, "timeout": 300}
    (block,) = (text for _, text in BLOCKS if "tasks28" in text)
    for line in block.splitlines():
        argv = shlex.split(re.sub(r"--steps \d+", "--steps 2", line), comments=True)[1:]
        argv += less.get(argv[1] if argv[0] == "-m" else argv[0], "").split()
        done = subprocess.run([sys.executable, *argv], text=True, **how)
        assert done.returncode == 0, (line, done.stderr)
    assert "| mean |" in done.stdout


def test_it_is_short():
    """A README that grows by a table a method is read by nobody."""
    lines = README.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(lines) <= 220 and len(rows) <= 60, (len(lines), len(rows))


def test_its_house_is_the_house():
    """A map that lacks a room, or says that a file has half the lines that it has, misleads."""
    (tree,) = re.findall(r"((?:^    \S.*\n|^\n)+)", README.partition("## The house")[2][:3000], re.MULTILINE)[
        :1
    ]
    named = set(re.findall(r"([\w/]+(?:/|\.py))(?=[ ,])", tree))
    rooms = {f"{file.parent.name}/" for file in ROOT.glob("*/__init__.py")}
    expected = {file.name for file in ROOT.glob("*.py")} | rooms
    assert named - expected <= {"tiny/", "runs/", "docs/", "tests/"} and expected <= named
    for name, lines in re.findall(r"`([\w/]+\.py)`\s\((\d+)(?: lines)?\)", README):
        real = len((ROOT / name).read_text().splitlines())
        assert abs(real - int(lines)) <= 0.1 * real, f"{name} has {real} lines"


def test_its_figures_are_those_of_the_pages():
    """A figure that was measured again on its page and not here contradicts it."""
    pages = [(ROOT / "docs" / name).read_text() for name in ("results.md", "speed.md")]
    lines = []
    for table in re.findall(r"(?:^\|.*\n)+", "\n".join(pages), re.MULTILINE):
        header, *rows = table.splitlines()
        lines += [(header + row, row) for row in rows]
    seen = 0
    for row in re.findall(r"^\|(.*± .*|.*\[.*)\|$", README, re.MULTILINE):
        label, *cells = (cell.strip() for cell in row.split("|"))
        for cell in cells:
            if re.search(r"\d", cell):
                assert any(label in where and cell in line for where, line in lines), (label, cell)
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
