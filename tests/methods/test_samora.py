"""SAMoRA: the method and its loss against float64 loops, the saved experts in PEFT, killed runs, errors."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import eval as evaluation
from common.files import InputError
from common.tensors import read_metadata, write_safetensors
from generate import load
from helpers_methods import IDS, close, logits_of
from helpers_models import random_adapter, write_adapters
from helpers_training import (
    assert_same,
    contents,
    examples,
    killed_at_write,
    options,
    run,
    run_folder,
    write_random_pool,
)
from methods.batch import check_method, set_methods
from methods.samora import SamoraRun, SamoraTraining
from model import load_llama
from moe_lora import attach, detach
from pool.adapters import linear_shapes, load_adapter, save_adapter
from pool.folder import read_pool, write_pool
from pool.load import load_base
from tasks.folders import Task, collate
from training.adapters import new_pool

HOME = Path("baselines") / "samora"
FILE = HOME / "gates" / "samora.safetensors"
E, R = 5, 3  # experts and rank
TASKS = ["animals", "fox", "plurals"]


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "pool"))


class ByHand(nn.Module):
    """A Linear of the equations in float64, token by token and expert by expert; `scale` is alpha / r."""

    def __init__(self, base, A, B, keys, logits, scale):
        super().__init__()
        self.base = base
        self.parts = [part.double() for part in (A, B, keys, logits)]
        self.scale = scale

    def forward(self, x):
        A, B, keys, logits = self.parts
        y = self.base(x)
        for token, row in enumerate(x.double()):
            h = A @ row
            cosines = torch.stack([h @ c / (h.norm() * c.norm()) for c in keys])
            g = torch.softmax(cosines / 0.8, 0)
            # One logit for all tokens, or one for each.
            share = self.scale / (1 + math.exp(-float(logits if logits.dim() == 0 else logits[token])))
            y[token] += share * sum(g[j] * (B[j] @ h) for j in range(len(B)))
        return y


def put(model, path, module):
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# In use -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["samora", "samora:fox", "samora:dog"])
def test_the_method_is_its_equations(small_model, folder, name):
    """A key of another expert, a cosine without its norm or another task's logit gives answers that are
    as fluent."""
    tensors, about = load_file(folder / FILE), read_metadata(folder / FILE)
    tasks, names = about["tasks"].split("\n"), about["names"].split("\n")
    experts = [load_adapter(folder / HOME / "adapters" / expert) for expert in names]
    assert tasks == ["dog", "fox"] and len(experts) == E
    model = load_llama(small_model)
    for path in experts[0].A:
        logits = tensors[f"{path}.gate.of_task"][0].double()
        logit = logits[tasks.index(name[7:])] if name[7:] else logits.mean()
        B = torch.stack([expert.B[path] for expert in experts])
        parts = experts[0].A[path], B, tensors[f"{path}.gate.keys"], logit
        put(model, path, ByHand(model.get_submodule(path), *parts, 8 / 3))
    got = logits_of(load(small_model, folder), [name] * 2)
    assert close(got, model(IDS[:2]), 1e-5)
    assert not close(got, load_llama(small_model)(IDS[:2]), 0.01)


@torch.no_grad()
def test_the_experts_in_peft(small_model, folder):
    """Whoever takes an expert elsewhere, or mixes some in a pool, needs S inside B and alpha in its config:
    here all of them as one fixed sum."""
    from helpers_oracles import LlamaForCausalLM, PeftModel

    weights = {f"expert_{j + 1}": weight for j, weight in enumerate((0.75, -0.5, 0.25, 1.5, -1.0))}
    home = folder / HOME / "adapters"
    peft = LlamaForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    for name in weights:
        if isinstance(peft, PeftModel):
            peft.load_adapter(home / name, name)
        else:
            peft = PeftModel.from_pretrained(peft, home / name, name)
    peft.add_weighted_adapter([*weights], [*weights.values()], "sum", combination_type="cat")
    peft.set_adapter("sum")
    mix = "mix:" + ",".join(f"{name}={weight}" for name, weight in weights.items())
    got = logits_of(load(small_model, folder / HOME), [mix] * 5)
    assert close(got, peft.eval()(IDS).logits, 1e-5)
    assert not close(got, load_llama(small_model)(IDS), 0.01)
    first, *others = [load_adapter(home / name) for name in weights]
    for path, A in first.A.items():
        assert all(torch.equal(A, other.A[path]) for other in others), path


def test_an_adapter_beside_the_experts_is_none(small_model, copied):
    """Somebody's adapter in their folder has no key: with one of zeros it would get a share."""
    home = read_pool(copied / HOME)
    before = logits_of(load(small_model, copied), ["samora"])
    home.adapters["mine"] = copied / HOME / "adapters" / "mine"
    save_adapter(random_adapter("mine", linear_shapes(load_base(small_model)), R), home.adapters["mine"])
    write_pool(home)
    assert torch.equal(logits_of(load(small_model, copied), ["samora"]), before)
    assert not torch.equal(logits_of(load(small_model, copied / HOME), ["adapter:mine"]), before)


