"""DR-LoRA: what grows, by how much, and that nothing else changes when it does."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import methods.drlora as drlora
from common.files import InputError
from common.template import TEMPLATE
from common.tensors import read_safetensors
from common.tokenizer import Tokenizer
from generate import load
from helpers_methods import close
from helpers_oracles import peft_logits
from helpers_training import (
    ANSWERS,
    argv,
    assert_same,
    contents,
    killed_at_write,
    main,
    run,
    run_folder,
    write_random_pool,
    write_tasks,
)
from methods.batch import default_method, set_methods
from methods.drlora import DRLoRARun, DRLoRATraining, growth_steps, share_out
from pool.adapters import load_adapter
from pool.load import load_base
from tasks.folders import load_tasks, tokenize
from training.adapters import new_pool

IDS = torch.randint(3, 331, (1, 13), generator=torch.Generator().manual_seed(5))


def options(model, out, **more):
    """A small run with five growths, in which two adapters share 1, 1, 1, 1 and 2 ranks."""
    tasks = write_tasks(Path(out).parent / "tasks")
    shared = {"model": str(model), "tasks": str(tasks), "pool": str(out), "batch_size": 4, "lr": 2e-2}
    shared |= {"steps": 12, "warmup": 0.1, "grow_every": 2, "cooldown": 0.0, "save_every": 3, "dropout": 0.25}
    return DRLoRARun(**shared | {"r": 2, "target_r": 5, "max_r": 11, "alpha": 7.0} | more)


def new_training(model, tmp_path, **more):
    """A DRLoRATraining without dropout whose B is random up to its ranks."""
    args = options(model, tmp_path / "out", **{"dropout": 0.0} | more)
    tasks = load_tasks(args.tasks)
    llama = load_base(model)
    examples = tokenize(tasks, Tokenizer(model), llama.config.vocab_size, TEMPLATE, 97)
    pool = new_pool(llama, list(tasks.values()), replace(args, r=args.max_r))
    training = DRLoRATraining(llama, pool, examples, args)
    generator = torch.Generator().manual_seed(3)
    for stack in (*pool.A.values(), *pool.B.values()):
        stack.requires_grad_(True)
    for gate in training.gates.values():
        gate.weight.data = torch.randn(gate.weight.shape, generator=generator) * 0.2
    for B in pool.B.values():
        B.data[..., : args.r] = torch.randn(B[..., : args.r].shape, generator=generator) * 0.1
    return training


def backward(training, step):
    """The losses of a step, with the gradients of that step alone."""
    for stack in (*training.pool.A.values(), *training.pool.B.values()):
        stack.grad = None
    return training.step(step)


# How much grows -----------------------------------------------------------------------------------


def by_hand(scores, ranks, budget, max_r):
    """One rank at a time, in float64: whose turn it is takes until a tenth of its room is gone."""
    ranks = list(ranks)
    while budget > 0:
        room = [max_r - rank for rank in ranks]
        waiting = sorted(zip(scores, range(len(ranks)), strict=True), key=lambda pair: (-pair[0], pair[1]))
        for _, j in waiting:
            taken = 0
            while budget > 0 and ranks[j] < max_r and (taken == 0 or taken + 1 <= room[j] / 10):
                ranks[j] += 1
                taken += 1
                budget -= 1
    return ranks


def test_shares_are_those_of_a_loop_of_single_ranks():
    """Without it an adapter could take more than a tenth, the worst could come first, or one that is
    full could hold up the others."""
    generator = torch.Generator().manual_seed(0)
    for e, max_r in itertools.product((1, 2, 5, 7), (3, 13, 61)):
        for _ in range(20):
            scores = torch.rand(e, generator=generator, dtype=torch.float64).tolist()
            ranks = torch.randint(1, max_r + 1, (e,), generator=generator).tolist()
            room = e * max_r - sum(ranks)
            budget = int(torch.randint(0, room + 1, (), generator=generator))
            assert share_out(scores, ranks, budget, max_r) == by_hand(scores, ranks, budget, max_r)
    assert share_out([1.0, 3.0, 2.0], [1, 1, 1], 4, 31) == [1, 4, 2]


@pytest.mark.parametrize(
    ("r", "target", "max_r"), [(2, 5, 7), (3, 11, 13), (1, 29, 97), (5, 7, 7), (3, 3, 5)]
)
@pytest.mark.parametrize("events", [1, 3, 11, 29])
def test_the_budget_is_met_exactly(r, target, max_r, events):
    """Without it the last rank of a rounding is lost, and two runs that are compared have other sizes."""
    generator = torch.Generator().manual_seed(events)
    for e in (1, 2, 7):
        args = SimpleNamespace(r=r, target_r=target, max_r=max_r)
        self = SimpleNamespace(args=args, ranks=torch.full((2, e), r))
        self.pool = SimpleNamespace(capacity=e, B={path: torch.zeros(e, 3, max_r) for path in "pq"})
        for B in self.pool.B.values():
            B.grad = torch.zeros_like(B)
        shares = []
        for event in range(events):
            self.f, self.g = torch.rand(2, 2, e, generator=generator)
            before = self.ranks.clone()
            DRLoRATraining.grow(self, event, events)
            grew = self.ranks > before
            assert (self.ranks >= before).all() and (self.g[grew] == 0).all() and (self.g[~grew] > 0).all()
            shares.append((self.ranks - before).sum(1).tolist())
        assert self.ranks.sum(1).tolist() == [e * target] * 2 and self.ranks.max() <= max_r
        assert max(map(max, shares)) - min(map(min, shares)) <= 1  # the rounding is shared out


def test_when_ranks_grow():
    """Without it a growth could fall into the warm-up, where g is noise, or so late that nothing learns
    to use it."""
    args = DRLoRARun("m", steps=100, warmup=0.1, cooldown=0.25, grow_every=20)
    assert list(growth_steps(args)) == [29, 49, 69]
    assert list(growth_steps(replace(args, grow_every=65))) == [74]
    assert not growth_steps(replace(args, grow_every=66))


# What a growth leaves as it is --------------------------------------------------------------------


def test_f_g_and_ranks_are_those_of_loops_in_float64(small_model, tmp_path):
    """Without it ranks go to adapters by another Linear's use, by one micro-batch of several, or by the
    gradient of what is not active yet."""
    training = new_training(small_model, tmp_path, micro_tokens=10**6, top_k=1)
    pool = training.pool
    m = len(pool.A)
    f, g = torch.zeros(2, m, 2, dtype=torch.float64)
    ranks = [[2, 2] for _ in range(m)]
    for step in range(4):
        backward(training, step)
        if step == 0:
            used = training.used.clone()
        for row, (path, gate) in enumerate(training.gates.items()):
            best = gate.logits.argmax(-1)  # top-1: all of the weight
            for j, r in enumerate(ranks[row]):
                A, dA = pool.A[path].detach()[j, :r].double(), pool.A[path].grad[j, :r].double()
                B, dB = pool.B[path].detach()[j, :, :r].double(), pool.B[path].grad[j, :, :r].double()
                f[row, j] = 0.9 * f[row, j] + 0.1 * float((best == j).double().mean())
                g[row, j] = 0.9 * g[row, j] + 0.1 * float((A * dA).abs().sum() + (B * dB).abs().sum())
            if step == 2:  # the first growth: of five, one of six ranks
                scores = [f[row, j] * g[row, j] / (ranks[row][j] + 1) ** 1.2 for j in range(2)]
                before, ranks[row] = ranks[row], by_hand(scores, ranks[row], 1, 11)
                g[row, [r > was for was, r in zip(before, ranks[row], strict=True)]] = 0
        training.after_backward(step)
        assert training.ranks.tolist() == ranks
        torch.testing.assert_close(training.f.double(), f, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(training.g.double(), g, rtol=1e-5, atol=1e-6)
    assert f.std() > 0.05 and g.min() > 0 and [2, 3] in ranks and [3, 2] in ranks
    (tmp_path / "parts").mkdir()
    parts = new_training(small_model, tmp_path / "parts", micro_tokens=20, top_k=1)
    parts.step(0)
    torch.testing.assert_close(parts.used, used, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.used.sum(1), torch.ones(m))


def test_a_growth_changes_neither_loss_nor_gradients(small_model, tmp_path):
    """Without it the loss jumps at each growth, and the step that follows goes by a gradient of another
    scale; new columns of B would wait for a step."""
    training = new_training(small_model, tmp_path)
    for step in range(2):
        backward(training, step)
        training.after_backward(step)
    before = backward(training, 2)
    (event,) = [step for step in growth_steps(training.args) if step == 2]
    training.after_backward(event)
    assert training.ranks.sum(1).tolist() == [5] * len(training.ranks)  # one of two grew
    A, B = training.pool.A, training.pool.B
    kept = {path: (A[path].grad, B[path].grad) for path in A}
    after = backward(training, 2)
    assert after["lm_loss"] == pytest.approx(before["lm_loss"], rel=1e-6)
    assert after["gate_loss"] == pytest.approx(before["gate_loss"], rel=1e-6)
    for row, path in enumerate(A):
        active = torch.arange(training.args.max_r) < training.ranks[row][:, None]  # (e, r)
        new = active & (torch.arange(training.args.max_r) >= training.args.r)
        assert close(kept[path][0], A[path].grad) and not A[path].grad[~active].any()
        assert close(kept[path][1], B[path].grad * active[:, None])
        assert kept[path][1].mT[new].any() and not kept[path][1].mT[~active].any()
        assert not B[path].mT[new].any()


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small_model, tmp_path_factory):
    """A run's options, and what it held at its end: its model, pool and ranks."""
    o = options(small_model, tmp_path_factory.mktemp("drlora") / "out", steps=24, grow_every=4)
    held = []
    with pytest.MonkeyPatch.context() as patch:
        made = lambda *args: held.append(DRLoRATraining(*args)) or held[0]  # noqa: E731
        patch.setattr(drlora, "DRLoRATraining", made)
        run(o)
    return o, held[0]


