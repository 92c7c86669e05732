"""Training: resumed = uninterrupted, together = alone, in parts = at once, PEFT and transformers read what we write."""

import csv
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_adapters, write_llama

import loop
import train
from adapters import TEMPLATE, Pool, PoolFolder, linear_shapes, load_adapter, read_pool, write_pool
from files import InputError, read_json, read_safetensors, write_json, write_jsonl
from model import load_llama
from moe_lora import GateLoss, MeteoraGate, Recorder, SampleGate, attach, detach, fixed_rows, load_gates
from tasks import collate, encode, load_tasks
from tokenizer import Tokenizer
from train import AdaptersRun, BaseRun, GatesRun

# Two tasks that a random base can learn: each always gives one answer, on words that the other never sees.
ANSWERS = {"animals": "the lazy dog", "plurals": "mouse"}
WORDS = {
    "animals": ["quick", "brown", "fox", "jumps", "over", "lazy"],
    "plurals": ["what", "is", "plural", "sort", "these", "words"],
}
KINDS = ("adapters", "top1", "top2", "base")
PAIRS = list(itertools.product(WORDS["animals"], WORDS["plurals"]))
TEXT = "\n".join(f"the {a} fox jumps over the {b} dog, {a} and {b}." for a, b in PAIRS)


def prompts(name, count, seed=0):
    rng = random.Random(f"{seed}/{name}")
    return [" ".join(rng.choices(WORDS[name], k=rng.randint(2, 7))) for _ in range(count)]


def write_tasks(folder, names=tuple(ANSWERS), count=11):
    """Task folders of `count` training examples and five held-out ones."""
    for name in names:
        rows = [{"prompt": p, "response": ANSWERS[name]} for p in prompts(name, count + 5)]
        write_json(folder / name / "task.json", {"metric": "exact_match"})
        write_jsonl(folder / name / "train.jsonl", rows[:count])
        write_jsonl(folder / name / "test.jsonl", rows[count:])
    return folder


def write_random_pool(folder, model, names=tuple(ANSWERS)):
    llama = load_llama(model)
    adapters = write_adapters(folder / "adapters", llama, names)
    write_pool(PoolFolder(folder, adapters, llama.fingerprint, TEMPLATE))
    return folder


def options(kind, model, out, **more):
    """A small run of each kind that writes into `out`; its tasks and text lie beside it."""
    out = Path(out)
    tasks = write_tasks(out.parent / "tasks")
    shared = {"model": str(model), "tasks": str(tasks), "pool": str(out), "steps": 5, "save_every": 2, "lr": 1e-2}
    if kind == "adapters":
        return AdaptersRun(**shared | {"batch_size": 2, "r": 3, "alpha": 5.0, "dropout": 0.25} | more)
    if kind == "base":
        (out.parent / "text.txt").write_text(TEXT)
        sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 307, "block_size": 13, "batch_size": 5, "compile": False}
        paths = {"model": str(out), "text": str(out.parent / "text.txt")}
        return BaseRun(**paths | sizes | {"steps": 5, "save_every": 2} | more)
    write_random_pool(out, model)
    return GatesRun(**shared | {"top_k": int(kind[-1]), "batch_size": 3} | more)


def run(o, **more):
    o = dataclasses.replace(o, **more)
    {AdaptersRun: train.train_adapters, GatesRun: train.train_gates, BaseRun: train.train_base}[type(o)](o)


def run_folder(o):
    if isinstance(o, GatesRun):
        return Path(o.pool) / "runs" / f"gates_top{o.top_k}"
    return Path(o.model) / "runs" / "base" if isinstance(o, BaseRun) else Path(o.pool) / "runs" / "adapters"


def contents(o):
    """{path: what is in it} of all that a run left, but the options (which name the folder itself)."""
    home = Path(o.model if isinstance(o, BaseRun) else o.pool)
    files = [f for f in sorted(home.rglob("*")) if f.is_file() and f != run_folder(o) / "config.json"]
    return {str(f.relative_to(home)): file_contents(f) for f in files}


