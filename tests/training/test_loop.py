"""The loop: a run that dies at any moment and resumes equals one that was never stopped; nothing is
overwritten."""

import dataclasses
import itertools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.files import InputError, read_json
from helpers_commands import ROOT, command
from helpers_training import (
    KINDS,
    Killed,
    argv,
    assert_same,
    contents,
    killed_at_write,
    main,
    options,
    run,
    run_folder,
    write_tasks,
)
from training import loop
from training import losses as lm

# Loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 41])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_losses_by_blocks_of_the_vocabulary(n, dtype, error, monkeypatch):
    """A block that forgets what earlier ones added, a target in the last, shorter block, or a
    gradient that is the difference of two rounded numbers, where a token is nearly certain: wrong,
    and hard to see in a loss curve."""
    monkeypatch.setattr(lm, "BLOCK", 13)
    g = torch.Generator().manual_seed(n)
    W, targets = torch.randn(3 * 13 + 5, 19, generator=g).to(dtype), torch.randint(44, (n,), generator=g)
    targets[-1] = 43
    hidden = torch.randn(n, 19, generator=g)
    hidden[::2] += W[targets[::2]].float()  # nearly certain of these
    hidden, cotangent = hidden.to(dtype), torch.randn(n, generator=g)
    x, want = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    losses = lm.BlockwiseCrossEntropy.apply(x, W, targets, F.linear)
    expected = F.cross_entropy(want @ W.double().T, targets, reduction="none")
    assert n == 1 or expected.min() < 1e-3 < 1 < expected.max()
    torch.testing.assert_close(losses.double(), expected, rtol=error, atol=error)  # of logits up to 30
    (losses * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    slopes = want.grad.norm(dim=1)
    assert ((x.grad.double() - want.grad).norm(dim=1) <= error * slopes + 1e-12).all()


# Resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["base", "top2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:2])]
)
def test_dying_at_any_write_and_resuming_changes_no_byte(kind, small_model, tmp_path, monkeypatch):
    """Without it a death between two files (checkpoint and log, tokenizer and its config, finished
    and the checkpoint's removal) loses log rows, files or bits, at moments too rare for random
    kills to find."""
    more = {"steps": 3, "batch_size": 1}
    whole = options(kind, small_model, tmp_path / "whole" / "out", **more)
    run(whole)
    expected, wrong = contents(whole), {}
    for number, after in itertools.product(range(1, 100), (False, True)):
        o = options(kind, small_model, tmp_path / f"{number}{after}" / "out", **more)
        if not killed_at_write(monkeypatch, o, number, after):
            break
        run(o, resume=True)
        found = contents(o)
        differ = {n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)}
        if differ:
            wrong["after" if after else "before", number] = sorted(differ)
    assert number > 6  # options twice, two checkpoints and logs at the least
    assert wrong == {}