def test_what_is_saved_is_what_was_trained(finished):
    """Without it ranks, scales or rows of gates could be lost on the way to the files; and a run that
    learns nothing would pass all other tests."""
    o, training = finished
    ranks = {}
    for j, name in enumerate(sorted(ANSWERS)):
        adapter = load_adapter(Path(o.pool) / "adapters" / name)
        assert len(adapter.samples) == 11
        for path, row in zip(training.pool.A, training.ranks, strict=True):
            assert len(adapter.A[path]) == row[j]
            ranks.setdefault(path, []).append(len(adapter.A[path]))
    assert {sum(some) for some in ranks.values()} == {2 * o.target_r}
    assert len({tuple(some) for some in ranks.values()}) > 1 and max(map(max, ranks.values())) <= o.max_r
    for path, B in training.pool.B.items():
        for j in range(2):
            assert B[j, :, : ranks[path][j]].any(0).all() and not B[j, :, ranks[path][j] :].any()
    mole = load(o.model, o.pool)
    assert default_method(mole, 2)[0] == "drlora" and default_method(mole, 1, k_asked=True)[0] == "selection"
    set_methods(mole, ["drlora"])
    with torch.no_grad():
        assert close(mole.model(IDS), training.model.eval()(IDS))
    rows = list(csv.DictReader((run_folder(o) / "log.csv").open()))
    assert float(rows[-1]["lm_loss"]) < 0.5 * float(rows[0]["lm_loss"])