def file_contents(file):
    """Bytes; of safetensors every tensor's bytes and the metadata, which the library writes in any order."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    tensors, metadata = read_safetensors(file)
    raw = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return metadata | {name: (t.dtype, tuple(t.shape), raw[name]) for name, t in tensors.items()}


def assert_same(o, expected):
    found = contents(o)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def argv(o):
    """The command line of a run."""
    args = [{AdaptersRun: "adapters", GatesRun: "gates", BaseRun: "base"}[type(o)]]
    for name, value in dataclasses.asdict(o).items():
        if isinstance(value, bool):
            args.append(f"--{name}" if value else f"--no-{name}")
        else:
            args += [f"--{name}={v}" for v in (value if isinstance(value, list) else [value])]
    return args


def main(monkeypatch, *args):
    """train.py's main() in this process: InputError is what the command would print as one line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    train.main()


def tensors_of(folder, name):
    return read_safetensors(Path(folder) / "adapters" / name / "adapter_model.safetensors")[0]


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


# Resume -------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def killed_at_write(monkeypatch, o, number, after):
    """Runs until the `number`-th file is put in its place, and ends just before or `after` that; was it reached?"""
    count, replace = 0, os.replace

    def dying_replace(source, target):
        nonlocal count
        count += 1
        if count == number and not after:
            raise Killed
        replace(source, target)
        if count == number:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        try:
            run(o)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_dying_at_any_write_and_resuming_changes_no_byte(kind, small_model, tmp_path, monkeypatch):
    """Without it a death between two files (checkpoint and log, tokenizer and its config, finished and the checkpoint's
    removal) loses log rows, files or bits, at moments too rare for random kills to find."""
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
    """Starts train.py with --resume, SIGKILLs it as soon as ready(), returns its exit status (-9: killed)."""
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


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_equals_uninterrupted(kind, small_model, tmp_path):
    """Without it a killed run goes on with other dropout, other data or lost moments, and nobody notices."""
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
    """As above, over the whole run: before the first checkpoint, within steps, between files, after the end."""
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


def test_a_finished_run_says_so(small_model, tmp_path, monkeypatch, capsys):
    """Without it a recipe that is run twice trains everything again, or fails where there is nothing to do."""
    o = options("adapters", small_model, tmp_path / "out")
    run(o)
    before = contents(o)
    main(monkeypatch, *argv(dataclasses.replace(o, resume=True)))
    assert "finished already" in capsys.readouterr().err
    assert_same(o, before)
    assert read_json(run_folder(o) / "config.json")["finished"] is True
    assert not (run_folder(o) / "checkpoint.safetensors").exists()


def test_training_again_starts_again(small_model, tmp_path, monkeypatch):
    """Without it a run that died as it cleaned up leaves a checkpoint, and training again with other options takes it
    for its own: it trains nothing and claims the new options."""
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
    """Without it a run of one task, resumed beside a second folder, gives both adapters the first one's weights (a
    tensor of one row is broadcast), or ends in a traceback."""
    o = options("adapters", small_model, tmp_path / "out", tasks=str(write_tasks(tmp_path / "one", ("animals",))))
    assert killed_at_write(monkeypatch, o, 3, after=True)
    write_tasks(tmp_path / "one", ("plurals",))
    with pytest.raises(InputError, match="plurals"):
        run(o, resume=True)


def test_resume_notices_other_adapters(small_model, tmp_path):
    """Gates are bound to their adapters: 'finished already' after these were trained again would leave gates that
    no pool accepts, and half a run over each set would be bound to the second."""
    gates = options("top1", small_model, tmp_path / "out", steps=1)
    run(gates)
    write_adapters(Path(gates.pool) / "adapters", load_llama(small_model), reversed(ANSWERS))
    with pytest.raises(InputError, match="names was"):
        run(gates, resume=True)


def test_what_others_made_is_not_overwritten(small_model, tmp_path):
    """A model folder or a folder of PEFT adapters given by mistake must not be replaced, nor its adapters left out."""
    base = options("base", small_model, tmp_path / "a" / "out", steps=1)
    shutil.copytree(small_model, base.model)
    with pytest.raises(InputError, match="a model that this command didn't make"):
        run(base)
    assert (Path(base.model) / "model.safetensors").read_bytes() == (small_model / "model.safetensors").read_bytes()
    adapters = options("adapters", small_model, tmp_path / "b" / "out", steps=1)
    write_adapters(adapters.pool, load_llama(small_model), ["elm"])
    with pytest.raises(InputError, match=r"no pool\.json"):
        run(adapters)


def test_a_tokenizer_of_another_model_is_refused(small_model, tmp_path):
    """Ids beyond the embedding end in an IndexError from inside torch, or on a GPU in a dead process."""
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


