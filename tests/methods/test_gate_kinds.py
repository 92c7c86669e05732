"""Training what is compared: soft, LoRA-Flow, SMEAR, fitted gates, gates with their adapters, joint
LoRAs, LoraHub."""

import csv
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import InputError, read_json, write_json
from common.template import TEMPLATE
from common.tensors import read_safetensors
from common.tokenizer import Tokenizer
from decoding.loop import decode
from decoding.sampling import Sampling
from generate import load
from helpers_training import (
    ANSWERS,
    argv,
    examples,
    file_contents,
    main,
    of_kind,
    options,
    run,
    write_random_pool,
    write_tasks,
)
from helpers_training import prompts as make_prompts
from methods import lorahub as train_lorahub
from methods.batch import set_methods
from methods.lorahub import LorahubRun
from methods.meteora import MeteoraRun, logistic, whitening
from methods.mixtures import Soft
from methods.session import PromptMask
from methods.smear import SmearLinear, smear_routers
from model import load_llama
from moe_lora import attach, attached, detach, meteora_gates
from pool.adapters import linear_shapes, load_adapter
from pool.folder import read_pool
from pool.gate_files import load_gates, save_gates
from tasks.folders import draw, encode, load_tasks, pick, tokenize
from training import adapters as train_adapters
from training import gates as train_gates

KINDS = ("soft", "loraflow", "smear")


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def gates_run(trained, folder, **more):
    """Options of a run over a copy of the trained pool."""
    pool = shutil.copytree(
        trained.pool, folder / "pool", ignore=shutil.ignore_patterns("runs", "gates", "baselines")
    )
    shared = {
        "model": trained.model,
        "tasks": trained.tasks,
        "pool": str(pool),
        "batch_size": 4,
        "save_every": 2,
    }
    return of_kind(MeteoraRun(**shared | more), more.get("kind", "meteora"))


def log_of(pool, name):
    return list(csv.DictReader((Path(pool) / "runs" / name / "log.csv").open()))


def left(folder, but=("config.json",)):
    """{path: what is in it} of a folder, but the runs' options, which name the folder itself."""
    files = [f for f in sorted(Path(folder).rglob("*")) if f.is_file()]
    return {
        str(f.relative_to(folder)): file_contents(f)
        for f in files
        if f.name not in but or "runs" not in f.parts
    }


@torch.no_grad()
def merged(model, adapters, weights):
    """A Llama of its own with (sum of w s B)(sum of w A) added to W; `adapters` and `weights` in
    one order."""
    llama, rank = load_llama(model), max(a.rank for a in adapters)
    for path in linear_shapes(llama):
        A = sum(
            w * F.pad(a.A[path], (0, 0, 0, rank - a.rank)) for w, a in zip(weights, adapters, strict=True)
        )
        B = sum(
            w * a.scale[path] * F.pad(a.B[path], (0, rank - a.rank))
            for w, a in zip(weights, adapters, strict=True)
        )
        llama.get_submodule(path).weight += B @ A
    return llama


@torch.no_grad()
def losses(llama, example):
    """Cross-entropy of an example's response tokens, the example alone."""
    logits = llama(torch.tensor([example.ids]))[0, example.n_prompt - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(example.ids[example.n_prompt :]), reduction="none")