def log_rows(o):
    log = run_folder(o) / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def kill_when(o, ready):
    """Starts train.py with --resume, SIGKILLs it as soon as ready(), returns its exit status (-9:
    killed)."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv(dataclasses.replace(o, resume=True))],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None and not ready():
            time.sleep(0.001)
    finally:
        process.kill()
    return process.wait()


@pytest.mark.parametrize(
    "kind", [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:])]
)
def test_killed_and_resumed_equals_uninterrupted(kind, small_model, tmp_path):
    """Without it a killed run goes on with other dropout, other data or lost moments, and nobody
    notices."""
    more = {"steps": 8, "save_every": 1}
    whole = options(kind, small_model, tmp_path / "whole" / "out", **more)
    run(whole)
    o = options(kind, small_model, tmp_path / "killed" / "out", **more)
    reached = random.Random(kind).randint(1, 5)
    moments = [(run_folder(o) / "config.json").exists, lambda: log_rows(o) >= reached]
    statuses = [kill_when(o, ready) for ready in moments]
    assert statuses[0] == -signal.SIGKILL  # before the first checkpoint
    assert set(statuses) <= {-signal.SIGKILL, 0}
    run(o, resume=True)
    assert_same(o, contents(whole))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:3])
def test_ten_random_kills_change_nothing(kind, small_model, tmp_path):
    """As above, over the whole run: before the first checkpoint, within steps, between files, after
    the end."""
    more = {"steps": 40, "save_every": 3}
    whole = options(kind, small_model, tmp_path / "whole" / "out", **more)
    run(whole)
    o = options(kind, small_model, tmp_path / "killed" / "out", **more)
    rng = random.Random(kind)
    moments = [-1, *sorted(rng.sample(range(39), 8))]
    for reached in moments:
        pause, since = rng.uniform(0, 0.1), None

        def ready():
            nonlocal since
            if since is None and (run_folder(o) / "config.json").exists() and log_rows(o) >= reached:
                since = time.monotonic()
            return reached < 0 or (since is not None and time.monotonic() - since > pause)

        assert kill_when(o, ready) in (-signal.SIGKILL, 0)
    run(o, resume=True)
    assert_same(o, contents(whole))
    assert kill_when(o, lambda: False) == 0  # finished: it says so and ends
    assert_same(o, contents(whole))


def test_other_options_are_refused_on_resume(small_model, tmp_path, monkeypatch):
    """Without it a resumed run mixes two settings, and its config.json tells of the last one alone."""
    o = options("adapters", small_model, tmp_path / "out")
    assert killed_at_write(monkeypatch, o, 3, after=True)
    with pytest.raises(InputError, match=r"config\.json.*other options.*alpha was 5\.0, now 6\.0") as refusal:
        run(o, resume=True, alpha=6.0, save_every=1)
    assert "save_every" not in str(refusal.value)  # how often to save may change


def test_an_unfinished_run_is_not_overwritten(small_model, tmp_path, monkeypatch):
    """Without it a forgotten --resume throws hours of training away."""
    o = options("adapters", small_model, tmp_path / "out")
    assert killed_at_write(monkeypatch, o, 3, after=True)
    before = contents(o)
    with pytest.raises(InputError, match="--resume"):
        run(o)
    assert_same(o, before)


def test_a_run_that_died_at_once_is_nothing_to_lose(small_model, tmp_path, monkeypatch):
    """A mistyped option that fails in the first step must not refuse the corrected command."""
    o = options("adapters", small_model, tmp_path / "out")
    with pytest.raises(InputError, match="the gradient is not finite"):
        run(o, lr=1e30, steps=9, save_every=9)
    assert not read_json(run_folder(o) / "config.json")["finished"]
    run(o)
    assert read_json(run_folder(o) / "config.json")["finished"]


def test_a_finished_run_says_so(small_model, tmp_path, monkeypatch, capsys):
    """Without it a recipe that is run twice trains everything again, or fails where there is
    nothing to do."""
    o = options("adapters", small_model, tmp_path / "out")
    run(o)
    before = contents(o)
    main(monkeypatch, *argv(dataclasses.replace(o, resume=True)))
    assert "finished already" in capsys.readouterr().err
    assert_same(o, before)
    assert read_json(run_folder(o) / "config.json")["finished"] is True
    assert not (run_folder(o) / "checkpoint.safetensors").exists()


def test_training_again_starts_again(small_model, tmp_path, monkeypatch):
    """Without it a run that died as it cleaned up leaves a checkpoint, and training again with
    other options takes it for its own: it trains nothing and claims the new options."""
    o = options("adapters", small_model, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(o)
    run(o, seed=1)
    fresh = options("adapters", small_model, tmp_path / "fresh" / "out", seed=1)
    run(fresh)
    assert_same(o, contents(fresh))


def test_resume_notices_other_tasks(small_model, tmp_path, monkeypatch):
    """Without it a run of one task, resumed beside a second folder, gives both adapters the first
    one's weights (a tensor of one row is broadcast), or ends in a traceback."""
    o = options(
        "adapters", small_model, tmp_path / "out", tasks=str(write_tasks(tmp_path / "one", ("animals",)))
    )
    assert killed_at_write(monkeypatch, o, 3, after=True)
    write_tasks(tmp_path / "one", ("plurals",))
    with pytest.raises(InputError, match="plurals"):
        run(o, resume=True)