def test_eval_tells_the_task_or_not(small_model, folder, tmp_path, monkeypatch, capsys):
    """The two columns are one method unless eval.py gives samora_known each task's own logit; with --ood
    there is no adapter that the experts could do without."""
    line = ["eval.py", "--model", small_model, "--pool", folder, "--tasks", folder.parent / "tasks"]
    line += ["--only", "fox", "--only", "dog", "--max_new_tokens", 5, "--out", tmp_path / "out"]
    line += ["--methods", "samora,samora_known,samora:fox"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    evaluation.main()
    found = {}
    for row in map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines()):
        found.setdefault((row["method"], row["task"]), []).append(row["answer"])
    assert found["samora_known", "fox"] == found["samora:fox", "fox"]
    assert found["samora_known", "dog"] != found["samora:fox", "dog"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*line, "--ood"]])
    with pytest.raises(InputError, match="--ood: samora has no adapter of a task"):
        evaluation.main()


# Training -----------------------------------------------------------------------------------------


def training_of(small_model, random=True, **more):
    """A SamoraTraining over a small model without dropout, with random parts that are not small."""
    more = {"r": R, "alpha": 2.0, "experts": E, "dropout": 0.0} | more
    args = SamoraRun(str(small_model), **more)
    model = load_base(small_model)
    pool = new_pool(model, [Task(f"expert_{j + 1}", "", [], []) for j in range(E)], args)
    training = SamoraTraining(model, pool, TASKS, args)
    generator = torch.Generator().manual_seed(1)
    for name, param in training.params.items() if random else ():
        size = 0.3 if name.endswith((".A", ".B")) else 1.0
        param.data.copy_(torch.randn(param.shape, generator=generator) * size)
    return training


def logits_by_hand(training, tasks):
    """{module path: e_t . w of each token}; `tasks` has a token's task, or None where it isn't known."""
    e_t = training.params["e_t"].detach().double()
    rows = torch.stack([e_t.mean(0) if task is None else e_t[TASKS.index(task)] for task in tasks])
    return {path: (rows @ training.params[f"{path}.w"].detach().double())[:, 0] for path in training.gates}