# Kinds that learn from the LM loss ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_learns_and_answers_as_it_was_trained(kind, trained, tmp_path, monkeypatch):
    """Without it a router may train and change nothing, or be saved and come back as another: rows
    by position, another k, the prompt's mask forgotten."""
    held, save = {}, train_gates.save_gates

    def keep(file, gates, pool, *others):
        held.update(gates=gates, pool=pool)
        save(file, gates, pool, *others)

    monkeypatch.setattr(train_gates, "save_gates", keep)
    o = gates_run(trained, tmp_path, kind=kind, steps=24, batch_size=6, lr=5e-2, save_every=100)
    run(o)
    rows = log_of(o.pool, f"gates_{kind}")
    assert list(rows[0]) == ["step", "lr", "norm", "lm_loss"]
    assert sum(float(row["lm_loss"]) for row in rows[-3:]) / 3 < 0.6 * float(rows[0]["lm_loss"])
    assert {f.name for f in (Path(o.pool) / "gates").iterdir()} == {f"{kind}.safetensors"}

    ids, n_prompt = torch.tensor([examples(o.model, 1)[0].ids]), 9
    mole, model = load(o.model, o.pool), load_llama(o.model)
    linears = attach(model, held["pool"], held["gates"], **{"make": SmearLinear} if kind == "smear" else {})
    set_methods(mole, [kind])
    for prompt in [mole.prompt] + ([next(iter(linears.values())).gate.prompt] if kind == "smear" else []):
        prompt.mask = (torch.arange(ids.shape[1]) < n_prompt)[None]
    with torch.no_grad():
        got, want = mole.model(ids), model(ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    set_methods(mole, ["uniform"])
    with torch.no_grad():
        assert (mole.model(ids) - want).abs().max() > 0.1  # it has left its start


def new_soft_gates(change):
    """Soft.new_gates, each gate changed by `change(gate)`."""

    def new_gates(pool, k, temperature=1.0, known=None):
        gates = meteora_gates(pool, pool.capacity, temperature, known)
        for gate in gates.values():
            change(gate)
        return gates

    return staticmethod(new_gates)


@pytest.mark.parametrize("shape", [(), (11, 3)])
def test_gates_without_a_row_for_each_adapter_are_refused(shape, trained, tmp_path, monkeypatch):
    """A gate file keeps a row for each adapter: another parameter would come back as zeros, or end a
    run with a traceback when all its steps are done."""

    def change(gate):
        gate.inner = torch.nn.Module()
        gate.inner.query = torch.nn.Parameter(torch.zeros(shape))

    monkeypatch.setattr(Soft, "new_gates", new_soft_gates(change))
    o = gates_run(trained, tmp_path, kind="soft", steps=1)
    with pytest.raises(InputError, match=rf"gate.inner.query is .*{re.escape(str(shape))}, expected a first"):
        run(o)
    assert not (Path(o.pool) / "gates").exists()


def test_gates_that_begin_at_random_are_the_seeds(trained, tmp_path, monkeypatch):
    """Without it --seed makes another gate at each run, and nobody can repeat a figure."""
    monkeypatch.setattr(Soft, "new_gates", new_soft_gates(lambda gate: torch.nn.init.normal_(gate.weight)))
    contents = []
    for number, seed in enumerate((7, 7, 11)):
        torch.manual_seed(number)  # what another library may have drawn before
        (tmp_path / str(number)).mkdir()
        o = gates_run(trained, tmp_path / str(number), kind="soft", steps=1, lr=0.0, seed=seed)
        run(o)
        contents.append(read_safetensors(Path(o.pool) / "gates" / "soft.safetensors")[0])
    first, again, other = contents
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key]) and not torch.equal(tensor, other[key])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_starts_as_the_mean(kind, trained, tmp_path):
    """The first loss says where training begins: uniform over the adapters (for SMEAR of A and of B
    apart), of the very response tokens, and with beta of no effect."""
    o = gates_run(trained, tmp_path, kind=kind, steps=1, beta=1e6)
    run(o)
    adapters = [load_adapter(path, name) for name, path in sorted(read_pool(o.pool).adapters.items())]
    llama = merged(o.model, adapters, [0.5, 0.5])
    if kind != "smear":  # the mean of the products
        llama = merged(o.model, adapters[:1], [math.sqrt(0.5)])
        for path in linear_shapes(llama):
            llama.get_submodule(path).weight += (
                0.5 * adapters[1].scale[path] * adapters[1].B[path] @ adapters[1].A[path]
            )
    tasks, tokenizer = load_tasks(o.tasks), Tokenizer(o.model)
    known = {n: [encode(tokenizer, TEMPLATE, row, n) for row in task.train] for n, task in tasks.items()}
    picked = pick(known, 0, o)
    assert sorted(example.task for example in picked) == ["animals"] * 2 + ["plurals"] * 2
    want = torch.cat([losses(llama, example) for example in picked]).mean().item()
    assert float(log_of(o.pool, f"gates_{kind}")[0]["lm_loss"]) == pytest.approx(want, rel=1e-4)


RESUMED = {
    **{kind: {"kind": kind} for kind in KINDS},
    "adapters_too": {"top_k": 1, "lr": 1e-2, "adapter_lr": 1e-3, "composite": 0.6},
    "lora_b": {"joint": "lora_b", "composite": 0.6},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_equals_uninterrupted(kind, small_model, tmp_path, monkeypatch):
    """Without it a killed run goes on with lost moments, another order or the adapters as they were
    at the start."""
    found = []
    for name in ("whole", "killed"):
        base = "adapters" if kind == "lora_b" else "top2"
        o = replace(options(base, small_model, tmp_path / name / "out"), **RESUMED[kind])
        o = of_kind(o, kind) if kind in KINDS else o
        if kind == "adapters_too":
            o = replace(o, adapters_too=str(tmp_path / name / "new"))
        if name == "killed":
            module, step = (
                (train_adapters, "adapters_step") if kind == "lora_b" else (train_gates, "gates_step")
            )
            real, calls = getattr(module, step), []

            def dies(*args, real=real, calls=calls):
                calls.append(1)
                if len(calls) == 4:  # after the checkpoint of step 2
                    raise Killed
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(module, step, dies)
                with pytest.raises(Killed):
                    run(o)
            o = replace(o, resume=True)
        run(o)
        found.append(left(tmp_path / name))
    whole, killed = found
    assert whole.keys() == killed.keys() and [name for name in whole if whole[name] != killed[name]] == []


# SMEAR --------------------------------------------------------------------------------------------

ASKED = ["the fox", "what is the plural of mouse", "x", "over the lazy dog jumps the quick"]


@pytest.fixture(scope="module")
def smearing(small_model, tmp_path_factory):
    """A pool of two random adapters with random SMEAR routers, far from uniform."""
    pool = write_random_pool(tmp_path_factory.mktemp("smear"), small_model)
    mole = load(small_model, pool)
    routers = smear_routers(mole.pool, PromptMask())
    for place, router in enumerate(routers.values()):
        router.weight.data = (
            torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(place)) * 0.7
        )
    save_gates(
        pool / "gates" / "smear.safetensors", routers, mole.pool, 2, mole.pool.names, mole.model.fingerprint()
    )
    return mole


