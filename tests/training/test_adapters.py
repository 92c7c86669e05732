"""Training adapters: together = alone, in parts = at once, and PEFT reads what we write."""

import csv
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.files import InputError
from common.template import TEMPLATE
from common.tokenizer import Tokenizer
from helpers_models import write_adapters, write_llama
from helpers_training import (
    ANSWERS,
    assert_close,
    examples,
    options,
    pool_in_model,
    run,
    run_folder,
    tensors_of,
    write_tasks,
)
from model import load_llama
from moe_lora import SampleGate, attach, detach, fixed_rows
from pool.adapters import linear_shapes, load_adapter
from pool.folder import read_pool
from pool.slots import Pool
from tasks.composites import compose
from tasks.folders import Batch, Example, PackedExample, collate, encode, load_tasks
from training import adapters as train_adapters
from training.adapters import AdaptersRun, adapters_step, clip_each, new_adapter


def test_adapters_trained_together_equal_each_alone(small_model, tmp_path):
    """Without it an adapter's quality depends on which others were trained in the same run: a
    shared norm, shared averages, another's examples, a mask of LoRA dropout that depends on the others."""
    more = {"steps": 6, "lr": 1e-4, "dropout": 0.25, "clip": 0.5, "batch_size": 3}
    together = options("adapters", small_model, tmp_path / "together" / "out", **more)
    run(together)
    for name in ANSWERS:
        alone = options("adapters", small_model, tmp_path / name / "out", only=[name], **more)
        run(alone)
        assert read_pool(alone.pool).adapters.keys() == {name}
        expected = tensors_of(alone.pool, name)
        largest = max(t.abs().max() for k, t in expected.items() if "lora_B" in k)
        assert largest > 3e-4  # far over the tolerance
        assert_close(tensors_of(together.pool, name), expected)


def test_adapters_gradients_in_parts_equal_those_at_once(small_model, tmp_path):
    """Without it micro_tokens, which is about memory, changes what is learned: sums of means weigh
    parts by count."""
    more = {"steps": 4, "lr": 1e-4, "dropout": 0.25, "batch_size": 5}
    whole = options("adapters", small_model, tmp_path / "whole" / "out", micro_tokens=10_000, **more)
    parts = options("adapters", small_model, tmp_path / "parts" / "out", micro_tokens=40, **more)
    run(whole)
    run(parts)
    for name in ANSWERS:
        assert_close(tensors_of(parts.pool, name), tensors_of(whole.pool, name))
    logs = [list(csv.DictReader((run_folder(o) / "log.csv").open())) for o in (whole, parts)]
    for a, b in zip(*logs, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)


def test_adapter_gradients_in_parts_are_the_gradient_of_the_mean(small_model, tmp_path):
    """Without it the loss could be right in the log and wrong in what is trained: here it is
    spelled out."""
    model, pool, gate = pool_in_model(small_model, tmp_path)
    model.double()
    for stack in (*pool.A.values(), *pool.B.values()):
        stack.requires_grad_(True)
    picked = examples(small_model, 3)
    o = SimpleNamespace(micro_tokens=45, late_start=0.0, seed=0)
    logged = adapters_step(model, pool, gate, picked, o, 0)
    grads = {path: stack.grad.clone() for path, stack in pool.B.items()}
    for stack in pool.B.values():
        stack.grad = None
    losses, gate = {name: [] for name in ANSWERS}, SampleGate()
    detach(model)
    attach(model, pool, gate)
    for example in picked:  # one at a time, by adapters that each row names
        gate.set(*fixed_rows(pool, [{example.task: 1.0}]))
        logits = model(torch.tensor([example.ids]))[0]
        target = torch.tensor(example.ids[example.n_prompt :])
        losses[example.task].append(
            F.cross_entropy(logits[example.n_prompt - 1 : -1], target, reduction="none")
        )
    means = [torch.cat(values).mean() for values in losses.values()]
    sum(means).backward()
    assert logged["loss"] == pytest.approx(sum(means).item() / len(means), rel=1e-5)
    assert_close(grads, {path: stack.grad for path, stack in pool.B.items()})