# The loop -----------------------------------------------------------------------------------------


def test_learning_rate():
    """Without it the first step is at zero, the warmup jumps, or the end is not a tenth."""
    o = SimpleNamespace(lr=3.0, steps=200, warmup=0.05)
    rates = [loop.learning_rate(step, o) for step in range(o.steps + 1)]
    assert rates[:10] == pytest.approx([3.0 * (j + 1) / 10 for j in range(10)])
    assert rates[10] == pytest.approx(3.0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[105] == pytest.approx(3.0 * 0.55)  # halfway down the cosine
    assert rates[200] == pytest.approx(0.3)
    one = SimpleNamespace(lr=3.0, steps=1, warmup=0.0)
    assert loop.learning_rate(0, one) == 3.0


def test_a_loss_that_is_not_finite_stops_the_run(small_model, tmp_path):
    """Without it a run that blew up trains on to the end and saves NaN; and it must say so in a
    line of its own."""
    o = options("adapters", small_model, tmp_path / "out", lr=1e6)
    done = command("train.py", *argv(o))
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0] == done.stderr.splitlines()[-1]
    assert errors[0].startswith("error: step ") and "not finite" in errors[0] and "--lr" in errors[0]
    assert not (tmp_path / "out" / "pool.json").exists()


def test_rates_scale_each_parameters_own_step(tmp_path):
    """Without it adapters that are trained beside their gates move at the gates' learning rate, 70
    times their own."""
    o = loop.Run(model="", steps=1, lr=0.5, warmup=0.0, clip=0.0)
    params = {"gate": torch.zeros(3), "adapter": torch.zeros(3)}

    def step_loss(step):
        sum(param.sum() for param in params.values()).backward()
        return {}

    loop.fit(loop.Checkpoint(tmp_path / "run", o), params, o, step_loss, rates={"adapter": 0.25})
    torch.testing.assert_close(
        params["gate"], torch.full((3,), -0.5)
    )  # AdamW's first step is the learning rate
    torch.testing.assert_close(params["adapter"], torch.full((3,), -0.125))


def test_muon_moves_matrices_alike_in_all_directions(tmp_path):
    """Without it gates learn along their inputs' few loud directions alone, or an embedding, whose
    rows come and go, and the norms' vectors, which have no directions, fall to it too."""
    o = loop.Run(model="", steps=1, lr=0.5, warmup=0.0, clip=0.0, optimizer="muon")
    shapes = {"gate": (5, 7), "model.embed_tokens.weight": (11, 7), "lm_head.weight": (11, 7), "norm": (7,)}
    params = {name: torch.zeros(shape) for name, shape in shapes.items()}
    slope = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in shapes.items()
    }
    slope["gate"] *= torch.logspace(0, -2, 5)[:, None]  # a direction a hundred times louder than another

    def step_loss(step):
        sum((param * slope[name]).sum() for name, param in params.items()).backward()
        return {}

    loop.fit(loop.Checkpoint(tmp_path / "run", o), params, o, step_loss)
    u, _, v = torch.linalg.svd(slope["gate"], full_matrices=False)
    step = -(u.T @ params.pop("gate") @ v.T) / (0.5 * 0.2 * 7**0.5)  # in AdamW's units: 0.2 sqrt(longer side)
    # Five Newton-Schulz steps get so near to 1.
    assert step.diagonal().min() > 0.6 and step.diagonal().max() < 1.3
    assert (step - step.diagonal().diag()).abs().max() < 0.02
    for name, param in params.items():
        torch.testing.assert_close(param, -0.5 * slope[name].sign())  # AdamW's first step