@pytest.mark.parametrize("unknown", [0.0, 1.0])
def test_the_loss_is_by_hand(small_model, unknown):
    """A loss that is another than the page's learns something else, and nothing fails: here the LM loss
    through the experts and both penalties are spelled out."""
    training = training_of(small_model, unknown=unknown, orthogonality=0.25, matching=0.5)
    batch = collate(examples(small_model, 2))
    n = int(batch.real.sum())
    loss, logged = training.loss(batch, n, int(batch.predicts.sum()))
    tasks = [batch.tasks[part] for part in batch.part[batch.real].tolist()]
    logits = logits_by_hand(training, [None] * n if unknown else tasks)
    ortho = matching = 0.0
    model = load_llama(small_model)
    for path in training.gates:
        A, B, S, c = (training.params[f"{path}.{name}"].detach().double() for name in "ABSc")
        put(model, path, ByHand(model.get_submodule(path), A[0], B * S, c, logits[path], 2 / 3))
        ortho += float((A[0] @ A[0].T - torch.eye(R)).pow(2).sum()) / R**2
        for j in range(E):
            ortho += float((B[j].T @ B[j] - torch.eye(R)).pow(2).sum()) / R**2 / E
            b = B[j].mean(0)
            p = torch.softmax(b / b.norm(), 0)
            q = torch.softmax(c[j] / c[j].norm(), 0)
            matching += float((p * (p / q).log()).sum()) / E
    with torch.no_grad():
        hidden = model.model(batch.ids[batch.real][None], lengths=batch.lengths)
        log_p = model.head(hidden)[0].double().log_softmax(-1)
    steps = torch.where(batch.predicts[batch.real])[0].tolist()
    ids = batch.ids[batch.real]
    lm = -sum(float(log_p[t, ids[t + 1]]) for t in steps) / len(steps)
    assert logged["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert logged["orthogonality"] == pytest.approx(ortho, rel=1e-5)
    assert logged["matching"] == pytest.approx(matching, rel=1e-4, abs=1e-6)
    assert loss.item() == pytest.approx(lm + 0.25 * ortho + 0.5 * matching, rel=1e-5)


def test_parts_of_a_step_are_the_step(small_model):
    """--micro_tokens is about memory: it must not count penalties once for each part."""
    training = training_of(small_model, unknown=0.0)
    picked = examples(small_model, 3)
    for param in training.params.values():
        param.requires_grad_(True)
    found = []
    for parts in ([picked], [picked[:2], picked[2:]]):
        batches = [collate(part) for part in parts]
        n = sum(int(batch.real.sum()) for batch in batches)
        n_response = sum(int(batch.predicts.sum()) for batch in batches)
        for batch in batches:
            training.loss(batch, n, n_response)[0].backward()
        found.append({name: param.grad.clone() for name, param in training.params.items()})
        for param in training.params.values():
            param.grad = None
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_at_the_start_nothing_changes(small_model):
    """Experts that begin with noise undo what the base knows, and the first steps only repair that."""
    training = training_of(small_model, random=False)
    batch = collate(examples(small_model, 2))
    training.loss(batch, 1, 1)
    got = training.model.model(batch.ids[batch.real][None], lengths=batch.lengths)
    detach(training.model)
    assert torch.equal(got, training.model.model(batch.ids[batch.real][None], lengths=batch.lengths))
    assert not training.params["model.layers.0.self_attn.q_proj.w"].any()  # and all tasks begin alike


def test_the_first_step_is_finite_and_small(small_model):
    """At B = 0 the slope of v / |v| is infinite: undamped, the matching loss would be all of the first
    step's clipped gradient."""
    training = training_of(small_model, random=False)
    for param in training.params.values():
        param.requires_grad_(True)
    batch = collate(examples(small_model, 2))
    training.loss(batch, int(batch.real.sum()), int(batch.predicts.sum()))[0].backward()
    norms = [p.grad.norm() for p in training.params.values()]
    assert 0 < torch.stack(norms).norm() < 10


@torch.no_grad()
def test_what_is_saved_is_what_trained(small_model):
    """S left out of B, another A, or e_t . w transposed: then the saved experts aren't those of the log."""
    training = training_of(small_model, unknown=0.0)
    batch = collate(examples(small_model, 2)[:2])
    assert batch.tasks == ["animals"] * 2
    training.loss(batch, 1, 1)
    model = training.model
    want = model.model(batch.ids[batch.real][None], lengths=batch.lengths)
    detach(model)
    attach(model, training.finish(), training.gates)
    for gate in training.gates.values():
        gate.logit = gate.of_task[:, TASKS.index("animals")]
    assert close(model.model(batch.ids[batch.real][None], lengths=batch.lengths), want, 1e-5)


def in_a_pool(model, out, **more):
    """A small run whose pool has adapters."""
    write_random_pool(out, model)
    return options("samora", model, out, **more)


@pytest.mark.parametrize("number, after", [(3, True), (6, False), (12, True)])
def test_a_killed_run_resumes_bit_for_bit(number, after, small_model, tmp_path, monkeypatch):
    """Which tasks are unknown and LoRA dropout are drawn at random: a run that goes on must draw what it
    would have drawn. The later kills hit the writing of the experts and of their gates."""
    whole = in_a_pool(small_model, tmp_path / "whole" / "out")
    run(whole)
    o = in_a_pool(small_model, tmp_path / "killed" / "out")
    assert killed_at_write(monkeypatch, o, number, after)
    assert json.loads((run_folder(o) / "config.json").read_text())["finished"] is False
    run(o, resume=True)
    assert_same(o, contents(whole))


def test_a_finished_run_has_what_it_wrote(small_model, tmp_path, capsys):
    """Who deletes an expert must get it again, not "finished already"."""
    o = in_a_pool(small_model, tmp_path / "out", save_dtype="bfloat16")
    run(o)
    expected = contents(o)
    for file in (FILE, HOME / "adapters" / "expert_2" / "adapter_model.safetensors"):
        (Path(o.pool) / file).unlink()
        run(o, resume=True)
        assert "it is gone: training again" in capsys.readouterr().err
        assert_same(o, expected)
    run(o, resume=True)
    assert "finished already" in capsys.readouterr().err


# Errors -------------------------------------------------------------------------------------------


def damage(folder, about=None, **tensors):
    """Changes metadata and tensors of the gate file."""
    file = folder / FILE
    found = load_file(file) | {name.replace("__", "."): y for name, y in tensors.items()}
    write_safetensors(file, found, read_metadata(file) | (about or {}))


def refuse(small_model, folder, name, words):
    mole = load(small_model, folder)
    with pytest.raises(InputError, match=words) as refusal:
        set_methods(mole, [name])
    assert "\n" not in str(refusal.value)


PATH = "model__layers__0__self_attn__q_proj__gate"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"about": {"base": "0" * 32}}, "samora.safetensors: trained on base 0000.*train.py samora"),
        ({"about": {"hashes": "\n".join("abcde")}}, "trained with other adapters: expert_1.*train.py samora"),
        ({"about": {"tasks": "fox"}}, r"of_task: expected \(5, 1\), found \(5, 2\)"),
        ({f"{PATH}__keys": torch.zeros(E, R + 1)}, r"keys: expected \(5, 3\), found \(5, 4\)"),
        ({f"{PATH}__keys": torch.full((E, R), math.nan)}, "q_proj.gate.keys holds 15 NaN"),
    ],
)
def test_a_damaged_file_is_one_line(change, words, small_model, copied):
    """Keys of other experts, or logits of other tasks, would answer all the same."""
    damage(copied, **change)
    refuse(small_model, copied, "samora", words)


