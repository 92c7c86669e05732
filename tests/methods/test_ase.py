"""Adaptive Shared Experts: the gate against its equation, shared adapters in training and in use."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.files import InputError
from common.tensors import read_metadata, read_safetensors, write_safetensors
from generate import answer, load
from helpers_methods import IDS, NAMES, close, logits_of
from helpers_models import random_adapter
from helpers_training import argv, examples, main, options
from methods.ase import Ase, AseGate, AseRun, ase_gates
from methods.batch import check_name, set_methods
from methods.joint import SAMPLING
from methods.session import find_mole
from model import load_llama
from moe_lora import MeteoraGate, Recorder, attach
from pool.adapters import load_adapter
from pool.folder import read_pool
from pool.slots import Pool
from training import gates as train_gates
from training.adapters import AdaptersRun, train_adapters
from training.losses import GateLoss

N, E, WIDTH = 13, 11, 7


def gate_of(k, shared, known=None, temperature=1.0):
    """(an AseGate of random G, x (N, WIDTH))."""
    generator = torch.Generator().manual_seed(5)
    G = torch.randn(E, WIDTH, generator=generator)
    x = torch.randn(N, WIDTH, generator=generator)
    known = torch.ones(E, dtype=torch.bool) if known is None else known
    return AseGate(G, k, torch.tensor(shared, dtype=torch.int64), known, temperature), x


def dense(mixture):
    """A Mixture's weights as (n, e)."""
    return torch.zeros(N, E).scatter_add(1, mixture.idx, mixture.weight.detach())


@pytest.mark.parametrize("k", [1, 3])
def test_without_shared_adapters_it_is_meteora(k):
    """Without it the two could differ in more than what the method adds."""
    known = torch.arange(E) != 4
    gate, x = gate_of(k, [], known, 0.7)
    got = gate(x, None, None)
    want = MeteoraGate(gate.weight.data, k, 0.7, known)(x, None, None)
    assert torch.equal(got.idx, want.idx)
    torch.testing.assert_close(got.weight, want.weight)


def test_with_all_adapters_it_is_a_dense_softmax():
    """Without it the shared adapters could have a denominator of their own."""
    gate, x = gate_of(E, [8, 2], temperature=1.7)
    torch.testing.assert_close(dense(gate(x, None, None)), F.softmax(x @ gate.weight.data.T / 1.7, -1))


def test_it_is_its_equation():
    """Without it an unknown slot could be chosen, or a shared one twice: here in float64, token by
    token."""
    known = torch.ones(E, dtype=torch.bool)
    known[[0, 5]] = False
    gate, x = gate_of(5, [8, 2], known, 1.3)
    got = dense(gate(x, None, None))
    for row in range(N):
        z = (gate.weight.data.double() @ x[row].double() / 1.3).tolist()
        routed = sorted((j for j in range(E) if j not in (0, 5, 8, 2)), key=lambda j: -z[j])[:3]
        used = [8, 2, *routed]
        e_z = {j: torch.tensor(z[j]).double().exp() for j in used}
        want = torch.zeros(E, dtype=torch.float64)
        for j in used:
            want[j] = e_z[j] / sum(e_z.values())
        torch.testing.assert_close(got[row].double(), want, atol=1e-5, rtol=1e-5)


def test_the_gate_term_leaves_the_shared_adapters_alone():
    """Without it the term teaches the gate that the shared adapter is wrong for every token; the LM
    loss alone, through the weights, trains its row."""
    gate, x = gate_of(3, [8])
    loss = GateLoss({"one": gate})
    mixture = gate(x, None, None)
    loss(torch.arange(N) % 7)[0].backward(retain_graph=True)
    grad = gate.weight.grad.clone()
    assert grad[8].abs().max() == 0 and grad[:7].abs().max() > 0.01
    logits = x @ gate.weight.data.T
    logits[:, 8] = float("-inf")
    torch.testing.assert_close(gate.logits, logits)
    mixture.weight[:, 0].sum().backward()
    assert (gate.weight.grad - grad)[8].abs().max() > 0.01


# In use -------------------------------------------------------------------------------------------


def shared_weights(mole, **how):
    """Weights (m, n, e) of one prompt by ase_top2, and the slots of the pool that is attached."""
    set_methods(mole, ["ase_top2"], **how)
    with Recorder(mole.model, 11) as recorder, torch.no_grad():
        mole.model(IDS[:1])
    pool = mole.attached[1]
    return recorder.read(11), {name: pool.slot(name) for name in pool.names}