def test_a_late_adapter_starts_within_the_prompt(small_model, tmp_path, monkeypatch):
    """Without it `late` leaves out tokens of the answer, or none, or those of every example: the
    base alone computes a late example's first tokens and its adapter all from a random place in the
    prompt on."""
    model, pool, gate = pool_in_model(small_model, tmp_path)
    next(iter(pool.B.values())).requires_grad_(True)
    picked, seen = sorted(examples(small_model, 4), key=lambda x: len(x.ids)), {}
    model.model.register_forward_pre_hook(lambda *_: seen.update(weight=gate.weight))
    for late, drawn, start in ((0.4, 0.9, 0.75), (0.4, 0.61, 0.025), (0.4, 0.3, 0.0), (1.0, 0.999, 0.999)):
        monkeypatch.setattr(
            Batch, "random_of_parts", lambda batch, _, u=drawn: torch.full((len(batch.parts),), u)
        )
        o = SimpleNamespace(micro_tokens=10_000, late_start=late, seed=0)
        adapters_step(model, pool, gate, picked, o, 0)
        weights = seen["weight"].flatten().split([len(example.ids) for example in picked])
        for example, row in zip(picked, weights, strict=True):
            off = math.ceil(start * (example.n_prompt - 1) - 1e-4)
            assert off < example.n_prompt and row.tolist() == [0.0] * off + [1.0] * (len(row) - off)


def test_a_late_adapter_in_a_composite_starts_within_its_own_question(small_model, tmp_path, monkeypatch):
    """Counted from the composite's first token, the later questions would never be late."""
    model, pool, gate = pool_in_model(small_model, tmp_path)
    next(iter(pool.B.values())).requires_grad_(True)
    o, seen = SimpleNamespace(micro_tokens=10_000, late_start=0.4, composite=1.0, max_length=300, seed=0), {}
    contexts = [
        x
        for x in compose(examples(small_model, 5), Tokenizer(small_model), TEMPLATE, 0, o)
        if len(x.parts) > 1
    ]
    model.model.register_forward_pre_hook(lambda *_: seen.update(weight=gate.weight))
    late = lambda batch, _: torch.full((len(batch.parts),), 0.9)  # noqa: E731  by 3/4 of the question
    monkeypatch.setattr(Batch, "random_of_parts", late)
    for context in contexts:
        adapters_step(model, pool, gate, [context], o, 0)
        expected = []
        for part in context.parts:
            off = math.ceil(0.75 * (part.n_prompt - 1) - 1e-4) if part.n_prompt else 0
            off = len(part.ids) if not part.task else off
            expected += [0.0] * off + [1.0] * (len(part.ids) - off)
        assert seen["weight"].flatten().tolist() == expected


def test_in_a_composite_every_token_runs_through_its_own_adapter(small_model, tmp_path):
    """Without it an answer's first token, predicted behind another task's text, teaches or weighs
    as that one's; or the line that belongs to no task runs through the adapter in slot 0."""
    model, pool, gate = pool_in_model(small_model, tmp_path)
    model.double()
    for stack in pool.B.values():
        stack.requires_grad_(True)
    o = SimpleNamespace(micro_tokens=10_000, late_start=0.0, composite=0.7, max_length=300, seed=0)
    picked = compose(examples(small_model, 5), Tokenizer(small_model), TEMPLATE, 0, o)
    assert {type(x) for x in picked} == {PackedExample, Example}
    logged = adapters_step(model, pool, gate, picked, o, 0)
    grads = {path: stack.grad.clone() for path, stack in pool.B.items()}
    for stack in pool.B.values():
        stack.grad = None
    losses, gate = {name: [] for name in ANSWERS}, SampleGate()
    detach(model)
    attach(model, pool, gate)
    for example in picked:  # one at a time, token by token
        own = [(part.task, j >= part.n_prompt) for part in example.parts for j in range(len(part.ids))]
        idx = torch.tensor([[pool.slot(task) if task else 0] for task, _ in own])
        gate.set(idx, torch.tensor([[float(task != "")] for task, _ in own]), each_token=True)
        logits = model(torch.tensor([example.ids]))[0]
        for t, (task, is_answer) in enumerate(own):
            if is_answer:
                losses[task].append(F.cross_entropy(logits[t - 1], torch.tensor(example.ids[t])))
    means = [torch.stack(values).mean() for values in losses.values()]
    sum(means).backward()
    assert logged["loss"] == pytest.approx(sum(means).item() / len(means), rel=1e-5)
    assert_close(grads, {path: stack.grad for path, stack in pool.B.items()})


def test_a_joint_adapter_computes_composites_whole(small_model, tmp_path, monkeypatch):
    """One adapter on everything has no other that a token could belong to; and it must see as many
    examples."""
    seen = []

    def step(model, pool, gate, picked, *args):
        seen.append(picked)
        return adapters_step(model, pool, gate, picked, *args)

    monkeypatch.setattr(train_adapters, "adapters_step", step)
    run(
        options(
            "adapters", small_model, tmp_path / "out", joint="lora_b", composite=0.9, steps=2, batch_size=9
        )
    )
    for picked in seen:
        assert {part.task for example in picked for part in example.parts} == {"lora_b"}
        assert any(len(example.parts) > 1 for example in picked)
        answered = [part for example in picked for part in example.parts if part.n_prompt < len(part.ids)]
        assert len(answered) == 9 * len(ANSWERS)
        assert all(len(example.ids) <= 97 for example in picked)  # the context; --max_length is 512