def smear_answers(mole, prompts, count=9):
    """[[ids said], ...] and, after each step, every router's weights (m, b, e)."""
    set_methods(mole, ["smear"] * len(prompts))
    ids, said, weights = [mole.tokenizer.encode(p) for p in prompts], [[] for _ in prompts], []
    for token in decode(mole, ids, Sampling(count)):
        said[token.row].append(token.id)
        weights.append(torch.stack([linear.gate.p for linear in attached(mole.model).values()]))
    return said, weights


def test_smear_in_a_padded_batch_is_each_alone(smearing):
    """Padding in the mean of the prompt would merge another adapter for the short prompts of a
    batch."""
    together, weights = smear_answers(smearing, ASKED)
    for row, prompt in enumerate(ASKED):
        (alone,), own = smear_answers(smearing, [prompt])
        assert together[row] == alone
        torch.testing.assert_close(weights[0][:, row], own[0][:, 0], rtol=0, atol=1e-5)
    assert (weights[0][:, 0] - weights[0][:, 3]).abs().max() > 0.1  # prompts of their own


@torch.no_grad()
def test_smear_keeps_what_the_prompt_decided(smearing):
    """Decided again from each generated token, an answer would change its adapter in the middle,
    and its cache would be another adapter's; compared with the whole text at once, without a cache.
    """
    (said,), weights = smear_answers(smearing, [ASKED[1]])
    assert all(torch.equal(later, weights[0]) for later in weights) and len(weights) > 3
    ids = smearing.tokenizer.encode(ASKED[1])
    n, whole = len(ids), torch.tensor([ids + said])
    set_methods(smearing, ["smear"])
    smearing.prompt.mask = (torch.arange(whole.shape[1]) < n)[None]
    assert smearing.model(whole)[0, n - 1 : -1].argmax(-1).tolist() == said
    smearing.prompt.mask = torch.ones(whole.shape, dtype=torch.bool)  # the answer counted in: other weights
    smearing.model(whole)
    other = torch.stack([linear.gate.p for linear in attached(smearing.model).values()])
    assert (other - weights[0]).abs().max() > 0.01
    smearing.prompt.mask = None


def test_smear_trains_by_its_prompts_alone(small_model, tmp_path, monkeypatch):
    """Routers that saw the response while training would decide from what no request has."""
    seen, real = [], train_gates.gates_step

    def step(training, picked, *args):
        def look(linear, inputs):
            seen.append((len(inputs[0]), linear.gate.prompt.mask.clone()))

        hook = next(iter(attached(training.model).values())).register_forward_pre_hook(look)
        logged = real(training, picked, *args)
        hook.remove()
        lengths = sorted(example.n_prompt for example in picked)
        assert sorted(n for _, mask in seen for n in mask.sum(1).tolist()) == lengths
        return logged

    monkeypatch.setattr(train_gates, "gates_step", step)
    run(replace(options("top2", small_model, tmp_path / "out"), kind="smear", steps=1, micro_tokens=90))
    assert len(seen) > 1  # more than one part, each with its own mask
    for n, mask in seen:
        assert mask.numel() == n and (mask[:, 1:] <= mask[:, :-1]).all() and not mask.all(1).any()


# Fitted gates -------------------------------------------------------------------------------------


def objective(G, x, labels, l2):
    return F.cross_entropy(x @ G.T, labels) + l2 / 2 * G.pow(2).sum()


def newton(x, labels, e, l2):
    """The same problem by Newton's method in float64, to the last digits; nothing shared with
    L-BFGS."""
    flat = torch.zeros(e * x.shape[1], dtype=torch.float64)
    value = lambda g: objective(g.view(e, -1), x, labels, l2)  # noqa: E731
    for _ in range(40):
        gradient = torch.autograd.functional.jacobian(value, flat)
        if gradient.norm() < 1e-11:
            break
        step, size = torch.linalg.solve(torch.autograd.functional.hessian(value, flat), gradient), 1.0
        while value(flat - size * step) > value(flat) and size > 1e-6:
            size /= 2
        flat = flat - size * step
    assert gradient.norm() < 1e-9
    return flat.view(e, -1)


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 5), st.integers(1, 7), st.integers(11, 97), st.sampled_from([1e-3, 1e-2, 1.0]),
       st.booleans(), st.integers(0, 2**31))  # fmt: skip
