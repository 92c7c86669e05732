"""eval.py: the figures of the README are what it counts."""

import json

import pytest
import torch
from conftest import assert_refused, command, write_adapters

import eval as evaluation
from adapters import TEMPLATE, PoolFolder, write_pool
from files import write_json, write_jsonl
from generate import answer, load
from model import load_llama
from moe_lora import MeteoraGate, save_gates

NAMES = ["ant", "bee"]


@pytest.fixture(scope="module")
def setting(small_model, tmp_path_factory):
    """A pool of two adapters whose top-1 gates always choose bee, but in q of layer 0, where they choose ant; and a
    task for each adapter, of 3 and 5 examples."""
    folder = tmp_path_factory.mktemp("eval")
    model = load_llama(small_model)
    adapters = write_adapters(folder / "pool" / "adapters", model, NAMES, size=0.1)
    write_pool(PoolFolder(folder / "pool", adapters, model.fingerprint, TEMPLATE))
    pool = load(small_model, folder / "pool").pool
    gates = {path: MeteoraGate(torch.zeros(2, A.shape[2]), 1) for path, A in pool.A.items()}
    for path, gate in gates.items():
        gate.forced = pool.slot("ant" if path == "model.layers.0.self_attn.q_proj" else "bee")
    save_gates(folder / "pool" / "gates" / "meteora_top1.safetensors", gates, pool, 1, pool.names)
    for name, count in zip(NAMES, (3, 5), strict=True):
        rows = [{"prompt": f"{'fox ' * j}dog", "response": "the lazy dog"} for j in range(1, count + 1)]
        write_json(folder / "tasks" / name / "task.json", {"metric": "exact_match"})
        for split in ("train", "test"):
            write_jsonl(folder / "tasks" / name / f"{split}.jsonl", rows)
    return small_model, folder / "pool", folder / "tasks", {path: gate.forced for path, gate in gates.items()}


def test_gate_accuracy_counts_response_tokens_and_leaves_out_the_blind_gates(setting, monkeypatch):
    """Prompt tokens counted among the response's, or layer 0's q, k, v in the mean, make the headline figure of the
    gates another number that still looks right."""
    model, pool, tasks, forced = setting
    mole = load(model, pool)
    forward = MeteoraGate.forward

    def always(self, x, sample, ax):  # the gate's logits put the forced slot first
        loss, self.loss = self.loss, None
        mixture = forward(self, x, sample, ax)
        self.loss = loss
        if loss is not None:
            path = list(forced)[loss.index]
            loss.add(torch.eye(2)[forced[path]].expand(x.shape[0], 2) * 5)
        return mixture

    monkeypatch.setattr(MeteoraGate, "forward", always)
    loaded = evaluation.load_tasks(tasks)
    o = evaluation.Options(batch_size=3)
    got = evaluation.gate_accuracy(mole, loaded, "meteora_top1", o)
    each = len(mole.tokenizer.encode("the lazy dog", start=False)) + 1  # and EOS
    assert got["tokens"] == 8 * each
    assert got["right"] == round(100 * 5 / 8, 2)  # bee's own examples
    assert got["first_qkv"] == round((100 * 3 / 8 + 2 * 100 * 5 / 8) / 3, 2)  # q chooses ant, k and v bee


def test_results_are_the_scores_of_the_answers_the_same_each_time(setting, tmp_path):
    """A mean over the wrong things, or an oracle that uses another adapter, would be published as it is."""
    model, pool, tasks, _ = setting
    args = ["eval.py", "--model", model, "--pool", pool, "--tasks", tasks, "--max_new_tokens", 5, "--batch_size", 2]
    args += ["--methods", "base,oracle,adapter:ant,meteora_top1"]
    runs = [command(*args, "--out", tmp_path / name) for name in ("one", "two")]
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout == (tmp_path / "one" / "results.md").read_text()
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    one["meta"]["options"].pop("out"), two["meta"]["options"].pop("out")
    assert one == two and one["setting"] == "iid" and list(one["methods"]) == args[-1].split(",")
    for method in one["methods"].values():
        scores = [score["score"] for score in method["tasks"].values()]
        assert method["mean"] == round(sum(scores) / 2, 2)
        assert [score["n"] for score in method["tasks"].values()] == [3, 5]
    mole = load(model, pool)
    for row in map(json.loads, (tmp_path / "one" / "answers.jsonl").read_text().splitlines()):
        used = f"adapter:{row['task']}" if row["method"] == "oracle" else row["method"]
        assert row["answer"] == answer(mole, row["prompt"], method=used, max_new_tokens=5)[0], row


def test_the_table_shows_what_the_results_hold():
    """A cell under another method's name is the worst that a table can do."""
    cell = {"score": 50.0, "low": 20.0, "high": 80.0, "n": 7, "metric": "bleu"}
    other = cell | {"score": 12.34, "low": 1.0, "high": 31.0}
    results = {"base": {"mean": 12.34, "tasks": {"t": other}}, "oracle": {"mean": 50.0, "tasks": {"t": cell}}}
    assert evaluation.table(results, ["t"]).splitlines() == [
        "| task | n | base | oracle |",
        "|---|---|---|---|",
        "| t (bleu) | 7 | 12.3 [1.0, 31.0] | 50.0 [20.0, 80.0] |",
        "| mean | | 12.3 | 50.0 |",
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch_size", 0], ["--batch_size is 0", "at least 1"]),
        (["--limit", -1], ["--limit is -1", "at least 0"]),
        (["--methods", ","], ["--methods"]),
        (["--dtype", "int3"], ["int3", "bfloat16"]),
        (["--methods", "base,metora"], ["metora", "meteora"]),
        (["--only", "no_such_task"], ["no_such_task"]),
        (["--gate_temperature", 0], ["--gate_temperature is 0", "more than 0"]),
    ],
)
def test_bad_options_are_refused_before_any_work(args, words):
    """Otherwise an hour of generating ends in a traceback, or a typo in a table of nonsense."""
    assert_refused(command("eval.py", *args), *words)
