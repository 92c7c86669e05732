"""torchrun train.py: several processes compute what one computes, and end well."""

import csv
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers_commands import ENVIRONMENT, ROOT
from helpers_parallel import KINDS, torchrun, torchrun_line
from helpers_training import argv, options, run_folder
from parallel.processes import share_of
from tasks.folders import Example

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def gradients(small_model, tmp_path_factory):
    """{number of processes: {kind: gradients of the first step}}."""
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for count in (1, 2, 4):
        done = torchrun(count, ROOT / "tests" / "helpers_parallel.py", small_model, folder)
        assert done.returncode == 0, done.stderr
        found[count] = torch.load(folder / f"{count}.pt")
    return found


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(kind, count, gradients):
    """A share that is weighed by its own tokens, a mask of dropout that depends on the batch, or an
    example in no share trains another model on two GPUs than on one."""
    want = gradients[1][kind]
    largest = max(float(gradient.abs().max()) for gradient in want)
    assert largest > 0
    for got, one in zip(gradients[count][kind], want, strict=True):
        assert float((got - one).abs().max()) <= 1e-5 * largest


def log_of(o):
    log = run_folder(o) / "log.csv"
    return list(csv.DictReader(log.open())) if log.exists() else []


def members(process):
    """{rank: process id} of torchrun's processes."""
    found = {}
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in listed.stdout.split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(line[5:]): int(pid) for line in environment if line.startswith(b"RANK=")}
    return found


def test_a_dead_process_ends_the_run_and_it_resumes(small_model, tmp_path):
    """Without it the others wait for hours for a process that was killed, or nobody knows which; and a
    checkpoint that belongs to its number of processes is lost with a machine."""
    more = {"steps": 14, "save_every": 2, "micro_tokens": 30}
    whole = options("adapters", small_model, tmp_path / "whole" / "out", **more)
    assert torchrun(1, ROOT / "train.py", *argv(whole)).returncode == 0
    o = options("adapters", small_model, tmp_path / "killed" / "out", **more)
    rng = random.Random(0)
    for moment, count in enumerate((2, 4, 2, 3, 2)):
        victim = rng.randrange(count)
        line = torchrun_line(count, ROOT / "train.py", *argv(replace(o, resume=True)))
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        while len(log_of(o)) < 2 * moment + 2 or victim not in members(process):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.kill(members(process)[victim], signal.SIGKILL)
        begin = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert process.returncode and time.monotonic() - begin < 60
        ours = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert ours == [f"error: process {victim} died"], stderr
    assert torchrun(1, ROOT / "train.py", *argv(replace(o, resume=True))).returncode == 0
    for got, want in zip(log_of(o), log_of(whole), strict=True):
        assert got["step"] == want["step"]
        assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-3)


def test_different_options_or_data_are_refused(small_model, tmp_path):
    """Processes that train on other data, or at another rate, add up gradients of different models."""
    o = options("adapters", small_model, tmp_path / "out")
    other = "import os, sys; sys.argv += ['--lr=0.5'] * (os.environ['RANK'] == '1');"
    script = tmp_path / "other_rate.py"
    script.write_text(f"{other} import train; train.run_script(train.main)")
    done = torchrun(2, script, *argv(o))
    assert "error: process 1: lr is 0.5, in process 0 0.01: start all with the same" in done.stderr
    assert done.returncode and not run_folder(o).exists()


def test_what_runs_in_one_process_says_so(small_model, tmp_path):
    """Several that write the same files would be a race."""
    o = options("lorahub", small_model, tmp_path / "out")
    done = torchrun(2, ROOT / "train.py", *argv(o))
    assert done.stderr.count("error: train.py lorahub runs in one process: leave out torchrun") == 1


def test_shares_are_even(monkeypatch):
    """With one process's share twice another's, two processes are no faster than one and a half."""
    rng = random.Random(0)
    examples = [Example(list(range(rng.randint(5, 97))), 1, "a") for _ in range(41)]
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        shares.append(share_of(examples))
    assert sorted(map(id, sum(shares, []))) == sorted(map(id, examples))
    tokens = [sum(len(example.ids) for example in share) for share in shares]
    assert max(tokens) - min(tokens) < 20