def one_adapter(pool, name):
    """A gate that sends a batch of one to the adapter `name`."""
    gate = SampleGate()
    gate.set(*fixed_rows(pool, [{name: 1.0}]))
    return gate


def test_each_adapter_learns_its_own_task(small_model, trained):
    """Without it all the equalities above could hold for a training that trains nothing, or the
    wrong slot."""
    rows = list(csv.DictReader((run_folder(trained) / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert float(rows[-1]["loss"]) < 0.1 * float(rows[0]["loss"])
    model, tokenizer = load_llama(small_model), Tokenizer(small_model)
    shapes = linear_shapes(model)
    folder = read_pool(trained.pool)
    pool = Pool.of([load_adapter(path, name, shapes) for name, path in folder.adapters.items()], shapes)
    gate = SampleGate()
    attach(model, pool, gate)
    for name, task in load_tasks(trained.tasks).items():
        batch = collate([encode(tokenizer, folder.template, row, name) for row in task.test])
        (other,) = ANSWERS.keys() - {name}
        right = {}
        for choice in (name, other, None):
            gate.set(*fixed_rows(pool, [{choice: 1.0} if choice else {}] * len(task.test)))
            greedy = model(batch.ids)[:, :-1].argmax(-1) == batch.ids[:, 1:]
            right[choice] = float(greedy[batch.predicts[:, :-1]].float().mean())
        assert right[name] > 0.9, right
        assert right[name] > right[None] + 0.5 and right[name] > right[other] + 0.5, right


def test_a_new_adapter_changes_nothing(small_model, tmp_path):
    """Without it training starts from a damaged base; and the start would depend on the order of
    the tasks."""
    model = load_llama(small_model)
    ids = torch.arange(1, 30).view(1, -1)
    expected, shapes = model(ids), linear_shapes(model)
    o = AdaptersRun(model=str(small_model), r=3)
    task = SimpleNamespace(name="animals", train=[{"prompt": "x"}] * 30)
    adapter = new_adapter(task, shapes, o)
    assert len(adapter.samples) == o.samples
    for path, (_, i) in shapes.items():
        bound = 1 / math.sqrt(i)
        assert 0.8 * bound < adapter.A[path].abs().max() <= bound and not adapter.B[path].any()
    again = new_adapter(task, shapes, o)
    assert adapter.hash == again.hash
    other = new_adapter(SimpleNamespace(name="plurals", train=task.train), shapes, o)
    assert all(not torch.equal(adapter.A[path], other.A[path]) for path in shapes)
    pool = Pool.of([adapter], shapes)
    attach(model, pool, one_adapter(pool, "animals"))
    assert torch.equal(model(ids), expected)


def test_peft_computes_what_our_adapters_compute(small_model, trained):
    """Without it a pool trained here means something else in PEFT or vLLM: another scale, swapped
    or dropped keys."""
    from helpers_oracles import LlamaForCausalLM, PeftModel

    ids = torch.tensor([[1, 5, 300, 17, 260, 33, 8, 90]])
    model = load_llama(small_model)
    bare, shapes = model(ids), linear_shapes(model)
    for name, path in read_pool(trained.pool).adapters.items():
        pool = Pool.of([load_adapter(path, name, shapes)], shapes)
        attach(model, pool, one_adapter(pool, name))
        theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(small_model), path).eval()
        with torch.no_grad():
            expected = theirs(ids).logits
        assert (expected - bare).abs().max() > 0.1
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
        detach(model)


def test_a_bfloat16_base_trains_float32_adapters(small_model, tmp_path, monkeypatch):
    """Without it small updates are rounded away (bfloat16 has 8 bits), or the base is quietly
    trained in float32."""
    seen, real_fit, real_losses = {}, train_adapters.fit, train_adapters.lm_losses

    def fit(checkpoint, params, *rest):
        seen["params"] = {p.dtype for p in params.values()}
        return real_fit(checkpoint, params, *rest)

    def lm_losses(model, batch):
        seen["base"] = {p.dtype for p in model.parameters()}
        seen["frozen"] = not any(p.requires_grad for p in model.parameters())
        return real_losses(model, batch)

    monkeypatch.setattr(train_adapters, "fit", fit)
    monkeypatch.setattr(train_adapters, "lm_losses", lm_losses)
    o = options("adapters", small_model, tmp_path / "out", dtype="bfloat16", steps=3, dropout=0.1)
    run(o)
    assert seen == {"params": {torch.float32}, "base": {torch.bfloat16}, "frozen": True}
    for name in ANSWERS:
        for key, tensor in tensors_of(o.pool, name).items():
            assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float()), key


def test_save_dtype(small_model, tmp_path):
    """Without it the committed pool is twice its size, or a half-precision folder is not what was
    trained."""
    full = options("adapters", small_model, tmp_path / "full" / "out", steps=2)
    half = options("adapters", small_model, tmp_path / "half" / "out", steps=2, save_dtype="bfloat16")
    run(full)
    run(half)
    for name in ANSWERS:
        expected = {key: t.bfloat16() for key, t in tensors_of(full.pool, name).items()}
        assert_close(tensors_of(half.pool, name), expected, 0)


def test_adding_adapters_keeps_the_others(small_model, tmp_path):
    """Without it the second run's pool.json forgets the first adapters, or rewrites their files."""
    tasks = write_tasks(tmp_path / "tasks")
    first = options("adapters", small_model, tmp_path / "out", only=["plurals"], steps=2, samples=4)
    run(first)
    before = {f: f.read_bytes() for f in (tmp_path / "out" / "adapters").rglob("*") if f.is_file()}
    run(first, only=["animals"])
    pool = read_pool(tmp_path / "out")
    assert pool.adapters.keys() == ANSWERS.keys()
    assert pool.template == TEMPLATE and pool.fingerprint == load_llama(small_model).fingerprint()
    assert {f: f.read_bytes() for f in before} == before
    for name, path in pool.adapters.items():
        adapter = load_adapter(path, name)
        assert len(adapter.samples) == 4
        assert set(adapter.samples) <= {row["prompt"] for row in load_tasks(tasks)[name].train}


@pytest.mark.parametrize("limit", [0.7, 0.0, 1e6])
def test_each_adapter_is_clipped_by_its_own_norm(limit):
    """Without it one adapter's spike shrinks the step of all the others."""
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.zeros(3, *shape, requires_grad=True) for shape in ((2, 7), (11, 2), (2, 5))]
    for stack in stacks:
        sizes = torch.tensor([0.01, 1.0, 100.0])[:, None, None]
        stack.grad = torch.randn(stack.shape, generator=generator) * sizes
    alone, norms = [], []
    for j in range(3):
        params = [torch.nn.Parameter(stack[j].detach()) for stack in stacks]
        for param, stack in zip(params, stacks, strict=True):
            param.grad = stack.grad[j].clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, limit or math.inf)))
        alone.append([param.grad for param in params])
    assert clip_each(stacks, limit) == pytest.approx(max(norms), rel=1e-6)
    for j in range(3):
        for stack, expected in zip(stacks, alone[j], strict=True):
            torch.testing.assert_close(stack.grad[j], expected, rtol=1e-5, atol=0)