# Adapters -----------------------------------------------------------------------------------------------------------


def test_adapters_trained_together_equal_each_alone(small_model, tmp_path):
    """Without it an adapter's quality depends on which others were trained in the same run: a shared norm, shared
    averages, another's examples."""
    more = {"steps": 6, "lr": 1e-4, "dropout": 0.0, "clip": 0.5, "batch_size": 3}
    together = options("adapters", small_model, tmp_path / "together" / "out", **more)
    run(together)
    for name in ANSWERS:
        alone = options("adapters", small_model, tmp_path / name / "out", only=[name], **more)
        run(alone)
        assert read_pool(alone.pool).adapters.keys() == {name}
        expected = tensors_of(alone.pool, name)
        assert max(t.abs().max() for k, t in expected.items() if "lora_B" in k) > 3e-4  # far over the tolerance
        assert_close(tensors_of(together.pool, name), expected)


def test_adapters_gradients_in_parts_equal_those_at_once(small_model, tmp_path):
    """Without it micro_tokens, which is about memory, changes what is learned: sums of means weigh parts by count."""
    more = {"steps": 4, "lr": 1e-4, "dropout": 0.0, "batch_size": 5}
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
    """Without it the loss could be right in the log and wrong in what is trained: here it is spelled out."""
    model, pool, gate = pool_in_model(small_model, tmp_path)
    for stack in (*pool.A.values(), *pool.B.values()):
        stack.requires_grad_(True)
    picked = examples(small_model, 3)
    o = SimpleNamespace(micro_tokens=45)
    logged = train.adapters_step(model, pool, gate, picked, o)
    grads = {path: stack.grad.clone() for path, stack in pool.B.items()}
    for stack in pool.B.values():
        stack.grad = None
    losses = {name: [] for name in ANSWERS}
    for example in picked:  # one at a time, no padding
        gate.set(*fixed_rows(pool, [{example.task: 1.0}]))
        logits = model(torch.tensor([example.ids]))[0]
        target = torch.tensor(example.ids[example.n_prompt :])
        losses[example.task].append(F.cross_entropy(logits[example.n_prompt - 1 : -1], target, reduction="none"))
    means = [torch.cat(values).mean() for values in losses.values()]
    sum(means).backward()
    assert logged["loss"] == pytest.approx(sum(means).item() / len(means), rel=1e-5)
    assert_close(grads, {path: stack.grad for path, stack in pool.B.items()})


def pool_in_model(small_model, tmp_path, gates=None):
    """A model with two random adapters behind a SampleGate or the given gates (a function of the pool)."""
    model = load_llama(small_model)
    shapes = linear_shapes(model)
    folders = write_adapters(tmp_path / "random", model, tuple(ANSWERS))
    pool = Pool.of([load_adapter(f, name, shapes) for name, f in folders.items()], shapes)
    gate = gates(pool) if gates else SampleGate()
    attach(model, pool, gate)
    return model, pool, gate


def one_adapter(pool, name):
    """A gate that sends a batch of one to the adapter `name`."""
    gate = SampleGate()
    gate.set(*fixed_rows(pool, [{name: 1.0}]))
    return gate


def examples(model, count, held_out=False):
    tokenizer = Tokenizer(model)
    rows = [(n, {"prompt": p, "response": ANSWERS[n]}) for n in ANSWERS for p in prompts(n, count, seed=int(held_out))]
    return [encode(tokenizer, TEMPLATE, row, name) for name, row in rows]


@pytest.fixture(scope="module")
def trained(small_model, tmp_path_factory):
    """A pool of two adapters that learned their tasks, with the run's options."""
    o = options("adapters", small_model, tmp_path_factory.mktemp("trained") / "out", steps=40, r=5, dropout=0.1)
    run(o)
    return o


