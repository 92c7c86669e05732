"""torchrun train.py: several processes compute what one computes, and end well."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import processes
from helpers_commands import ENVIRONMENT, ROOT
from helpers_parallel import RUNS, torchrun, torchrun_line
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
@pytest.mark.parametrize("kind", [*RUNS, "use of drlora's adapters"])
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


DIFFERENT = {
    "lr": ("sys.argv += ['--lr=0.5']", "lr is 0.5, in process 0 0.01: start all with the same"),
    "data": (
        "load = folders.read_jsonl; folders.read_jsonl = lambda *a: load(*a)[1:]",
        "data of animals is '",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_different_options_or_data_are_refused(what, small_model, tmp_path):
    """Processes that train on other data, or at another rate, add up gradients of different models."""
    o = options("adapters", small_model, tmp_path / "out")
    change, says = DIFFERENT[what]
    script = tmp_path / "changed.py"
    script.write_text(
        "import os, sys, train\nfrom tasks import folders\n"
        f"if os.environ['RANK'] == '1':\n    {change}\ntrain.run_script(train.main)"
    )
    done = torchrun(2, script, *argv(o))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: process 1: {says}") and len(line) < 300
    assert done.returncode and not (run_folder(o) / "config.json").exists()


def test_another_checkpoint_is_refused(small_model, tmp_path):
    """A process that has no checkpoint, as its machine has another disk, would add the gradients of the
    first steps to those of the last."""
    o = options("adapters", small_model, tmp_path / "out", steps=90, save_every=2, micro_tokens=30)
    script = tmp_path / "changed.py"
    script.write_text(
        "import os, train\nfrom training import checkpoint\n"
        "if os.environ['RANK'] == '1':\n    checkpoint.Checkpoint.load = lambda *args: None\n"
        "train.run_script(train.main)"
    )
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *argv(o)], env=ENVIRONMENT)
    while len(log_of(o)) < 4:  # the log is written before the checkpoint: so one of step 2 is there
        time.sleep(0.001)
    process.kill()
    process.wait()
    done = torchrun(2, script, *argv(replace(o, resume=True)))
    assert "error: process 1: the step of the checkpoint is 0, in process 0 " in done.stderr


def test_eval_is_for_one_process(tmp_path):
    """Several that answer the same and write the same files would be a race."""
    args = ["--methods=base", "--only=german", "--limit=1", f"--out={tmp_path}"]
    done = torchrun(2, ROOT / "eval.py", *args)
    assert done.stderr.count("is at work here") == 1


def test_what_runs_in_one_process_says_so(small_model, tmp_path):
    """The same of what isn't trained by gradient steps."""
    o = options("lorahub", small_model, tmp_path / "out")
    done = torchrun(2, ROOT / "train.py", *argv(o))
    assert done.stderr.count("error: train.py lorahub runs in one process: leave out torchrun") == 1


def test_shares_are_even(monkeypatch):
    """With one process's share twice another's, two processes are no faster than one and a half."""
    rng = random.Random(0)
    examples = [Example(list(range(rng.randint(5, 97))), 1, "a") for _ in range(41)]
    shares = []
    for number in range(3):
        monkeypatch.setattr(processes, "_place", {"rank": number, "count": 3})
        shares.append(share_of(examples))
    assert sorted(map(id, sum(shares, []))) == sorted(map(id, examples))
    tokens = [sum(len(example.ids) for example in share) for share in shares]
    assert max(tokens) - min(tokens) < 20
