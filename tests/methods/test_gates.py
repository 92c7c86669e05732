"""Training gates: MeteoRA's two losses spelled out, in parts = at once, and gates that learn to
route."""

import csv
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.files import InputError
from common.template import TEMPLATE
from common.tokenizer import Tokenizer
from generate import load
from helpers_models import write_adapters
from helpers_training import (
    ANSWERS,
    assert_close,
    examples,
    meteora_gates_of,
    options,
    pool_in_model,
    run,
    run_folder,
    write_random_pool,
    write_tasks,
)
from methods.batch import set_methods
from methods.meteora import MeteoraRun
from model import load_llama
from moe_lora import Recorder, attach
from pool.adapters import linear_shapes, load_adapter
from pool.folder import read_pool
from pool.gate_files import load_gates
from pool.slots import Pool
from tasks.composites import compose
from tasks.folders import some_tasks
from training import gates as train_gates
from training.gates import GateTermTraining, gates_step


@pytest.mark.parametrize("k, composite", [(1, 0.0), (2, 0.0), (1, 0.7)])
def test_the_gate_term_is_beta_times_the_cross_entropy(k, composite, small_model, tmp_path):
    """Without it padding, micro-batches, the number of gates or what belongs to no task weigh in
    the loss that trains the gates."""
    model, pool, gates = pool_in_model(small_model, tmp_path, meteora_gates_of(k))
    how = SimpleNamespace(composite=composite, max_length=300, seed=0)
    picked = compose(examples(small_model, 5), Tokenizer(small_model), TEMPLATE, 0, how)
    o = SimpleNamespace(top_k=k, lm_weight=0.0, beta=7.0, micro_tokens=60, adapters_too="", seed=0)
    training = GateTermTraining(model, pool, gates, o)
    logged = gates_step(training, picked, 0)
    training.finish()
    assert logged.keys() == {"gate_loss", "right"}
    grads = {path: gate.weight.grad.clone() for path, gate in gates.items()}
    model.zero_grad()
    parts = [part for example in picked for part in example.parts]
    assert any(part.task == "" for part in parts) == (composite > 0)
    labels = torch.cat([torch.full((len(x.ids),), pool.slot(x.task) if x.task else -100) for x in parts])
    logits = {path: [] for path in gates}
    for path, gate in gates.items():

        def look(linear, args, path=path, gate=gate):
            logits[path].append(F.linear(args[0], gate.weight))

        model.get_submodule(path).register_forward_pre_hook(look)
    for example in picked:  # one at a time, no padding
        model(torch.tensor([example.ids]))
    logits = {path: torch.cat(parts) for path, parts in logits.items()}
    entropy = torch.stack([F.cross_entropy(y, labels) for y in logits.values()]).mean()
    (o.beta * entropy).backward()
    assert logged["gate_loss"] == pytest.approx(entropy.item(), rel=1e-5)
    right = torch.stack(
        [(y.argmax(-1) == labels)[labels >= 0].float().mean() for y in logits.values()]
    ).mean()
    assert logged["right"] == pytest.approx(float(right), abs=1e-6)
    assert_close(
        grads, {path: gate.weight.grad for path, gate in gates.items()}, 1e-4
    )  # beta 7 times float32


def test_gate_gradients_in_parts_equal_those_at_once(small_model, tmp_path):
    """Without it micro_tokens changes what the gates learn."""
    model, pool, gates = pool_in_model(small_model, tmp_path, meteora_gates_of(2))
    picked, found = examples(small_model, 4), []
    for micro_tokens in (40, 10_000):
        model.zero_grad()
        o = SimpleNamespace(
            top_k=2, lm_weight=1.0, beta=2.0, micro_tokens=micro_tokens, adapters_too="", seed=0
        )
        logged = gates_step(GateTermTraining(model, pool, gates, o), picked, 0)
        found.append((logged, {path: gate.weight.grad.clone() for path, gate in gates.items()}))
    (parts, part_grads), (whole, whole_grads) = found
    assert parts.keys() == {"lm_loss", "gate_loss", "right"}
    assert parts == pytest.approx(whole, rel=1e-5)
    assert_close(part_grads, whole_grads, 1e-4)  # of gradients around 1


def test_top1_gates_need_no_backward_through_the_network(small_model, tmp_path):
    """Without it top-1 training pays for a backward pass whose gradient is exactly zero, in time
    and in memory."""
    graph = {}
    for k in (1, 2):
        model, pool, gates = pool_in_model(small_model, tmp_path, meteora_gates_of(k))
        seen = []
        model.model.register_forward_hook(lambda module, args, hidden: seen.append(hidden.requires_grad))
        o = SimpleNamespace(top_k=k, lm_weight=1.0, beta=5.0, micro_tokens=10_000, adapters_too="", seed=0)
        logged = gates_step(GateTermTraining(model, pool, gates, o), examples(small_model, 2), 0)
        assert ("lm_loss" in logged) == (k > 1)  # nor is the head computed
        assert all(gate.weight.grad.abs().max() > 0 for gate in gates.values())
        graph[k] = any(seen)
    assert graph == {1: False, 2: True}