def test_what_is_missing_names_the_command(small_model, copied):
    """ "KeyError: fox" sends people to the source."""
    refuse(small_model, copied, "samora:fix", "samora:fix: not trained on 'fix', did you mean fox")
    refuse(small_model, copied, "samora:zzz", "not trained on 'zzz', only on dog, fox")
    refuse(small_model, copied, "samora_known", "another one for each task: name it, samora:NAME")
    shutil.rmtree(copied / HOME / "adapters" / "expert_3")
    refuse(small_model, copied, "samora", "expert_3: no such adapter folder")
    shutil.rmtree(copied / HOME)
    command = "needs .*samora.safetensors: python train.py samora makes it"
    refuse(small_model, copied, "samora", command)
    with pytest.raises(InputError, match=command):
        check_method(load(small_model, adapters=read_pool(copied).adapters), "samora")


def test_it_has_a_batch_to_itself(small_model, folder):
    """Adapters of the pool beside it would be looked for among the experts."""
    mole = load(small_model, folder)
    for other in ("base", "uniform", "samora:fox", "meteora"):
        with pytest.raises(InputError, match="one batch can't hold both"):
            set_methods(mole, ["samora", other])


def test_a_folder_of_peft_folders_is_a_pool_too(small_model, tmp_path):
    """Without it adapters from elsewhere have to be trained again before experts can stand beside them."""
    write_adapters(tmp_path / "out", load_llama(small_model), ["ant", "bee"])
    run(options("samora", small_model, tmp_path / "out"))
    found = read_pool(tmp_path / "out")
    assert set(found.adapters) == {"ant", "bee"}
    check_method(load(small_model, tmp_path / "out"), "samora")


def test_a_pool_that_is_none_and_compile_are_refused(small_model, tmp_path):
    """Without it the experts lie where no command finds them, or an option does nothing."""
    with pytest.raises(InputError, match="out: no such pool folder"):
        run(options("samora", small_model, tmp_path / "out"))
    with pytest.raises(InputError, match="--compile: SAMoRA trains uncompiled: leave it out"):
        run(in_a_pool(small_model, tmp_path / "out", compile=True))