def test_a_folder_of_peft_adapters_is_not_overwritten(small_model, tmp_path):
    """Without it a folder of PEFT adapters given by mistake gets a pool.json that leaves them out."""
    o = options("adapters", small_model, tmp_path / "out", steps=1)
    write_adapters(o.pool, load_llama(small_model), ["elm"])
    with pytest.raises(InputError, match=r"outside of adapters/"):
        run(o)


def test_a_pool_of_another_base_or_template_is_refused(small_model, tmp_path):
    """Without it one pool.json speaks for adapters of two bases or two templates, and half of them
    answer nonsense."""
    o = options("adapters", small_model, tmp_path / "out", only=["plurals"], steps=1)
    run(o)
    with pytest.raises(InputError, match=r"template is .*INST.*, this run's 'Q: \{prompt\}'"):
        run(o, only=["animals"], template="Q: {prompt}")
    other = write_llama(tmp_path / "other", seed=1)
    shutil.copy(small_model / "tokenizer.model", other)
    with pytest.raises(InputError, match="pool.json: .*train.py adapters"):
        run(o, only=["animals"], model=str(other))
    assert read_pool(o.pool).adapters.keys() == {"plurals"}


def test_a_tokenizer_of_another_model_is_refused(small_model, tmp_path):
    """Ids beyond the embedding end in an IndexError from inside torch, or on a GPU in a dead
    process."""
    model = write_llama(tmp_path / "model", vocab_size=300)
    shutil.copy(small_model / "tokenizer.model", model)
    with pytest.raises(InputError, match="the model has 300: wrong tokenizer"):
        run(options("adapters", model, tmp_path / "out", steps=1))


def test_bad_input_leaves_no_run_behind(small_model, tmp_path):
    """Without it a typo makes an 'unfinished run', which refuses the corrected command."""
    o = options("adapters", small_model, tmp_path / "out", steps=1)
    with pytest.raises(InputError, match="q_porj"):
        run(o, target=["q_porj"])
    run(o)
    assert read_pool(o.pool).adapters.keys() == ANSWERS.keys()
