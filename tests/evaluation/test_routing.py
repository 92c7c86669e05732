"""evaluation/routing.py: what a plain loop over tokens and Linears finds of the same weights."""

from collections import Counter

import pytest
import torch

from common.template import TEMPLATE
from eval import Options
from evaluation.routing import FIRST_QKV, measure_routing
from helpers_models import load_mole, random_gates, write_adapters
from methods.batch import retrieve, set_methods
from methods.protocol import Gated
from model import load_llama
from moe_lora import Recorder, attached
from pool.folder import PoolFolder, write_pool
from pool.gate_files import save_gates
from pool.slots import Pool
from tasks.folders import Task

ROWS = {
    "ant": [("the fox", "the lazy dog"), ("sort these words", "the quick fox jumps")],
    "bee": [("what is the mouse", "brown"), ("over the dog the", "quick words"), ("for me", "the plural")],
    "cat": [("jumps over", "the dog sort these")],
}


@pytest.fixture(scope="module", params=[1, 2])
def gated(small_model, tmp_path_factory, request):
    """A pool of three adapters with random gates of top-1 or top-2, its tasks, and the method's name."""
    folder = tmp_path_factory.mktemp("routing") / "pool"
    base = load_llama(small_model)
    write_pool(
        PoolFolder(folder, write_adapters(folder / "adapters", base, ROWS), base.fingerprint(), TEMPLATE)
    )
    pool = load_mole(small_model, folder).pool
    k = request.param
    gates = random_gates(pool, k, seed=11)
    file = folder / "gates" / f"meteora_top{k}.safetensors"
    save_gates(file, gates, pool, k, pool.names, base.fingerprint())
    tasks = {}
    for name, pairs in ROWS.items():
        rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
        tasks[name] = Task(name, "exact_match", rows, rows)
    return load_mole(small_model, folder, fast=False), tasks, f"meteora_top{k}"


def first_choices(mole, ids, method):
    """{module path: [the first choice at each token]} of one sequence: G x in float64, the input of each
    gated Linear caught on its way in."""
    set_methods(mole, [method])
    inputs = {}
    hooks = []
    for path, linear in attached(mole.model).items():

        def keep(module, args, path=path):
            inputs[path] = args[0].double()

        hooks.append(linear.register_forward_pre_hook(keep))
    with torch.inference_mode():
        mole.model.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    gates = {path: linear.gate.inner.weight.double() for path, linear in attached(mole.model).items()}
    return {path: (x.reshape(len(ids), -1) @ gates[path].T).argmax(-1).tolist() for path, x in inputs.items()}


def test_accuracy_of_each_linear_is_the_share_of_right_first_choices(gated):
    """Counts under another gate's path, of a prompt's tokens or of padding would look like a finding about
    layers: a heat map of the gates is drawn from them."""
    mole, tasks, method = gated
    right = Counter()
    tokens = 0
    for name, task in tasks.items():
        for row in task.test:
            prompt = mole.tokenizer.encode(TEMPLATE.replace("{prompt}", row["prompt"]))
            response = [*mole.tokenizer.encode(row["response"], start=False), mole.tokenizer.eos_id]
            tokens += len(response)
            for path, chosen in first_choices(mole, prompt + response, method).items():
                right[path] += chosen[len(prompt) :].count(mole.pool.slot(name))
    found = measure_routing(mole, tasks, method, Options())["gates"]
    assert list(found["linears"]) == list(attached(mole.model)) and found["tokens"] == tokens
    expected = {path: round(100 * right[path] / tokens, 2) for path in attached(mole.model)}
    assert found["linears"] == expected
    assert len(set(expected.values())) > 5  # else one gate's share could stand for another's
    shares = {path: right[path] / tokens for path in expected}
    for key, group in (("first_qkv", FIRST_QKV), ("right", expected.keys() - FIRST_QKV)):
        assert found[key] == round(100 * sum(shares[path] for path in group) / len(group), 2)


@pytest.fixture(scope="module")
def mole(small_model, pool_with_every_part):
    return load_mole(small_model, pool_with_every_part, fast=False)