def test_logistic_is_the_optimum(e, i, n, l2, separable, seed):
    """A fit that stops early, or penalises another thing than it says, gives gates that look
    trained: compared with Newton's method."""
    generator = torch.Generator().manual_seed(seed)
    x, planted = torch.randn(n, i, generator=generator), torch.randn(e, i, generator=generator)
    labels = (x @ planted.T).argmax(1) if separable else torch.randint(e, (n,), generator=generator)
    white = whitening(x.double())
    G, want = logistic(x, labels, e, l2), newton(x.double() @ white, labels, e, l2)
    assert G.shape == (e, i) and G.dtype == torch.float32 and not G.requires_grad
    G = torch.linalg.solve(white, G.double().T).T
    best = objective(want, x.double() @ white, labels, l2)
    assert objective(G, x.double() @ white, labels, l2) - best < 1e-5
    torch.testing.assert_close(G, want, rtol=2e-2, atol=2e-2)


def test_whitening():
    """Second moments of one in every direction, or the search creeps along the long ones."""
    x = torch.randn(997, 5, generator=torch.Generator().manual_seed(0)).double() * torch.tensor(
        [9.0, 1, 1, 3, 0.5]
    )
    y = x @ whitening(x)
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(5).double(), rtol=0, atol=0.1)
    assert whitening(torch.ones(7, 3)).isfinite().all()  # directions without variance


@torch.no_grad()
def features_of(llama, picked):
    """{module path: inputs (n, i)} of the examples' tokens, one example at a time, no padding."""
    linears = attached(llama) or {path: llama.get_submodule(path) for path in linear_shapes(llama)}
    rows = {path: [] for path in linears}
    hooks = [m.register_forward_pre_hook(lambda _, a, p=p: rows[p].append(a[0])) for p, m in linears.items()]
    for example in picked:
        llama(torch.tensor([example.ids]))
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in rows.items()}


def own_features(o, count=11, held_out=False, skip=0):
    """Features of training or other prompts, each task's in a model that its own adapter is merged
    into; and labels."""
    names, tokenizer = sorted(ANSWERS), Tokenizer(o.model)
    parts, labels = [], []
    for slot, name in enumerate(names):
        rows = [
            {"prompt": p, "response": ANSWERS[name]}
            for p in make_prompts(name, 16, seed=int(held_out))[:count]
        ]
        picked = [encode(tokenizer, TEMPLATE, row, name) for row in rows]
        found = features_of(
            merged(o.model, [load_adapter(Path(o.pool) / "adapters" / name, name)], [1.0]), picked
        )
        late = torch.cat([torch.arange(len(example.ids)) >= skip for example in picked])
        parts.append({path: x[late] for path, x in found.items()})
        labels += [slot] * int(late.sum())
    return {path: torch.cat([part[path] for part in parts]) for path in parts[0]}, torch.tensor(labels)


def assert_optimal(tensors, features, labels, l2):
    """The gradient of every gate's own problem vanishes, where at zero it doesn't."""
    for path, x in features.items():
        sizes, white = [], whitening(x.double())
        fitted = torch.linalg.solve(white, tensors[f"{path}.gate.weight"].double().T).T
        for G in (fitted, torch.zeros(2, x.shape[1], dtype=torch.float64)):
            G.requires_grad_()
            objective(G, x.double() @ white, labels, l2).backward()
            sizes.append(float(G.grad.norm()))
        assert sizes[0] < 5e-3 * sizes[1], (path, sizes)


def test_fit_own_gives_each_gate_the_optimum_of_its_own_features(trained, tmp_path):
    """Without it gates may be fitted to another Linear's inputs, to padding, to features of the
    wrong adapter: each has the logistic regression's optimum on features that were made by merging,
    one example at a time."""
    o = gates_run(
        trained, tmp_path, top_k=1, fit="own", l2=1e-3, steps=11, batch_size=2
    )  # every example once
    run(o)
    tensors, metadata = read_safetensors(Path(o.pool) / "gates" / "meteora_top1.safetensors")
    assert metadata["k"] == "1" and metadata["names"].split("\n") == sorted(ANSWERS)
    assert_optimal(tensors, *own_features(o), o.l2)
    places = [f"self_attn.{m}" for m in "qkvo"] + ["mlp.gate", "mlp.up", "mlp.down"]
    for n in range(3):
        at = {m: tensors[f"model.layers.{n}.{m}_proj.gate.weight"] for m in places}
        assert torch.equal(at["self_attn.q"], at["self_attn.k"]) and torch.equal(
            at["self_attn.q"], at["self_attn.v"]
        )
        assert torch.equal(at["mlp.gate"], at["mlp.up"])
        different = [at[m] for m in ("self_attn.q", "self_attn.o", "mlp.gate")]
        assert not any(torch.equal(a, b) for j, a in enumerate(different) for b in different[:j])
    shared = len(Tokenizer(o.model).encode("[INST] "))  # tokens that nothing could tell apart
    features, labels = own_features(o, held_out=True, skip=shared)
    rights = [
        float(((x @ tensors[f"{path}.gate.weight"].T).argmax(1) == labels).float().mean())
        for path, x in features.items()
    ]
    assert sum(rights) / len(rights) > 0.9


