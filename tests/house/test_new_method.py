"""A method is a file and a line: added to a copy of the repository, every command knows it."""

import json
import subprocess
import sys

import pytest

from helpers_commands import ENVIRONMENT, ROOT

FILE = '''"""The adapters whose A x is longest, weighed alike, but for a bias that may be trained."""

import torch
from torch import nn

from methods.protocol import TrainedGates, member_mask
from moe_lora import Mixture


class LoudGate(nn.Module):
    def __init__(self, bias, k, known):
        super().__init__()
        self.weight, self.k, self.known = nn.Parameter(bias), k, known

    def forward(self, x, sample, ax):
        score = ax().float().norm(dim=-1) + self.weight  # (n, e)
        top, idx = score.masked_fill(~self.known, float("-inf")).topk(self.k)
        return Mixture(idx, top.softmax(-1))


class Loudest(TrainedGates):
    """The k adapters whose A x is longest."""

    pattern = "loudest"
    names = ("loudest",)
    about = "the adapters whose A x is longest"
    made_by = "train.py gates --kind loudest"
    kind = "loudest"

    @staticmethod
    def new_gates(pool, k, temperature=1.0, known=None):
        known = member_mask(pool) if known is None else known
        return {path: LoudGate(torch.zeros(pool.capacity), min(k, 2), known) for path in pool.A}
'''


@pytest.mark.slow
def test_a_new_method_is_a_file_and_a_line(tmp_path):
    """Without it the ninth method takes eight edits again, and one of them is forgotten."""
    assert len(FILE.splitlines()) <= 40
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "methods" / "loudest.py").write_text(FILE)
    table = tmp_path / "methods" / "__init__.py"
    text = table.read_text()
    for line in ("    logo,\n", "    logo.LoGo,\n"):  # what is imported, and the table
        text = text.replace(line, line + line.replace("logo", "loudest").replace("LoGo", "Loudest"))
    table.write_text(text)

    def run(*args):
        line = [sys.executable, *map(str, args)]
        environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "tasks.tiny", "--out", "tasks28", "--train", 20, "--test", 5, "--documents", 3)
    asked = ["--kind", "loudest", "--steps", 2, "--batch_size", 28, "--tasks", "tasks28", "--model", "tiny"]
    run("train.py", "gates", *asked, "--pool", "tiny")
    prompt = ["--prompt", "Reverse the word: star"]
    assert run("generate.py", "--method", "loudest", "--max_new_tokens", 3, *prompt)
    some = ["--methods", "oracle,loudest", "--only", "german", "--only", "roman"]
    some += ["--limit", 2, "--max_new_tokens", 9]
    run("eval.py", *some, "--composite", 2, "--composites", 2, "--out", "one")
    run("eval.py", *some, "--ood", "--out", "two")
    for name in ("one", "two"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert list(results["methods"]) == ["oracle", "loudest"]
    assert "loudest" in json.loads((tmp_path / "one" / "results.json").read_text())["composite"]["2"]
    assert (tmp_path / "one" / "composite-2-loudest.svg").exists()