def test_each_adapter_learns_its_own_task(small_model, trained):
    """Without it all the equalities above could hold for a training that trains nothing, or the wrong slot."""
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
    """Without it training starts from a damaged base; and the start would depend on the order of the tasks."""
    model = load_llama(small_model)
    ids = torch.arange(1, 30).view(1, -1)
    expected, shapes = model(ids), linear_shapes(model)
    o = AdaptersRun(model=str(small_model), r=3)
    task = SimpleNamespace(name="animals", train=[{"prompt": "x"}] * 30)
    adapter = train.new_adapter(task, shapes, o)
    assert len(adapter.samples) == o.samples
    for path, (_, i) in shapes.items():
        bound = 1 / math.sqrt(i)
        assert 0.8 * bound < adapter.A[path].abs().max() <= bound and not adapter.B[path].any()
    again = train.new_adapter(task, shapes, o)
    assert adapter.hash == again.hash
    other = train.new_adapter(SimpleNamespace(name="plurals", train=task.train), shapes, o)
    assert all(not torch.equal(adapter.A[path], other.A[path]) for path in shapes)
    pool = Pool.of([adapter], shapes)
    attach(model, pool, one_adapter(pool, "animals"))
    assert torch.equal(model(ids), expected)


def test_peft_computes_what_our_adapters_compute(small_model, trained):
    """Without it a pool trained here means something else in PEFT or vLLM: another scale, swapped or dropped keys."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

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
    """Without it small updates are rounded away (bfloat16 has 8 bits), or the base is quietly trained in float32."""
    seen, real_fit, real_losses = {}, train.fit, train.lm_losses

    def fit(checkpoint, params, *rest):
        seen["params"] = {p.dtype for p in params.values()}
        return real_fit(checkpoint, params, *rest)

    def lm_losses(model, batch):
        seen["base"] = {p.dtype for p in model.parameters()}
        seen["frozen"] = not any(p.requires_grad for p in model.parameters())
        return real_losses(model, batch)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "lm_losses", lm_losses)
    o = options("adapters", small_model, tmp_path / "out", dtype="bfloat16", steps=3, dropout=0.1)
    run(o)
    assert seen == {"params": {torch.float32}, "base": {torch.bfloat16}, "frozen": True}
    for name in ANSWERS:
        for key, tensor in tensors_of(o.pool, name).items():
            assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float()), key


def test_save_dtype(small_model, tmp_path):
    """Without it the committed pool is twice its size, or a half-precision folder is not what was trained."""
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
    assert pool.template == TEMPLATE and pool.fingerprint == load_llama(small_model).fingerprint
    assert {f: f.read_bytes() for f in before} == before
    for name, path in pool.adapters.items():
        adapter = load_adapter(path, name)
        assert len(adapter.samples) == 4
        assert set(adapter.samples) <= {row["prompt"] for row in load_tasks(tasks)[name].train}


@pytest.mark.parametrize(
    "bad",
    [
        {"r": 0}, {"dropout": 1.0}, {"samples": -1}, {"template": "no place for it"}, {"target": ["q_porj"]},
        {"max_length": 3}, {"steps": 0}, {"lr": math.nan}, {"only": ["animal"]}, {"alpha": math.inf},
    ],
    ids=lambda bad: next(iter(bad)),
)  # fmt: skip
def test_bad_options_are_one_clear_line(bad, small_model, tmp_path, monkeypatch):
    """Without it a bad option is a traceback, or a long training whose pool nothing can read (a template without
    {prompt}): each must be an InputError that names the option or its value."""
    o = dataclasses.replace(options("adapters", small_model, tmp_path / "out", steps=1), **bad)
    ((name, value),) = bad.items()
    with pytest.raises(InputError) as refusal:
        main(monkeypatch, *argv(o))
    assert name in str(refusal.value) or str(value[0] if isinstance(value, list) else value) in str(refusal.value)


def test_a_loss_that_is_not_finite_stops_the_run(small_model, tmp_path):
    """Without it a run that blew up trains on to the end and saves NaN; and it must say so in a line of its own."""
    o = options("adapters", small_model, tmp_path / "out", lr=1e30)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *argv(o)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0] == done.stderr.splitlines()[-1]
    assert errors[0].startswith("error: step ") and "not finite" in errors[0] and "--lr" in errors[0]
    assert not (tmp_path / "out" / "pool.json").exists()


# Gates --------------------------------------------------------------------------------------------------------------


def random_gates(k):
    def make(pool):
        generator = torch.Generator().manual_seed(3)
        weights = {p: torch.randn(pool.capacity, A.shape[2], generator=generator) * 0.2 for p, A in pool.A.items()}
        return {p: MeteoraGate(G, k) for p, G in weights.items()}

    return make


@pytest.mark.parametrize("k", [1, 2])
def test_the_gate_term_is_beta_times_the_cross_entropy(k, small_model, tmp_path):
    """Without it padding, micro-batches or the number of gates weigh in the loss that trains the gates."""
    model, pool, gates = pool_in_model(small_model, tmp_path, random_gates(k))
    picked = examples(small_model, 3)
    o = SimpleNamespace(top_k=k, lm_weight=0.0, beta=7.0, micro_tokens=60)
    loss = GateLoss(gates)
    logged = train.gates_step(model, pool, loss, picked, o)
    loss.remove()
    assert logged.keys() == {"gate_loss", "right"}
    grads = {path: gate.weight.grad.clone() for path, gate in gates.items()}
    model.zero_grad()
    labels = torch.cat([torch.full((len(x.ids),), pool.slot(x.task)) for x in picked])
    logits = {path: [] for path in gates}
    for path, gate in gates.items():
        gate.register_forward_pre_hook(lambda g, args, path=path: logits[path].append(F.linear(args[0], g.weight)))
    for example in picked:  # one at a time, no padding
        model(torch.tensor([example.ids]))
    logits = {path: torch.cat(parts) for path, parts in logits.items()}
    entropy = torch.stack([F.cross_entropy(y, labels) for y in logits.values()]).mean()
    (o.beta * entropy).backward()
    assert logged["gate_loss"] == pytest.approx(entropy.item(), rel=1e-5)
    right = torch.stack([(y.argmax(-1) == labels).float().mean() for y in logits.values()]).mean()
    assert logged["right"] == pytest.approx(float(right), abs=1e-6)
    assert_close(grads, {path: gate.weight.grad for path, gate in gates.items()}, 1e-4)  # beta 7 times float32


def test_gate_gradients_in_parts_equal_those_at_once(small_model, tmp_path):
    """Without it micro_tokens changes what the gates learn."""
    model, pool, gates = pool_in_model(small_model, tmp_path, random_gates(2))
    picked, loss, found = examples(small_model, 4), GateLoss(gates), []
    for micro_tokens in (40, 10_000):
        model.zero_grad()
        o = SimpleNamespace(top_k=2, lm_weight=1.0, beta=2.0, micro_tokens=micro_tokens)
        logged = train.gates_step(model, pool, loss, picked, o)
        found.append((logged, {path: gate.weight.grad.clone() for path, gate in gates.items()}))
    (parts, part_grads), (whole, whole_grads) = found
    assert parts.keys() == {"lm_loss", "gate_loss", "right"}
    assert parts == pytest.approx(whole, rel=1e-5)
    assert_close(part_grads, whole_grads)


def test_top1_gates_need_no_backward_through_the_network(small_model, tmp_path):
    """Without it top-1 training pays for a backward pass whose gradient is exactly zero, in time and in memory."""
    graph = {}
    for k in (1, 2):
        model, pool, gates = pool_in_model(small_model, tmp_path, random_gates(k))
        seen = []
        model.model.register_forward_hook(lambda module, args, hidden: seen.append(hidden.requires_grad))
        o = SimpleNamespace(top_k=k, lm_weight=1.0, beta=5.0, micro_tokens=10_000)
        train.gates_step(model, pool, GateLoss(gates), examples(small_model, 2), o)
        assert all(gate.weight.grad.abs().max() > 0 for gate in gates.values())
        graph[k] = any(seen)
    assert graph == {1: False, 2: True}


def test_gates_see_each_example_once_an_epoch(small_model, tmp_path, monkeypatch):
    """Without it some examples come again before others come at all: tasks take turns, and each has its own epochs."""
    seen, real = {name: [] for name in ANSWERS}, train.gates_step

    def gates_step(model, pool, loss, picked, o):
        for example in picked:
            seen[example.task].append(tuple(example.ids))
        return real(model, pool, loss, picked, o)

    monkeypatch.setattr(train, "gates_step", gates_step)
    tasks = write_tasks(tmp_path / "six", count=6)
    o = options("top1", small_model, tmp_path / "out", steps=9, batch_size=4, tasks=str(tasks))
    run(o)
    for name, ids in seen.items():
        assert len(ids) == 18  # balanced
        for epoch in range(0, 18, 6):
            assert len(set(ids[epoch : epoch + 6])) == 6, (name, epoch)


@pytest.mark.parametrize("k", [1, 2])
def test_gates_learn_to_pick_the_own_adapter(k, small_model, trained):
    """Without it everything about gates may be consistent and nothing routed: on held-out prompts most tokens of most
    gates must go to their task's adapter, from where the prompts begin to differ."""
    o = GatesRun(
        model=trained.model, tasks=trained.tasks, pool=trained.pool, steps=40, batch_size=6, top_k=k, save_every=100
    )
    run(o)
    rows = list(csv.DictReader((run_folder(o) / "log.csv").open()))
    assert float(rows[0]["gate_loss"]) == pytest.approx(math.log(2), rel=1e-5)  # two adapters, gates at zero
    assert float(rows[-1]["gate_loss"]) < 0.8 * math.log(2)
    model = load_llama(small_model)
    shapes = linear_shapes(model)
    adapters = [load_adapter(path, name, shapes) for name, path in read_pool(o.pool).adapters.items()]
    pool = Pool.of(adapters, shapes)
    attach(model, pool, load_gates(Path(o.pool) / "gates" / f"meteora_top{k}.safetensors", pool))
    own, shared = Counter(), len(Tokenizer(small_model).encode("[INST] "))  # tokens that no gate could tell apart
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


