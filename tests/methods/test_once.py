"""MeteoRA's gate, once: which Linears use what, its file, its training."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.files import InputError
from common.tensors import read_metadata, read_safetensors, write_safetensors
from evaluation.routing import measure_routing
from generate import load
from helpers_methods import IDS, NAMES, close, logits_of
from helpers_models import random_adapter
from helpers_training import argv, examples, main, options, pool_in_model
from methods.batch import set_methods
from methods.once import FIRST, DecidingGate, MeteoraOnce, NoAdapter, OnceRun, once_gates
from methods.shared_mixture import SharedMixture
from model import load_llama
from moe_lora import Recorder, SampleGate, attach, attached
from pool.folder import read_pool
from pool.slots import Pool
from tasks.folders import Task
from training import gates as train_gates
from training.gates import GateTermTraining, gates_step

BEFORE = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
MIDDLE = "model.layers.1.mlp.up_proj"


def test_its_mixture_is_that_of_all_linears_after_it(mole, small_model, folder):
    """Without it a Linear could use the mixture of other tokens, or the gate see an adapted input.
    By hand: the gate's input in a model whose layer 0 has no adapter, then fixed mixtures."""
    tensors, metadata = read_safetensors(folder / "gates" / "meteora_once_top2.safetensors")
    assert tensors.keys() == {f"{FIRST}.gate.weight"} and metadata["decide_at"] == FIRST
    model = load_llama(small_model)
    paths = read_pool(folder).adapters
    pool = Pool.load({name: paths[name] for name in metadata["names"].split("\n")}, mole.shapes)
    seen = []
    hook = model.get_submodule(FIRST).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS[:2])
    hook.remove()
    logits = seen[0].flatten(0, -2).double() @ tensors[f"{FIRST}.gate.weight"].double().T  # (n, e)
    top, idx = logits.topk(2, -1)
    gates = {path: SampleGate() for path in pool.A}
    for path, gate in gates.items():
        gate.set(idx, top.softmax(-1).float() * (path not in BEFORE), each_token=True)
    attach(model, pool, gates)
    with torch.no_grad():
        assert close(logits_of(mole, ["meteora_once"] * 2), model(IDS[:2]))


def test_what_is_recorded(mole):
    """Without it a picture or --json shows a choice where there is none."""
    set_methods(mole, ["meteora_once_top2"])
    with Recorder(mole.model, 11) as recorder, torch.no_grad():
        mole.model(IDS[:1])
    weights = dict(zip(attached(mole.model), recorder.read(11), strict=True))  # {path: (n, e)}
    for path, found in weights.items():
        assert torch.equal(found, torch.zeros_like(found) if path in BEFORE else weights[FIRST]), path
    assert weights[FIRST].argmax(-1).unique().numel() > 1  # tokens differ


def test_one_candidate_from_the_first_linear_on_is_that_adapter(mole):
    """test_identities leaves this method out, as its first Linears use none: here none is before."""
    first = next(iter(mole.pool.A))
    known = torch.tensor([name == "bee" for name in mole.pool.names])
    mole.custom_gates["mine"] = once_gates(mole.pool, 2, known=known, decide_at=first)
    try:
        assert close(logits_of(mole, ["mine"]), logits_of(mole, ["adapter:bee"]))
    finally:
        mole.custom_gates.clear()


def test_linears_go_by_the_order_in_which_they_run(mole):
    """A pool has its Linears in the order in which adapters brought them: after one that brings layer
    0's, a Linear could wait for a gate that runs later, and use the last batch's mixture."""
    some = [random_adapter("late", mole.shapes, 2, targets=["1.mlp.up_proj", "1.mlp.down_proj"])]
    pool = Pool.of(some, mole.shapes)
    pool.add(random_adapter("all", mole.shapes, 3))
    paths = list(mole.shapes)
    assert list(pool.A) != paths
    gates = once_gates(pool, 1, decide_at=MIDDLE)
    kinds = [type(gates[path]) for path in paths]
    cut = paths.index(MIDDLE)
    assert kinds == [NoAdapter] * cut + [DecidingGate] + [SharedMixture] * (len(paths) - cut - 1)
    assert sum(len(list(gate.parameters())) for gate in gates.values()) == 1


