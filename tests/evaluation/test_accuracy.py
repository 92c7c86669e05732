"""evaluation/accuracy.py: the accuracy of each gate is what a plain count of its first choices finds."""

from collections import Counter

import pytest
import torch

from common.template import TEMPLATE
from eval import Options
from evaluation.accuracy import FIRST_QKV, gate_accuracy
from helpers_models import load_mole, random_gates, write_adapters
from methods.batch import set_methods
from model import load_llama
from moe_lora import attached
from pool.folder import PoolFolder, write_pool
from pool.gate_files import save_gates
from tasks.folders import Task

ROWS = {
    "ant": [("the fox", "the lazy dog"), ("sort these words", "the quick fox jumps")],
    "bee": [("what is the mouse", "brown"), ("over the dog the", "quick words"), ("for me", "the plural")],
    "cat": [("jumps over", "the dog sort these")],
}


@pytest.fixture(scope="module", params=[1, 2])
def gated(small_model, tmp_path_factory, request):
    """A pool of three adapters with random gates of top-1 or top-2, its tasks, and the method's name."""
    folder = tmp_path_factory.mktemp("accuracy") / "pool"
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
    found = gate_accuracy(mole, tasks, method, Options())
    assert list(found["linears"]) == list(attached(mole.model)) and found["tokens"] == tokens
    expected = {path: round(100 * right[path] / tokens, 2) for path in attached(mole.model)}
    assert found["linears"] == expected
    assert len(set(expected.values())) > 5  # else one gate's share could stand for another's
    shares = {path: right[path] / tokens for path in expected}
    for key, group in (("first_qkv", FIRST_QKV), ("right", expected.keys() - FIRST_QKV)):
        assert found[key] == round(100 * sum(shares[path] for path in group) / len(group), 2)