# The loop -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("limit", [0.7, 0.0, 1e6])
def test_each_adapter_is_clipped_by_its_own_norm(limit):
    """Without it one adapter's spike shrinks the step of all the others."""
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.zeros(3, *shape, requires_grad=True) for shape in ((2, 7), (11, 2), (2, 5))]
    for stack in stacks:
        stack.grad = torch.randn(stack.shape, generator=generator) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    alone, norms = [], []
    for j in range(3):
        params = [torch.nn.Parameter(stack[j].detach()) for stack in stacks]
        for param, stack in zip(params, stacks, strict=True):
            param.grad = stack.grad[j].clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, limit or math.inf)))
        alone.append([param.grad for param in params])
    assert train.clip_each(stacks, limit) == pytest.approx(max(norms), rel=1e-6)
    for j in range(3):
        for stack, expected in zip(stacks, alone[j], strict=True):
            torch.testing.assert_close(stack.grad[j], expected, rtol=1e-5, atol=0)


# Base ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    o = options("base", None, tmp_path_factory.mktemp("base") / "out", steps=30, lr=1e-2, save_every=30)
    run(o)
    return o


def test_base_learns(base):
    """Without it a base that never moved from its random start would pass for trained."""
    rows = list(csv.DictReader((run_folder(base) / "log.csv").open()))
    assert float(rows[0]["loss"]) == pytest.approx(math.log(307), rel=0.02)  # random weights of 0.02: uniform
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])