def test_peft_reads_mixed_ranks(finished):
    """Without it the adapters are worth something in this project alone: rank and scale differ from
    Linear to Linear."""
    o, _ = finished
    mole = load(o.model, o.pool)
    bare = peft_logits(o.model, IDS)
    for name in ANSWERS:
        set_methods(mole, [f"adapter:{name}"])
        want = peft_logits(o.model, IDS, Path(o.pool) / "adapters" / name)
        with torch.no_grad():
            assert close(mole.model(IDS), want, 1e-5)
        assert not close(want, bare, 1e-2)


SHORT = {"steps": 5, "grow_every": 1, "cooldown": 0.2, "save_every": 1, "warmup": 0.2}


@pytest.fixture(scope="module")
def whole(small_model, tmp_path_factory):
    """What a short run leaves that nothing interrupted."""
    o = options(small_model, tmp_path_factory.mktemp("whole") / "out", **SHORT)
    run(o)
    return contents(o)


# Files 1 to 11 are options, then log and checkpoint of each step; ranks grow in steps 2, 3 and 4.
MOMENTS = [(number, after) for number in range(1, 21) for after in (False, True)]
QUICK = [(6, True), (15, True)]  # just before a growth; between the files


@pytest.mark.parametrize(
    ("number", "after"),
    [*QUICK, *(pytest.param(*moment, marks=pytest.mark.slow) for moment in MOMENTS if moment not in QUICK)],
)
def test_killed_and_resumed_equals_uninterrupted(number, after, small_model, whole, tmp_path, monkeypatch):
    """Without it a resumed run has the ranks of its start under the weights of its end, or grows twice."""
    o = options(small_model, tmp_path / "out", **SHORT)
    assert killed_at_write(monkeypatch, o, number, after)
    run(o, resume=True)
    assert_same(o, whole)
    run(o, resume=True)  # finished already
    assert_same(o, whole)