def test_fit_routed_is_fitted_to_what_the_other_half_routes(trained, tmp_path):
    """Fitted under its own choices on its own examples, a gate is always right there, and later
    gates learn to rely on it. Compared with a pass that is begun anew for each Linear, one half of
    the examples at a time."""
    o = gates_run(trained, tmp_path, top_k=1, fit="routed", l2=1e-3, steps=11, batch_size=2)
    run(o)
    tensors = read_safetensors(Path(o.pool) / "gates" / "meteora_top1.safetensors")[0]
    mole = load(o.model, o.pool, dtype="float32")
    rows = tokenize(load_tasks(o.tasks), mole.tokenizer, 331, TEMPLATE, 512)
    halves = [[x for step in range(11) if step % 2 == half for x in pick(rows, step, o)] for half in (0, 1)]
    labels = [torch.tensor([mole.pool.slot(x.task) for x in some for _ in x.ids]) for some in halves]
    gates = [meteora_gates(mole.pool, 1) for _ in halves]  # of half h: fitted to the other one
    for path in list(mole.pool.A)[:7]:  # further on one token of two equally good adapters changes all
        found = []
        for half in (0, 1):
            attach(mole.model, mole.pool, gates[half])
            found.append(features_of(mole.model, halves[half])[path])
            detach(mole.model)
        for half in (0, 1):
            gates[half][path].weight.data = logistic(found[1 - half], labels[1 - half], 2, o.l2)
        assert_optimal(tensors, {path: torch.cat(found)}, torch.cat(labels), o.l2)