def test_gates_see_each_example_once_an_epoch(small_model, tmp_path, monkeypatch):
    """Without it some examples come again before others come at all: tasks take turns, and each has
    its own epochs."""
    seen = {name: [] for name in ANSWERS}

    def step(training, picked, *args):
        for example in picked:
            seen[example.task].append(tuple(example.ids))
        return gates_step(training, picked, *args)

    monkeypatch.setattr(train_gates, "gates_step", step)
    tasks = write_tasks(tmp_path / "six", count=6)
    o = options("top1", small_model, tmp_path / "out", steps=9, batch_size=4, tasks=str(tasks))
    run(o)
    for name, ids in seen.items():
        assert len(ids) == 18  # balanced
        for epoch in range(0, 18, 6):
            assert len(set(ids[epoch : epoch + 6])) == 6, (name, epoch)


@pytest.mark.parametrize("k", [1, 2])
def test_gates_learn_to_pick_the_own_adapter(k, small_model, trained):
    """Without it everything about gates may be consistent and nothing routed: on held-out prompts
    most tokens of most gates must go to their task's adapter, from where the prompts begin to
    differ."""
    o = MeteoraRun(
        model=trained.model,
        tasks=trained.tasks,
        pool=trained.pool,
        steps=40,
        batch_size=6,
        top_k=k,
        save_every=100,
    )
    run(o)
    rows = list(csv.DictReader((run_folder(o) / "log.csv").open()))
    assert float(rows[0]["gate_loss"]) == pytest.approx(math.log(2), rel=1e-5)  # two adapters, gates at zero
    assert float(rows[-1]["gate_loss"]) < 0.8 * math.log(2)
    model = load_llama(small_model)
    shapes = linear_shapes(model)
    adapters = [load_adapter(path, name, shapes) for name, path in read_pool(o.pool).adapters.items()]
    pool = Pool.of(adapters, shapes)
    file = Path(o.pool) / "gates" / f"meteora_top{k}.safetensors"
    attach(model, pool, load_gates(file, pool, model.fingerprint()))
    own, shared = (
        Counter(),
        len(Tokenizer(small_model).encode("[INST] ")),
    )  # tokens that no gate could tell apart
    for example in examples(small_model, 4, held_out=True):
        with Recorder(model, len(example.ids)) as seen:
            model(torch.tensor([example.ids]))
        weights = seen.read(len(example.ids))  # (m, n, e)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        picked = weights[:, shared:].argmax(-1) == pool.slot(example.task)
        own.update(picked=int(picked.sum()), all=picked.numel())
    assert own["picked"] > 0.75 * own["all"], own


def test_gates_refuse_a_k_larger_than_the_pool(small_model, tmp_path):
    """Without it top-3 of two adapters is a traceback, or silently top-2 under another name."""
    o = options("top2", small_model, tmp_path / "out")
    with pytest.raises(InputError, match="--top_k is 3, expected 1 to 2"):
        run(o, top_k=3)


def test_gates_of_a_share_of_the_tasks(small_model, tmp_path):
    """What they are compared with on tasks that come later must neither need those tasks nor choose
    their adapters."""
    o = options("top2", small_model, tmp_path / "out", steps=1)
    names = ("animals", "later", "plurals")  # of "later" there is no task folder
    write_random_pool(Path(o.pool), small_model, names)
    o.share, o.seed = 0.1, next(s for s in range(99) if some_tasks(names, 0.1, s) == ["animals", "plurals"])
    run(o)
    mole = load(small_model, o.pool)
    set_methods(mole, ["meteora_top2"])
    with Recorder(mole.model, 5) as seen, torch.no_grad():
        mole.model(torch.tensor([[1, 5, 7, 11, 13]]))
    used = seen.read(5)[..., [mole.pool.slot(name) for name in names]]  # (m, n, 3)
    assert (used[..., 1] == 0).all() and (used[..., [0, 2]] > 0).all()


def test_resume_notices_other_adapters(small_model, tmp_path):
    """Gates are bound to their adapters: 'finished already' after these were trained again would
    leave gates that no pool accepts, and half a run over each set would be bound to the second."""
    gates = options("top1", small_model, tmp_path / "out", steps=1)
    run(gates)
    write_adapters(Path(gates.pool) / "adapters", load_llama(small_model), reversed(ANSWERS))
    with pytest.raises(InputError, match="other options or data: adapter animals has changed"):
        run(gates, resume=True)