def test_a_checkpoint_holds_what_ranks_depend_on(small_model, tmp_path, monkeypatch):
    """Without it a resumed run begins its averages anew, and ranks may grow elsewhere, long afterwards."""
    o = options(small_model, tmp_path / "out", **SHORT)
    assert killed_at_write(monkeypatch, o, 7, after=True)  # after two growths
    kept = read_safetensors(run_folder(o) / "checkpoint.safetensors")[0]
    assert kept["kept.f"].all() and kept["kept.ranks"].float().mean() == 4
    assert not kept["kept.g"].any()  # both have just grown


def test_a_pool_of_other_adapters_is_refused(small_model, tmp_path):
    """Without it gates and weights that are bound to these adapters are lost unseen."""
    pool = write_random_pool(tmp_path / "out", small_model)
    o = options(small_model, pool)
    before = contents(o)
    with pytest.raises(InputError, match=r"out: has adapter \w+, to which .*: name a new --pool$"):
        run(o)
    assert_same(o, before)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--target_r=1"], "--target_r is 1, expected --r 2 to --max_r 11"),
        (["--max_r=4"], "--target_r is 5, expected --r 2 to --max_r 4"),
        (["--grow_every=12"], "--grow_every is 12: no growth fits into --steps 12"),
        (["--top_k=3"], "--top_k is 3, expected 1 to 2, the tasks of"),
        (["--optimizer=muon"], "--optimizer muon is for"), (["--target=w_proj"], "--target w_proj"),
        (["--beta=nan"], "--beta is 'nan'"), (["--gate_lr=-1"], "--gate_lr is -1"),
        (["--cooldown=2"], "--cooldown is 2"), (["--max_r=0"], "--max_r is 0"), (["--pool="], "--pool is missing"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(args, words, small_model, tmp_path, monkeypatch):
    """A typo must end before the training, and name itself."""
    o = options(small_model, tmp_path / "out")
    with pytest.raises(InputError, match=words):
        main(monkeypatch, *argv(o), *args)
    assert not (tmp_path / "out").exists()