@pytest.mark.parametrize("kind", ["meteora", "soft", "loraflow"])
def test_gates_see_composites(kind, small_model, tmp_path, monkeypatch):
    """An option without effect, as above: a run that resumes bit for bit may have left it out both
    times."""
    seen, step = [], train_gates.gates_step
    monkeypatch.setattr(train_gates, "gates_step", lambda *args: seen.append(args[1]) or step(*args))
    o = options("top2", small_model, tmp_path / "out", steps=3, batch_size=12, composite=0.9)
    run(of_kind(o, kind))
    assert all(any(len(example.parts) > 1 for example in picked) for picked in seen) and len(seen) == 3
    assert all(
        len(example.ids) <= 97 for picked in seen for example in picked
    )  # the context; --max_length is 512


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["--fit=own", "--beta=1", "--l2=1", "--adapters_too=elsewhere"])
def test_what_is_for_meteora_alone_is_refused(kind, option, small_model, tmp_path, monkeypatch, capsys):
    """An option without effect is a wrong line in somebody's table."""
    pool = write_random_pool(tmp_path / "pool", small_model)
    paths = [
        "--model",
        str(small_model),
        "--tasks",
        str(write_tasks(tmp_path / "tasks")),
        "--pool",
        str(pool),
    ]
    with pytest.raises((InputError, SystemExit)) as end:
        main(monkeypatch, "gates", *paths, "--kind", kind, option)
    said = str(end.value) + capsys.readouterr().err
    assert f"unknown option {option}" in said or f"--kind {kind} trains no adapters" in said
    assert not (Path(pool) / "gates").exists() and not (Path(pool) / "runs").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--kind=mixtral"], "kind"), (["--fit=all"], "fit"), (["--l2=-1"], "--l2 is -1"),
        (["--beta=nan"], "--beta is 'nan'"), (["--lr=inf"], "--lr is 'inf'"),
        (["--composite=2"], "--composite is 2"), (["--composite=0.5", "--fit=own"], "--composite goes with"),
        (["--adapter_lr=nan"], "--adapter_lr is 'nan'"), (["--top_k=0"], "--top_k is 0, expected a whole number"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(args, words, small_model, tmp_path, monkeypatch, capsys):
    """A typo must end before the training, and name itself."""
    o = options("top2", small_model, tmp_path / "out", steps=1)
    with pytest.raises((InputError, SystemExit)) as end:
        main(monkeypatch, *argv(o), *args)
    assert words in str(end.value) + capsys.readouterr().err
    assert not (Path(o.pool) / "gates").exists()


def test_smear_sees_one_task_a_prompt(small_model, tmp_path):
    """A router that decides by the whole prompt can't be trained on prompts of several tasks."""
    with pytest.raises(InputError, match="--composite goes with neither --fit nor --kind smear"):
        run(replace(options("top2", small_model, tmp_path / "out"), kind="smear", composite=0.5))


# Gates with their adapters ------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_adapters_too_writes_a_pool_of_its_own(k, small_model, tmp_path):
    """MeteoRA's released script trains the adapters as well, here saved in bf16. Overwriting the
    pool would break everything bound to it; gates bound to the old adapters would be refused by the
    new pool; padded ranks must stay what they are."""
    o = options(f"top{k}", small_model, tmp_path / "old", steps=2, adapters_too=str(tmp_path / "new"),
                adapter_lr=1e-2, save_dtype="bfloat16")  # fmt: skip
    old = read_pool(o.pool)
    (old.adapters["animals"] / "samples.jsonl").write_text('{"prompt": "a fox"}\n')
    before = {f: f.read_bytes() for f in Path(o.pool).rglob("*") if f.is_file()}
    run(o)
    assert {f: f.read_bytes() for f in Path(o.pool).rglob("*") if f.is_file()} == before
    new = read_pool(o.adapters_too)
    assert new.adapters.keys() == old.adapters.keys()
    assert (new.fingerprint, new.template) == (old.fingerprint, old.template)
    for name in ANSWERS:
        was, now = (load_adapter(folder.adapters[name], name) for folder in (old, new))
        assert (now.rank, now.scale, now.config, now.samples) == (
            was.rank,
            was.scale,
            was.config,
            was.samples,
        )
        for path in was.A:
            assert not torch.equal(now.A[path], was.A[path]) and not torch.equal(now.B[path], was.B[path])
            assert now.A[path].dtype == now.B[path].dtype == torch.bfloat16
    mole = load(small_model, o.adapters_too)
    set_methods(mole, [f"meteora_top{k}"])
    with pytest.raises(InputError, match="trained with other adapters: animals.*plurals"):
        file = Path(o.adapters_too) / "gates" / f"meteora_top{k}.safetensors"
        load_gates(file, load(small_model, o.pool).pool, mole.model.fingerprint())
    assert "lm_loss" in log_of(o.adapters_too, f"gates_top{k}")[0]


def test_adapters_learn_at_their_own_rate_from_the_lm_loss(small_model, tmp_path):
    """At top-1 the LM loss has no gradient for gates, and is left out; for the adapters it is all
    there is. AdamW's first step is as long as its learning rate, which tells whose is whose."""
    o = options("top1", small_model, tmp_path / "old", steps=1, beta=0.0, lr=3e-2, adapter_lr=2e-4)
    o = replace(o, adapters_too=str(tmp_path / "new"), weight_decay=0.0)
    run(o)
    steps = []
    for name in ANSWERS:
        was, now = (load_adapter(Path(p) / "adapters" / name, name) for p in (o.pool, o.adapters_too))
        steps += [(b[path] - a[path]).abs().max() for a, b in ((was.A, now.A), (was.B, now.B)) for path in a]
    assert max(steps) == pytest.approx(2e-4, rel=1e-2)
    gates = read_safetensors(tmp_path / "new" / "gates" / "meteora_top1.safetensors")[0]
    assert all(not G.any() for G in gates.values())  # beta 0: nothing told them anything
    run(replace(o, beta=50.0, adapters_too=str(tmp_path / "both")))
    gates = read_safetensors(tmp_path / "both" / "gates" / "meteora_top1.safetensors")[0]
    assert max(G.abs().max() for G in gates.values()) == pytest.approx(3e-2, rel=1e-2)
    alone = replace(o, adapters_too="", beta=50.0)
    run(alone)
    assert "lm_loss" not in log_of(alone.pool, "gates_top1")[0]


# Joint adapters -----------------------------------------------------------------------------------


def spy_on_draws(monkeypatch):
    """[[ids of each example] of each step], as they go into training, whatever task they are of."""
    seen, real = [], train_adapters.adapters_step

    def step(model, pool, gate, picked, *args):
        seen.append(sorted(tuple(example.ids) for example in picked))
        return real(model, pool, gate, picked, *args)

    monkeypatch.setattr(train_adapters, "adapters_step", step)
    return seen


def uneven_tasks(folder):
    write_tasks(folder, ("animals",), count=11)
    return str(write_tasks(folder, ("plurals",), count=5))


def test_lora_b_sees_the_very_examples_that_the_separate_adapters_see(small_model, tmp_path, monkeypatch):
    """The paper's comparison is one adapter against many on the same data: other examples, or other
    shares of the tasks, would decide it. lora_f takes the data as it is: each example once an
    epoch."""
    seen, tasks = spy_on_draws(monkeypatch), uneven_tasks(tmp_path / "tasks")
    drawn = {}
    for joint in ("", "lora_b", "lora_f"):
        o = options(
            "adapters", small_model, tmp_path / "runs" / joint / "out", tasks=tasks, joint=joint, steps=8
        )
        run(o)
        drawn[joint], seen[:] = list(seen), []
    assert len(drawn[""]) == 8 and drawn[""] == drawn["lora_b"]
    tokenizer = Tokenizer(small_model)
    counts = {}
    for name, task in load_tasks(tasks).items():
        rows = {tuple(encode(tokenizer, TEMPLATE, row).ids) for row in task.train}
        for joint, steps in drawn.items():
            counts[joint, name] = [sum(ids in rows for ids in step) for step in steps]
    assert counts["lora_b", "animals"] == counts["lora_b", "plurals"] == [2] * 8
    assert (
        sum(counts["lora_f", "animals"]) == 22 and sum(counts["lora_f", "plurals"]) == 10
    )  # two epochs of 16
    for epoch in (drawn["lora_f"][:4], drawn["lora_f"][4:]):
        assert (
            len({ids for step in epoch for ids in step}) == len([ids for step in epoch for ids in step]) == 16
        )


@pytest.mark.parametrize(("joint", "name"), [("lora_b", ""), ("lora_f", "mine")])
def test_a_joint_adapter_is_a_baseline_and_no_member(joint, name, small_model, tmp_path):
    """In pool.json it would be routed to, merged and masked like a task's own."""
    pool = write_random_pool(tmp_path / "out", small_model)
    before = left(pool)
    o = options(
        "adapters", small_model, pool, joint=joint, name=name, steps=12, batch_size=3, lr=5e-2, dropout=0.0
    )
    run(o)
    called = name or joint
    after = left(pool)
    assert {key: value for key, value in after.items() if key in before} == before
    assert {key.split("/")[0] for key in after.keys() - before.keys()} == {"baselines", "runs"}
    assert [f.name for f in (pool / "baselines").iterdir()] == [called]
    rows = log_of(pool, called)
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    adapter = load_adapter(pool / "baselines" / called)
    assert adapter.rank == 3 and any(B.any() for B in adapter.B.values())
    mole = load(small_model, pool)
    assert sorted(mole.pool.names) == sorted(ANSWERS)
    llama = merged(small_model, [adapter], [1.0])
    example = examples(small_model, 1)[0]
    assert losses(llama, example).mean() < 0.6 * losses(load_llama(small_model), example).mean()
    set_methods(mole, [called])
    torch.testing.assert_close(losses(mole.model, example), losses(llama, example), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"name": "mine"}, "--joint"),
        ({"joint": "lora_b", "name": "../x"}, "'../x'"),
        ({"joint": "lora_x"}, "lora_x"),
    ],
)
def test_bad_names_of_joint_adapters(more, words, small_model, tmp_path, monkeypatch, capsys):
    """A name becomes a folder: outside the pool, or nowhere where --joint was forgotten."""
    o = replace(options("adapters", small_model, tmp_path / "out", steps=1), **more)
    with pytest.raises((InputError, SystemExit)) as end:
        main(monkeypatch, *argv(o))
    assert words in str(end.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# LoraHub ------------------------------------------------------------------------------------------


def lorahub_file(o):
    return Path(o.pool) / "baselines" / "lorahub.json"


def test_lorahub_judges_weights_by_the_loss_of_the_shots(small_model, tmp_path, monkeypatch):
    """A search over another loss, another merge or weights in another order still returns numbers."""
    o = options("lorahub", small_model, tmp_path / "out", shots=3, steps=7, seed=5, l1=0.25)
    tried, found, asked = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, -1.5]], [], []

    def search(loss, e, steps, seed, l1):
        asked.append((e, steps, seed, l1))
        found.append([loss(w) for w in tried])
        return [0.123456, -0.5], 1.0

    monkeypatch.setattr(train_lorahub, "lorahub_search", search)
    run(o)
    assert asked == [(2, 7, 5, 0.25)] * 2
    found_weights = {name: {"animals": 0.1235, "plurals": -0.5} for name in sorted(ANSWERS)}
    assert read_json(lorahub_file(o))["weights"] == found_weights
    adapters = [load_adapter(path, name) for name, path in sorted(read_pool(o.pool).adapters.items())]
    tokenizer = Tokenizer(small_model)
    for (name, task), values in zip(load_tasks(o.tasks).items(), found, strict=True):
        shots = [encode(tokenizer, TEMPLATE, row) for row in draw(task.train, name, 0, 3, 5)]
        for weights, value in zip(tried, values, strict=True):
            llama = merged(small_model, adapters, weights)
            assert value == pytest.approx(
                torch.cat([losses(llama, x) for x in shots]).mean().item(), rel=1e-4
            )