def test_transformers_reads_our_base(base):
    """Without it the folder that `train.py base` writes is a Llama by our own reading alone."""
    from transformers import LlamaForCausalLM

    model, tokenizer = load_llama(base.model, torch.float32), Tokenizer(base.model)
    ids = tokenizer.encode("[INST] the lazy dog [/INST]\n2024")
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    pieces = [tokenizer.decode([i]).strip(" ") for i in ids]
    assert {"[INST]", "[/INST]", "\n"} <= set(pieces) and pieces[-4:] == ["2", "0", "2", "4"]
    theirs = LlamaForCausalLM.from_pretrained(base.model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(model(torch.tensor([ids])), expected, rtol=1e-5, atol=1e-5)
    assert theirs.config.eos_token_id == tokenizer.eos_id and theirs.config.bos_token_id == tokenizer.bos_id


def test_base_in_parts_equals_at_once(tmp_path):
    """Without it micro_tokens changes the base: the last, smaller part would weigh as much as a full one."""
    logs = []
    for micro_tokens in (26, 10_000):  # parts of 2, 2 and 1 windows of 13
        o = options("base", None, tmp_path / str(micro_tokens) / "out", micro_tokens=micro_tokens, steps=3)
        run(o)
        logs.append([[float(x) for x in row.values()] for row in csv.DictReader((run_folder(o) / "log.csv").open())])
    assert len(logs[0]) == 3
    for parts, whole in zip(*logs, strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)  # the log has six digits


def test_base_trained_again_has_the_tokenizer_that_was_asked_for(tmp_path):
    """Without it --vocab_size of a second run is ignored in silence: the first run's tokenizer stays."""
    o = options("base", None, tmp_path / "out", steps=1)
    run(o)
    run(o, vocab_size=311)
    assert len(Tokenizer(o.model)) == 311
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 311