def test_the_gate_term_is_that_of_one_gate(small_model, tmp_path):
    """Without it Linears that choose nothing weigh in the mean, or their labels are shifted."""
    model, pool, gates = pool_in_model(small_model, tmp_path, lambda pool: once_gates(pool, 2))
    gate = gates[FIRST]
    gate.weight.data = torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(2))
    args = SimpleNamespace(top_k=2, lm_weight=0.0, beta=3.0, micro_tokens=60, adapters_too="", seed=0)
    picked = examples(small_model, 3)
    seen = []
    model.get_submodule(FIRST).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logged = gates_step(GateTermTraining(model, pool, gates, args), picked, 0)
    grad = gate.weight.grad.clone()
    model.zero_grad()
    seen.clear()
    for example in picked:  # one at a time, no padding
        model(torch.tensor([example.ids]))
    labels = torch.cat([torch.full((len(x.ids),), pool.slot(x.task)) for x in picked])
    x = torch.cat([one.flatten(0, -2) for one in seen]).detach()
    want = F.cross_entropy(F.linear(x, gate.weight), labels)
    (args.beta * want).backward()
    assert logged["gate_loss"] == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(grad, gate.weight.grad, atol=1e-5, rtol=1e-4)


def test_accuracy_is_that_of_the_one_gate(mole):
    """Without it eval.py ends in a traceback after all answers, or counts Linears without a gate."""
    rows = [{"prompt": "the fox", "response": "the lazy dog"}]
    tasks = {name: Task(name, "exact_match", rows, rows) for name in NAMES}
    args = SimpleNamespace(top_k=2, gate_temperature=1.0, retrieve=3, ood=False, unseen=False)
    found = measure_routing(mole, tasks, "meteora_once_top2", args)["gates"]
    assert found["linears"].keys() == {FIRST} and found["right"] == found["linears"][FIRST]


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_it_learns_and_answers_as_it_was_trained(k, small_model, trained, tmp_path, monkeypatch):
    """Without it the gate is saved and comes back in another Linear, or learns nothing."""
    held = {}
    training = MeteoraOnce.training

    def keep(model, pool, args):
        held["training"] = training(model, pool, args)
        return held["training"]

    monkeypatch.setattr(MeteoraOnce, "training", keep)
    new = tmp_path / "pool"
    new.mkdir()
    for name in ("adapters", "pool.json"):
        (new / name).symlink_to(Path(trained.pool) / name)
    paths = {"model": trained.model, "tasks": trained.tasks, "pool": str(new)}
    how = {"top_k": k, "steps": 20, "batch_size": 6, "lr": 5e-2, "decide_at": MIDDLE}
    train_gates.train_gates(OnceRun(**paths, kind="meteora_once", **how), {"meteora_once": MeteoraOnce})
    name = f"meteora_once_top{k}"
    file = new / "gates" / f"{name}.safetensors"
    assert read_metadata(file)["decide_at"] == MIDDLE
    assert read_safetensors(file)[0].keys() == {f"{MIDDLE}.gate.weight"}
    mole = load(small_model, new)
    ids = torch.tensor([examples(small_model, 1)[0].ids])
    model = load_llama(small_model)
    attach(model, held["training"].pool, held["training"].gates)
    with torch.no_grad():
        assert close(logits_of(mole, [name], ids), model(ids))
    right = 0
    some = examples(small_model, 4, held_out=True)
    for example in some:
        set_methods(mole, [name])
        with Recorder(mole.model, len(example.ids)) as recorder, torch.no_grad():
            mole.model(torch.tensor([example.ids]))
        right += int(recorder.read(len(example.ids))[-1, -1].argmax() == mole.pool.slot(example.task))
    assert right > 0.75 * len(some)


WRONG = "model.layers.0.self_attn.o_porj"
SAYS = f"is '{WRONG}', expected a Linear that an adapter adapts, did you mean {FIRST}"


def test_a_linear_that_no_adapter_adapts(small_model, folder, tmp_path, monkeypatch):
    """Without it a typo, or a damaged file, is a KeyError."""
    o = options("top2", small_model, tmp_path / "pool", steps=1)
    plain = [line for line in argv(o) if not line.startswith(("--fit", "--l2", "--kind"))]
    with pytest.raises(InputError, match=f"^--decide_at {SAYS}"):
        main(monkeypatch, *plain, "--kind", "meteora_once", "--decide_at", WRONG)
    assert not (tmp_path / "pool" / "gates").exists()
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "gates" / "meteora_once_top2.safetensors"
    tensors, metadata = read_safetensors(file)
    write_safetensors(file, tensors, metadata | {"decide_at": WRONG})
    with pytest.raises(InputError, match=f"meteora_once_top2.safetensors: decide_at {SAYS}"):
        set_methods(load(small_model, tmp_path / "copy"), ["meteora_once"])