def test_every_token_uses_the_shared_adapter_and_none_that_is_hidden(mole):
    """Without it --ood measures tasks with their own adapter, or hides what the method stands on."""
    weights, slot = shared_weights(mole, exclude=("bee",))
    assert slot.keys() == {*NAMES, "lora_b"}
    assert (weights[..., slot["lora_b"]] > 0).all() and (weights[..., slot["bee"]] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    assert ((weights > 0).sum(-1) == 2).all()
    with pytest.raises(InputError, match="ase_top2.safetensors: a shared adapter is excluded"):
        set_methods(mole, ["ase_top2"], exclude=["lora_b"])
    with pytest.raises(InputError, match="every adapter is excluded"):
        set_methods(mole, ["ase_top2"], exclude=NAMES)


def test_it_is_all_of_them_attached_by_hand(mole, small_model, folder):
    """Without it the shared adapter could have another scale or rank, or rows could go by slot."""
    paths = {"lora_b": folder / "baselines" / "lora_b", **read_pool(folder).adapters}
    model = load_llama(small_model)
    pool = Pool.load(dict(reversed(paths.items())), mole.shapes)
    tensors, metadata = read_safetensors(folder / "gates" / "ase_top2.safetensors")
    gates = ase_gates(pool, 2, shared=["lora_b"])
    for path, gate in gates.items():
        for row, name in enumerate(metadata["names"].split("\n")):
            gate.weight.data[pool.slot(name)] = tensors[f"{path}.gate.weight"][row]
    attach(model, pool, gates)
    with torch.no_grad():
        assert close(logits_of(mole, ["ase"] * 2), model(IDS[:2]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_other_method_sees_the_shared_adapter(small_model, folder, dtype):
    """A pool with one more adapter is another pool: uniform, Arrow and what is bound to the adapters
    as they are on disk, here in another dtype, must stay as they were."""
    mole = load(small_model, folder, dtype=dtype)
    before = logits_of(mole, ["uniform"])
    shapes = dict(mole.pool.shapes)
    assert not close(logits_of(mole, ["ase"]), before, 0.01)
    assert mole.pool.names == list(NAMES) and mole.pool.shapes == shapes
    assert torch.equal(logits_of(mole, ["uniform"]), before)
    logits_of(mole, ["meteora_top2"])


def test_adapters_join_a_copy_of_a_pool(mole):
    """Without it a shared adapter of further Linears or a larger rank changes the pool it is copied
    from."""
    q, v = [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    some = {path: mole.shapes[path] for path in (q, v)}
    narrow = random_adapter("narrow", some, 2, targets=["q_proj"])
    wide = random_adapter("wide", some, 5, seed=1)
    pool = Pool.of([narrow], some)
    both = pool.joined_by([wide])
    assert (pool.names, pool.rank, pool.capacity, list(pool.A)) == (["narrow"], 2, 1, [q])
    assert pool.shapes.keys() == {q} and both.A.keys() == {q, v}
    for adapter in (narrow, wide):
        held = both.adapter(adapter.name)
        assert all(torch.equal(held.A[path], a) for path, a in adapter.A.items())
        assert all(torch.equal(held.B[path], b) for path, b in adapter.B.items())


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "pool")


BROKEN = {
    "none": (None, r"metadata has shared '', expected some of its names: python train.py gates --kind ase"),
    "a stranger": ("lora_f", "metadata has shared 'lora_f', expected some"),
    "too many": ("lora_b\nant", "shared adapter 'ant': no folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_of_other_shared_adapters(name, small_model, copy):
    """Without it a damaged name is a KeyError, or the gates weigh an adapter that they never saw."""
    shared, says = BROKEN[name]
    file = copy / "gates" / "ase_top2.safetensors"
    tensors, metadata = read_safetensors(file)
    del metadata["shared"]
    write_safetensors(file, tensors, metadata | ({"shared": shared} if shared else {}))
    with pytest.raises(InputError, match=says):
        check_name(find_mole(small_model, copy), "ase")  # before any weights are read


def test_a_shared_adapter_that_is_gone_or_has_changed(small_model, copy):
    """Without it gates weigh another adapter than the one they were trained with."""
    shutil.rmtree(copy / "baselines" / "lora_b")
    with pytest.raises(InputError, match="no folder .*lora_b: python train.py adapters --joint lora_b makes"):
        check_name(find_mole(small_model, copy), "ase")
    shutil.copytree(copy / "baselines" / "lora_f", copy / "baselines" / "lora_b")
    with pytest.raises(InputError, match=r"other adapters: lora_b \(trained with .*--kind ase --top_k 2"):
        set_methods(load(small_model, copy), ["ase"])


# Training -----------------------------------------------------------------------------------------


def ase_run(small_model, folder, **more):
    """Options of a small run over a pool that has a lora_b."""
    o = options("top2", small_model, folder / "pool", steps=4, lr=5e-2)
    paths = {"model": o.model, "tasks": o.tasks, "pool": o.pool}
    joint = AdaptersRun(**paths, joint="lora_b", r=7, steps=2, batch_size=1, lr=0.05)
    train_adapters(joint, SAMPLING)
    return AseRun(**paths, **{"kind": "ase", "steps": 4, "batch_size": 4, "lr": 5e-2} | more)


@pytest.mark.parametrize("too", [False, True])
def test_it_answers_as_it_was_trained(too, small_model, tmp_path, monkeypatch):
    """Without it rows or shared adapters come back as others. With --adapters_too those trained, the
    shared one with them, are a pool of their own, where it is no task's adapter; the old pool stays."""
    held = {}
    save = train_gates.save_gates
    attached = Ase.training

    def keep(file, gates, pool, *others):
        held["gates"] = gates
        save(file, gates, pool, *others)

    def keep_pool(model, pool, args):
        held["pool"] = pool
        return attached(model, pool, args)

    monkeypatch.setattr(train_gates, "save_gates", keep)
    monkeypatch.setattr(Ase, "training", keep_pool)
    new = tmp_path / "new" if too else tmp_path / "pool"
    o = ase_run(small_model, tmp_path, adapters_too=str(new) if too else "", adapter_lr=1e-2)
    before = {f: f.read_bytes() for f in Path(o.pool).rglob("*") if f.is_file()}
    train_gates.train_gates(o, {"ase": Ase})
    if too:
        assert {f: f.read_bytes() for f in Path(o.pool).rglob("*") if f.is_file()} == before
    assert read_pool(new).adapters.keys() == {"animals", "plurals"}
    metadata = read_metadata(new / "gates" / "ase_top2.safetensors")
    assert (metadata["shared"], metadata["k"]) == ("lora_b", "2")
    assert metadata["names"].split("\n") == ["animals", "plurals", "lora_b"]
    old = load_adapter(Path(o.pool) / "baselines" / "lora_b")
    assert (load_adapter(new / "baselines" / "lora_b").hash != old.hash) == too
    ids = torch.tensor([examples(o.model, 1)[0].ids])
    model = load_llama(small_model)
    attach(model, held["pool"], held["gates"])
    mole = load(o.model, new)
    with torch.no_grad():
        assert close(logits_of(mole, ["ase_top2"], ids), model(ids))
        assert not close(logits_of(mole, ["adapter:animals"], ids), model(ids), 0.01)
    assert answer(mole, "the fox", method="ase", max_new_tokens=3)


REFUSED = {
    "no such folder": (
        ["--shared=lora_c"],
        "'lora_c': no folder .*baselines/lora_c: python train.py adapters",
    ),
    "a path": (["--shared=../adapters/plurals"], "shared adapter '../adapters/plurals': no folder"),
    "twice": (["--shared=lora_b", "--shared=lora_b"], "--shared: lists a name twice: 'lora_b'"),
    "in the pool": (["--shared=plurals"], "--shared plurals: an adapter of the pool has that name"),
    "k 1": (["--top_k=1"], "--top_k is 1, expected 2 to 3: all of --shared and some of"),
    "k 4": (["--top_k=4"], "--top_k is 4, expected 2 to 3: all of --shared"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_one_line(case, small_model, tmp_path, monkeypatch, capsys):
    """A typo must end before the training, and name itself."""
    args, says = REFUSED[case]
    o = options("top2", small_model, tmp_path / "pool", steps=1)
    plain = [line for line in argv(o) if not line.startswith(("--fit", "--l2", "--kind", "--top_k"))]
    with pytest.raises(InputError, match=says):
        main(monkeypatch, *plain, "--kind", "ase", *args)
    assert not (tmp_path / "pool" / "gates").exists()