def test_lorahub_finds_something_better_than_the_base(trained, tmp_path):
    """With the task's own adapter in the pool there is something to find; by seed, and what it says
    is what it has."""
    pool = shutil.copytree(
        trained.pool, tmp_path / "pool", ignore=shutil.ignore_patterns("runs", "gates", "baselines")
    )
    o = LorahubRun(model=trained.model, tasks=trained.tasks, pool=str(pool), steps=30)
    run(o)
    first = lorahub_file(o).read_bytes()
    adapters = [load_adapter(pool / "adapters" / name, name) for name in sorted(ANSWERS)]
    bare = load_llama(o.model)
    for example in examples(o.model, 1):
        weights = read_json(lorahub_file(o))["weights"][example.task]
        assert list(weights) == sorted(ANSWERS) and all(abs(w) <= 1.5 for w in weights.values())
        llama = merged(o.model, adapters, list(weights.values()))
        assert losses(llama, example).mean() < 0.8 * losses(bare, example).mean()
    for seed in (0, 1):
        lorahub_file(o).unlink()
        run(o, seed=seed)
        assert (lorahub_file(o).read_bytes() == first) == (seed == 0)


def test_lorahub_goes_on_where_it_was_stopped(small_model, tmp_path, monkeypatch):
    """Minutes a task: what is found must be there after a kill, and not be searched again; what
    names an adapter that is gone must."""
    o = options("lorahub", small_model, tmp_path / "out", steps=3)
    real, done = train_lorahub.lorahub_search, []

    def search(*args):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(real(*args))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(train_lorahub, "lorahub_search", search)
        with pytest.raises(KeyboardInterrupt):
            run(o)
    first = read_json(lorahub_file(o))
    assert list(first["weights"]) == ["animals"]
    kept = {"animals": {"animals": 0.7, "plurals": 0.1}}
    write_json(lorahub_file(o), first | {"weights": kept})
    run(o)
    both = read_json(lorahub_file(o))["weights"]
    assert both["animals"] == kept["animals"] and both.keys() == ANSWERS.keys()
    other = {"adapters": first["adapters"] | {"elm": "0"}, "options": first["options"], "weights": kept}
    write_json(lorahub_file(o), other)
    run(o)
    again = read_json(lorahub_file(o))
    assert again["adapters"] == first["adapters"]
    assert again["weights"] == first["weights"] | {"plurals": both["plurals"]}
    lorahub_file(o).unlink()
    run(o, only=["plurals"])
    assert read_json(lorahub_file(o))["weights"] == {"plurals": both["plurals"]}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"steps": 0}, "--steps is 0, expected a whole number from 1"), ({"shots": 0}, "--shots is 0"),
        ({"l1": -1.0}, "--l1 is -1"), ({"l1": math.nan}, "--l1 is 'nan'"),
        ({"max_length": 3}, "at most 3 tokens"),
        ({"only": ["animal"]}, "'animal', did you mean animals"), ({"pool": ""}, "--pool is missing"),
        ({"tasks": ""}, "--tasks is missing"),
    ],
)  # fmt: skip
def test_lorahub_refuses(more, words, small_model, tmp_path, monkeypatch):
    """Each would end in a traceback, or in weights that mean nothing."""
    o = replace(options("lorahub", small_model, tmp_path / "out"), **more)
    with pytest.raises(InputError, match=words):
        main(monkeypatch, *argv(o))
    assert not (tmp_path / "out" / "baselines").exists()


def test_lorahub_refuses_another_base(small_model, tmp_path):
    """Adapters trained on another base are noise, and weights over noise are searched as happily."""
    o = options("lorahub", small_model, tmp_path / "out")
    raw = read_json(tmp_path / "out" / "pool.json")
    write_json(tmp_path / "out" / "pool.json", raw | {"base": "another"})
    with pytest.raises(InputError, match="pool.json: .*train.py adapters"):
        run(o)


def test_more_shots_than_examples_are_all_of_them(small_model, tmp_path, monkeypatch):
    """`draw` would begin its second epoch and count some examples twice."""
    sizes, real = [], train_lorahub.collate
    monkeypatch.setattr(
        train_lorahub, "collate", lambda picked, *to: sizes.append(len(picked)) or real(picked, *to)
    )
    run(options("lorahub", small_model, tmp_path / "out", steps=1, shots=40))
    assert sizes == [11, 11]
    assert read_json(lorahub_file(options("lorahub", small_model, tmp_path / "out")))["weights"] == {
        name: dict.fromkeys(sorted(ANSWERS), 0.0) for name in ANSWERS
    }  # one step is the start: zeros