def by_hand(mole, tasks, method, hidden=lambda name: (), k=3):
    """(ESS, {adapter: share of the weight in %}, tokens): each example alone, token by token, in float64."""
    ess = []
    load = dict.fromkeys(mole.pool.names, 0.0)
    tokens = 0
    for name, task in tasks.items():
        for row in task.test:
            used = f"adapter:{name}" if method == "oracle" else method
            prompt = mole.tokenizer.encode(TEMPLATE.replace("{prompt}", row["prompt"]))
            ids = prompt + [*mole.tokenizer.encode(row["response"], start=False), mole.tokenizer.eos_id]
            found = retrieve(mole, [used], [row["prompt"]], k, hidden(name), [prompt])
            set_methods(mole, [used], retrieved=found, exclude=hidden(name))
            mole.prompt.mask = (torch.arange(len(ids)) < len(prompt))[None]
            with torch.inference_mode(), Recorder(mole.model, len(ids)) as recorder:
                mole.model.model(torch.tensor([ids]))
            mole.prompt.mask = None
            tokens += len(ids) - len(prompt)
            for linear in recorder.read(len(ids)).double().tolist():
                for weights in linear[len(prompt) :]:
                    weights = [abs(weight) for weight in weights]
                    if any(weights):
                        ess.append(sum(weights) ** 2 / sum(weight**2 for weight in weights))
                    for adapter in load:
                        load[adapter] += weights[mole.pool.slot(adapter)]
    total = sum(load.values())
    return sum(ess) / len(ess), {name: 100 * weight / total for name, weight in load.items()}, tokens


EVERY = ["oracle", "mix:ant=0.5,bee=-1.5", "meteora_top2", "loraflow", "smear", "arrow", "ramole", "logo",
         "selection", "random_gate", "random_adapters"]  # fmt: skip


CASES = [(method, False) for method in EVERY] + [(method, True) for method in EVERY if "mix" not in method]


@pytest.mark.parametrize(("method", "ood"), CASES)
def test_ess_and_load_are_those_of_a_loop(mole, method, ood):
    """With prompts or padding counted, another request's adapters, or negative weights that cancel
    out, the numbers look like any others; without its hidden adapter a task must be measured, too."""
    tasks = {name: Task(name, "exact_match", [], [dict(zip(("prompt", "response"), pair, strict=True))
             for pair in pairs]) for name, pairs in ROWS.items()}  # fmt: skip
    found = measure_routing(mole, tasks, method, Options(ood=ood, retrieve=2))
    hides = ood and method != "oracle"
    ess, load, tokens = by_hand(mole, tasks, method, lambda name: (name,) if hides else (), k=2)
    routing = found["routing"]
    assert routing["ess"] == pytest.approx(ess, abs=6e-4) and routing["tokens"] == tokens
    assert routing["load"] == pytest.approx(load, abs=6e-3) and sum(load.values()) == pytest.approx(100)
    assert ("gates" in found) == (method == "meteora_top2" and not ood)


@pytest.mark.parametrize("method", ["base", "average_ab", "ties_ba", "lorahub:fox", "lora_f", "fusion"])
def test_what_has_no_weights_reports_none(mole, method):
    """One adapter that is merged from all weighs 1: an ESS of 1 would say that it is a choice."""
    row = {"prompt": "the fox", "response": "the dog"}
    tasks = {"ant": Task("ant", "exact_match", [], [row])}
    assert measure_routing(mole, tasks, method, Options()) == {}


@pytest.mark.parametrize("method", ["arrow", "meteora_top2"])
def test_slots_are_those_of_the_attached_pool(small_model, pool_with_every_part, monkeypatch, method):
    """A method may choose from a pool of its own: by mole.pool's slots each adapter would get another's
    load, and gates would be right where they choose a wrong one."""
    rows = [{"prompt": prompt, "response": response} for prompt, response in ROWS["bee"]]
    tasks = {"bee": Task("bee", "exact_match", [], rows)}
    usual = measure_routing(load_mole(small_model, pool_with_every_part), tasks, method, Options())

    def reversed_pool(self, mole):
        return Pool.of([mole.pool.adapter(name) for name in mole.pool.names[::-1]], mole.pool.shapes)

    monkeypatch.setattr(Gated, "pool_of", reversed_pool)
    mole = load_mole(small_model, pool_with_every_part)
    found = measure_routing(mole, tasks, method, Options())
    assert mole.attached[1].names == mole.pool.names[::-1]
    assert found["routing"]["load"] == pytest.approx(usual["routing"]["load"], abs=0.02)
    assert len(set(found["routing"]["load"].values())) == 3 and found.get("gates") == usual.get("gates")


def test_an_example_that_the_model_cannot_read_is_left_out(small_model, pool_with_every_part):
    """It would end an evaluation of hours after all of its answers were there."""
    mole = load_mole(small_model, pool_with_every_part, fast=False)
    short = {"prompt": "the fox", "response": "the dog"}
    long = {"prompt": "the fox", "response": "the dog " * 97}
    alone, both, neither = (
        measure_routing(mole, {"ant": Task("ant", "exact_match", [], rows)}, "arrow", Options())
        for rows in ([short], [short, long], [long])
    )
    assert alone == both and alone["routing"]["tokens"] > 0 and neither == {}
    mole.tokenizer.eos_id = None
    assert measure_routing(mole, {"ant": Task("ant", "exact_match", [], [short])}, "arrow", Options()) == {}
