"""methods/controls.py: what is chosen is random, of a known size, and a function of seed and names alone."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from common.files import InputError
from evaluation.routing import effective_number
from helpers_methods import IDS, NAMES, close, logits_of
from helpers_models import random_adapter
from methods.batch import find_method, retrieve
from methods.controls import random_gates
from methods.protocol import member_mask
from pool.slots import Pool

PATH = "model.layers.0.mlp.down_proj"
I = 401  # noqa: E741


def pool_of(names):
    """Adapters of rank 1 on one Linear (7, I)."""
    shapes = {PATH: (7, I)}
    return Pool.of([random_adapter(name, shapes, 1) for name in names], shapes)


def inputs(n, seed=3):
    return torch.randn(n, I, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@torch.no_grad()
def test_logits_have_variance_1_in_every_linear(size):
    """With logits near 0 a random gate is `uniform` over its k, with large ones always one adapter: a
    control of another kind. The inputs of a Llama's Linears differ in size by orders."""
    pool = pool_of([f"adapter{j}" for j in range(53)])
    gate = random_gates(pool, 2)[PATH]
    gate.keep_logits = True
    x = inputs(97) * size
    mixture = gate(x, torch.zeros(97, dtype=torch.int64), None)
    assert gate.logits.var() == pytest.approx(1, rel=0.05) and gate.logits.mean().abs() < 0.05
    assert 0.02 < (mixture.weight[:, 0] - 0.5).std() < 0.25 and mixture.weight[:, 0].mean() > 0.55
    assert 1.6 < effective_number(mixture.weight).mean() < 1.95  # of 2 even ones it is 2
    used = Counter(mixture.idx.flatten().tolist())
    assert len(used) > 40  # tokens differ in what they use


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0)])
@torch.no_grad()
def test_weights_are_the_softmax_over_the_k_largest(k, temperature):
    """Another normalisation than MeteoRA's, and what a trained gate is better by isn't its training."""
    pool = pool_of(["ant", "bee", "cat", "dog"])
    known = member_mask(pool, exclude=("bee",))
    gate = random_gates(pool, k, temperature, known)[PATH]
    x = inputs(11)
    mixture = gate(x, torch.zeros(11, dtype=torch.int64), None)
    for token in range(11):
        row = x[token].double()
        logits = gate.weight.double() @ (row / row.square().mean().sqrt())
        logits[pool.slot("bee")] = float("-inf")
        top, idx = logits.topk(k)
        assert mixture.idx[token].tolist() == idx.tolist()
        weight = (top / temperature).softmax(-1).float()
        torch.testing.assert_close(mixture.weight[token], weight, rtol=1e-5, atol=1e-6)


def rows_of(names, seed=0):
    pool = pool_of(names)
    G = random_gates(pool, 2, seed=seed)[PATH].weight
    return {name: G[pool.slot(name)].tolist() for name in names}


def test_a_row_is_the_adapters_own():
    """A row that goes by slots changes with the pool's order, and with --ood the other adapters' rows
    would change, too."""
    rows = rows_of(["ant", "bee", "cat"])
    assert rows_of(["cat", "ant", "bee"]) == rows == {**rows, **rows_of(["cat", "bee"])}
    assert len(set(map(tuple, rows.values()))) == 3
    assert rows_of(["ant"], seed=1)["ant"] != rows["ant"]


def test_each_linear_has_a_gate_of_its_own():
    """One G for all Linears of a size would choose alike in all layers."""
    shapes = {PATH: (7, I), PATH.replace("0", "1"): (7, I)}
    gates = random_gates(Pool.of([random_adapter("ant", shapes, 1)], shapes), 1)
    first, second = (gate.weight for gate in gates.values())
    assert not torch.equal(first, second)


@torch.no_grad()
def test_names_say_k_and_seed(mole):
    """A seed that is read and not used gives the same figure three times, with no spread."""
    usual = logits_of(mole, ["random_gate"])
    assert close(logits_of(mole, ["random_gate_top2:0"]), usual, 0)
    for other in ("random_gate:1", "random_gate_top1", "random_gate_top3", "uniform"):
        assert not close(logits_of(mole, [other]), usual, 1e-3), other
    logits_of(mole, ["random_gate", "random_gate_top2", "adapter:ant"])  # of one key: they share a batch
    sharp = logits_of(mole, ["random_gate"], gate_temperature=1e-4)
    assert close(sharp, logits_of(mole, ["random_gate_top1"]))
    for wrong in ("random_gate:", "random_gate:x", "random_gate_top0", "random_adapters:-1"):
        with pytest.raises(InputError, match="no method"):
            find_method(mole, wrong)


def drawn(method, prompts, names=NAMES, k=3, exclude=()):
    """The adapters that a method draws for each prompt, from a pool of `names`."""
    mole = SimpleNamespace(custom_gates={}, pool=SimpleNamespace(names=list(names)))
    found = retrieve(mole, [method] * len(prompts), prompts, k, exclude)
    return [[name for name, _ in ranking] for ranking in found]


def test_adapters_are_drawn_for_each_prompt():
    """Drawn once for all, the control would be one fixed mixture; drawn anew for the same prompt, no
    two runs would agree."""
    names = ["ant", "bee", "cat", "dog", "eel"]
    prompts = [f"prompt {j}" for j in range(500)]
    found = drawn("random_adapters", prompts, names, k=2)
    assert {len(set(one)) for one in found} == {2}
    assert drawn("random_adapters", prompts[::-1], names[::-1], k=2) == found[::-1]
    counts = Counter(sum(found, []))
    assert counts.keys() == set(names) and max(abs(count - 200) for count in counts.values()) < 45
    assert [one[:1] for one in found] == drawn("random_adapters_top1", prompts, names)
    assert drawn("random_adapters_top1:7", prompts, names) != drawn("random_adapters_top1", prompts, names)
    hidden = drawn("random_adapters", prompts, names, k=4, exclude=("bee",))
    whole = drawn("random_adapters", prompts, names, k=5)
    assert hidden == [[name for name in one if name != "bee"] for one in whole]


def test_drawn_adapters_weigh_the_same(mole):
    """Weighed by the scores that ranked them, the control would be another mixture."""
    found = retrieve(mole, ["random_adapters"], ["the fox"], 2)
    names = [name for name, _ in found[0]]
    same = ",".join(f"{name}=0.5" for name in names)
    mixed = logits_of(mole, [f"mix:{same}"], IDS)
    assert close(logits_of(mole, ["random_adapters"], IDS, retrieved=found), mixed)
