"""eval.py: the figures of the README are what it counts."""

import hashlib
import io
import json
import os
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from sacrebleu import corpus_bleu

import eval as evaluation
from common.endings import run_script
from common.files import write_json, write_jsonl
from common.locks import alone
from common.template import TEMPLATE
from common.tensors import read_safetensors, write_safetensors
from evaluation import answers
from evaluation import composites as composing
from generate import answer, load
from helpers_commands import assert_refused, command
from helpers_models import tokenizer_bytes, write_adapters, write_llama
from methods.ramole import router_loras, save_routers
from model import load_llama
from moe_lora import MeteoraGate, attached
from pool.cosines import describe_cosines
from pool.folder import PoolFolder, write_pool
from pool.gate_files import save_gates
from tasks.folders import load_tasks

NAMES = ["ant", "bee"]


@pytest.fixture(scope="module")
def setting(small_model, tmp_path_factory):
    """A pool of two adapters whose top-1 gates always choose bee, but in q of layer 0, where they
    choose ant; and a task for each adapter, of 3 and 5 examples."""
    folder = tmp_path_factory.mktemp("eval")
    model = load_llama(small_model)
    adapters = write_adapters(folder / "pool" / "adapters", model, NAMES, size=0.1)
    write_pool(PoolFolder(folder / "pool", adapters, model.fingerprint(), TEMPLATE))
    pool = load(small_model, folder / "pool").pool
    gates = {path: MeteoraGate(torch.zeros(2, A.shape[2]), 1) for path, A in pool.A.items()}
    for path, gate in gates.items():
        gate.forced = pool.slot("ant" if path == "model.layers.0.self_attn.q_proj" else "bee")
    save_gates(
        folder / "pool" / "gates" / "meteora_top1.safetensors",
        gates,
        pool,
        1,
        pool.names,
        model.fingerprint(),
    )
    for name, count in zip(NAMES, (3, 5), strict=True):
        rows = [{"prompt": f"{'fox ' * j}dog", "response": "the lazy dog"} for j in range(1, count + 1)]
        write_json(folder / "tasks" / name / "task.json", {"metric": "exact_match"})
        for split in ("train", "test"):
            write_jsonl(folder / "tasks" / name / f"{split}.jsonl", rows)
    return small_model, folder / "pool", folder / "tasks", {path: gate.forced for path, gate in gates.items()}


def test_gate_accuracy_counts_response_tokens_and_leaves_out_the_blind_gates(setting, monkeypatch):
    """Prompt tokens counted among the response's, or layer 0's q, k, v in the mean, make the
    headline figure of the gates another number that still looks right."""
    model, pool, tasks, forced = setting
    mole = load(model, pool, fast=False)
    forward = MeteoraGate.forward

    def always(self, x, sample, ax):  # the gate's logits put the forced slot first
        mixture = forward(self, x, sample, ax)
        path = next(path for path, linear in attached(mole.model).items() if linear.gate.inner is self)
        self.logits = torch.eye(2)[forced[path]].expand(x.shape[0], 2) * 5
        return mixture

    monkeypatch.setattr(MeteoraGate, "forward", always)
    loaded = load_tasks(tasks)
    o = evaluation.Options(batch_size=3)
    got = evaluation.measure_routing(mole, loaded, "meteora_top1", o)["gates"]
    each = len(mole.tokenizer.encode("the lazy dog", start=False)) + 1  # and EOS
    assert got["tokens"] == 8 * each
    assert got["right"] == round(100 * 5 / 8, 2)  # bee's own examples
    assert got["first_qkv"] == round((100 * 3 / 8 + 2 * 100 * 5 / 8) / 3, 2)  # q chooses ant, k and v bee


def test_results_are_the_scores_of_the_answers_the_same_each_time(setting, tmp_path):
    """A mean over the wrong things, or an oracle that uses another adapter, would be published as
    it is."""
    model, pool, tasks, forced = setting
    args = ["eval.py", "--model", model, "--pool", pool, "--tasks", tasks]
    args += ["--max_new_tokens", 5, "--batch_size", 2]
    args += ["--methods", "base,oracle,adapter:ant,meteora_top1"]
    runs = [command(*args, "--out", tmp_path / name) for name in ("one", "two")]
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout == (tmp_path / "one" / "results.md").read_text()
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one == two and one["setting"] == "iid" and list(one["methods"]) == args[-1].split(",")
    for method in one["methods"].values():
        scores = [score["score"] for score in method["tasks"].values()]
        assert method["mean"] == round(sum(scores) / 2, 2)
        assert [score["n"] for score in method["tasks"].values()] == [3, 5]
    assert one["methods"]["meteora_top1"]["gates"]["linears"].keys() == forced.keys()  # a gate each
    mole = load(model, pool)
    for row in map(json.loads, (tmp_path / "one" / "answers.jsonl").read_text().splitlines()):
        used = f"adapter:{row['task']}" if row["method"] == "oracle" else row["method"]
        assert row["answer"] == answer(mole, row["prompt"], method=used, max_new_tokens=5)[0], row


def test_the_table_shows_what_the_results_hold():
    """A cell under another method's name is the worst that a table can do."""
    cell = {"score": 50.0, "low": 20.0, "high": 80.0, "n": 7, "metric": "bleu"}
    other = cell | {"score": 12.34, "low": 1.0, "high": 31.0}
    results = {
        method: evaluation.mean_of({"t": one}) | {"tasks": {"t": one}}
        for method, one in (("base", other), ("oracle", cell))
    }
    assert evaluation.table(results, ["t"], "oracle").splitlines() == [
        "| task | n | base | oracle |",
        "|---|---|---|---|",
        "| t (bleu) | 7 | 12.3 [1.0, 31.0] | 50.0 [20.0, 80.0] |",
        "| mean |  | 12.3 ± 15.0 | 50.0 ± 30.0 |",
        "| of the oracle |  | 24.7 % | 100.0 % |",
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch_size", 0], ["--batch_size is 0", "from 1 to"]),
        (["--limit", -1], ["--limit is -1", "from 0 to"]),
        (["--methods", ","], ["--methods"]),
        (["--dtype", "int3"], ["int3", "bfloat16"]),
        (["--methods", "base,metora"], ["metora", "meteora"]),
        (["--only", "no_such_task"], ["no_such_task"]),
        (["--gate_temperature", 0], ["--gate_temperature is 0", "from 1e-06"]),
    ],
)
def test_bad_options_are_refused_before_any_work(args, words):
    """Otherwise an hour of generating ends in a traceback, or a typo in a table of nonsense."""
    assert_refused(command("eval.py", *args), *words)


# Stopping and going on, composites, what a run says of itself -------------------------------------

WIDE = ("ant", "bee", "cat")
METHODS = "base,oracle,meteora"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The command line of a model with room for composites: three random adapters, random top-2
    gates, LoraHub's weights, and a task for each adapter."""
    folder = tmp_path_factory.mktemp("wide")
    write_llama(folder / "small", max_position_embeddings=499)
    (folder / "small" / "tokenizer.model").write_bytes(tokenizer_bytes())
    base = load_llama(folder / "small")
    adapters = write_adapters(folder / "pool" / "adapters", base, WIDE, size=0.1)
    write_pool(PoolFolder(folder / "pool", adapters, base.fingerprint(), TEMPLATE))
    pool = load(folder / "small", folder / "pool").pool
    generator = torch.Generator().manual_seed(1)
    gates = {p: MeteoraGate(torch.randn(3, A.shape[2], generator=generator), 2) for p, A in pool.A.items()}
    save_gates(
        folder / "pool" / "gates" / "meteora_top2.safetensors", gates, pool, 2, pool.names, base.fingerprint()
    )
    known = {name: pool.members[name].hash for name in WIDE}
    weights = {name: {"ant": 1.0} for name in WIDE}
    write_json(folder / "pool" / "baselines" / "lorahub.json", {"adapters": known, "weights": weights})
    for name, metric, count in zip(WIDE, ("exact_match", "exact_match", "bleu"), (2, 3, 2), strict=True):
        write_json(folder / "tasks" / name / "task.json", {"metric": metric})
        for split in ("train", "test"):
            own = {"task": "x", "method": "y"}  # fields that nobody reads
            rows = [
                {"prompt": f"{split} {name} {j}", "response": f"the lazy dog runs {j}", **own}
                for j in range(count)
            ]
            write_jsonl(folder / "tasks" / name / f"{split}.jsonl", rows)
    args = ["--model", folder / "small", "--pool", folder / "pool", "--tasks", folder / "tasks"]
    args += ["--max_new_tokens", 3, "--batch_size", 2, "--composite", 2, "--composites", 3]
    return [*args, "--methods", METHODS]


def run_eval(*args, **replaced):
    """eval.py in this process, functions of it `replaced`: (exit status, stdout, stderr)."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        for name, function in replaced.items():
            for module in (evaluation, composing, answers):  # where it is used, whichever file it stands in
                if hasattr(module, name):
                    patch.setattr(module, name, function)
        try:
            run_script(evaluation.main)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def counted(name, dies=0):
    """(replacement that counts the calls of an eval.py function and is interrupted at call `dies`,
    the calls)."""
    real, calls = getattr(evaluation, name), []

    def call(*args):
        calls.append(args)
        if len(calls) == dies:
            raise KeyboardInterrupt
        return real(*args)

    return call, calls


WRITTEN = ("results.json", "results.md", "answers.jsonl", "composite-2-meteora.svg")


def written(out):
    return {name: (out / name).read_bytes() for name in WRITTEN}


@pytest.fixture(scope="module")
def whole(wide, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, _, err = run_eval(*wide, "--out", out)
    assert status == 0, err
    return out


def results_of(out):
    return json.loads((out / "results.json").read_text())


def test_two_runs_write_the_same_bytes(wide, whole, tmp_path):
    """A figure that differs from run to run can't be checked by anybody; times and folders don't
    belong into it."""
    assert run_eval(*wide, "--out", tmp_path / "again")[0] == 0
    assert written(tmp_path / "again") == written(whole)
    assert {f.name for f in whole.iterdir()} == {*WRITTEN, "timing.json"}  # no cells left


@pytest.mark.parametrize(
    ("part", "dies", "calls"), [("answer_all", 3, 9), ("measure_routing", 2, 3), ("answer_composites", 2, 3)]
)
def test_stopped_and_started_again_is_the_uninterrupted_run(wide, whole, tmp_path, part, dies, calls):
    """An evaluation takes hours: what is done must not be done again, and nothing of it may be
    joined to the wrong method or task."""
    out = tmp_path / "out"
    stop, made = counted(part, dies)
    status, stdout, err = run_eval(*wide, "--out", out, **{part: stop})
    assert (status, stdout, len(made)) == (130, "", dies) and "interrupted\n" in err
    assert not (out / "results.json").exists()
    go, rest = counted(part)
    status, stdout, err = run_eval(*wide, "--out", out, **{part: go})
    assert status == 0 and "warning" not in err
    assert len(rest) == calls - (dies - 1)
    assert written(out) == written(whole) and stdout == (whole / "results.md").read_text()
    assert not (out / "cells").exists()


@pytest.mark.parametrize("changed", ["option", "gates", "nothing"])
def test_cells_of_another_run_are_not_used(wide, tmp_path, changed):
    """Half of a table from the gates of yesterday and half from today's looks like any other table."""
    args, out = list(wide), tmp_path / "out"
    pool = args[3] = shutil.copytree(args[3], tmp_path / "pool")
    said = ["old", "old", "old", "old"]

    def stopped(mole, prompts, method, o, exclude):
        if not said:
            raise KeyboardInterrupt
        return [said.pop()] * len(prompts)

    assert run_eval(*args, "--out", out, **faked([]) | {"answer_all": stopped})[0] == 130
    if changed == "gates":
        file = pool / "gates" / "meteora_top2.safetensors"
        tensors, metadata = read_safetensors(file)
        write_safetensors(file, {key: tensor + 1 for key, tensor in tensors.items()}, metadata)
    more = ["--max_new_tokens", 5] if changed == "option" else []
    new = faked([]) | {"answer_all": lambda mole, prompts, *_: ["new"] * len(prompts)}
    status, _, err = run_eval(*args, *more, "--out", out, **new)
    assert status == 0
    said = [json.loads(line)["answer"] for line in (out / "answers.jsonl").read_text().splitlines()]
    assert ("old" in said) == (changed == "nothing") and "new" in said
    warned = f"warning: {out / 'cells'}: of a run with other options, base or adapters: begins anew"
    assert (warned in err.splitlines()) == (changed != "nothing")


THEIRS = ("notes.txt", "a-01234567.json", ".hidden", "inside/answers.json", "list.json")


def write_theirs(cells):
    """Files of another program in OUT/cells: {name: what is in it}."""
    contents = {name: b"theirs" for name in THEIRS} | {"list.json": b"[1]", "a-01234567.json": b'{"a": 1}'}
    for name, data in contents.items():
        (cells / name).parent.mkdir(parents=True, exist_ok=True)
        (cells / name).write_bytes(data)
    return contents


def read_all(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("when", ["before", "stopped", "other options"])
def test_what_others_keep_in_cells_stays(wide, whole, tmp_path, when):
    """OUT may be a folder of somebody's work, and cells is a common word: it was deleted whole."""
    out = tmp_path / "out"
    if when != "before":
        more = ["--max_new_tokens", 2] if when == "other options" else []
        stop, _ = counted("answer_all", 3)
        assert run_eval(*wide, *more, "--out", out, answer_all=stop)[0] == 130
        assert len(list((out / "cells").glob("*.json"))) == 3  # the mark and two answers
    theirs = write_theirs(out / "cells")
    assert run_eval(*wide, "--out", out)[0] == 0
    assert read_all(out / "cells") == theirs and written(out) == written(whole)


@pytest.mark.parametrize("meta", ["{}", '["made_by"]', '{"made_by": "somebody"}', "no JSON"])
def test_cells_of_another_program_are_refused(wide, tmp_path, meta):
    """Its meta.json would be overwritten by ours."""
    cells = tmp_path / "out" / "cells"
    theirs = write_theirs(cells) | {"meta.json": meta.encode()}
    (cells / "meta.json").write_text(meta)
    status, stdout, err = run_eval(*wide, "--out", tmp_path / "out")
    assert (status, stdout) == (2, "")
    expected = f"error: {cells / 'meta.json'}: another program wrote it: name another folder with --out"
    assert err.splitlines()[-1] == expected
    assert read_all(tmp_path / "out") == {f"cells/{name}": data for name, data in theirs.items()}


def test_a_second_eval_in_one_folder(wide, tmp_path):
    """Two that share OUT would read each other's answers and delete the folder under each other;
    the second one must hear it before it loads a model for minutes."""
    with alone(tmp_path / "out"):
        args = ["--model", tmp_path / "nowhere", *wide[2:], "--out", tmp_path / "out"]
        status, stdout, err = run_eval(*args)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(rf"error: {tmp_path}/out: process {os.getpid()} on .* is at work here: .*\n", err)
    assert not (tmp_path / "out").exists()


def test_meta_says_what_was_evaluated(wide, whole):
    """A table whose gates nobody can tell from those of another training is worth nothing a month
    later."""
    meta, paths = results_of(whole)["meta"], [Path(path) for path in wide[1:6:2]]
    mole = load(*paths[:2])
    assert meta["base"] == mole.model.fingerprint()
    assert meta["adapters"] == {name: mole.pool.members[name].hash for name in WIDE}
    parts = {Path(name).name: digest for name, digest in meta["parts"].items()}
    files = [paths[1] / "gates" / "meteora_top2.safetensors", paths[1] / "baselines" / "lorahub.json"]
    assert parts == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert set(meta["metrics"]) == {"exact_match", "bleu"} and "nrefs:1" in meta["metrics"]["bleu"]
    assert meta["options"]["methods"] == METHODS and meta["options"]["max_new_tokens"] == 3
    assert "out" not in meta["options"] and meta["torch"] == torch.__version__


def test_composites_in_json_and_table_are_the_scores_of_their_answers(wide, whole):
    """The composite's own table, one row a method, and its figures those of the answers that lie
    beside it."""
    results = results_of(whole)
    assert list(results["composite"]) == ["2"] and list(results["composite"]["2"]) == METHODS.split(",")
    rows = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    tasks = load_tasks(wide[5])
    asked = evaluation.composites(tasks, 2, 3, TEMPLATE, 0)
    mole = load(wide[1], wide[3])
    for method, found in results["composite"]["2"].items():
        own = [row for row in rows if row["method"] == method and "composite" in row]
        assert [row["prompt"] for row in own] == [c.prompt for c in asked]
        assert {row["composite"] for row in own} == {2}
        want = [[[name, question["response"]] for name, question in c.questions] for c in asked]
        assert [row["responses"] for row in own] == want
        o = evaluation.Options(max_new_tokens=3)
        scored = evaluation.score_composites(asked, [row["answer"] for row in own], tasks, o)
        assert found == json.loads(json.dumps(scored)) and found["n"] == 3
        for row in own if method != "oracle" else []:
            said = answer(mole, row["prompt"], raw=True, method=method, max_new_tokens=6)
            assert row["answer"] == said[0]
    shown = evaluation.composite_table(results["methods"], results["composite"])
    assert (whole / "results.md").read_text().endswith(f"\n\n{shown}")


def test_the_composite_table_shows_what_the_results_hold():
    """As above: a figure in another's place, or a temperature that isn't told."""
    cell = {"attempted": 2.5, "attempted_low": 2.0, "attempted_high": 3.0, "n": 7}
    cell |= {"right": 1.25, "right_low": 0.5, "right_high": 1.875}
    other = cell | {"right": 0.0, "right_low": 0.0, "right_high": 0.0, "temperature": 15.0}
    results = {
        name: {"mean": mean} for name, mean in (("oracle", 97.25), ("meteora", 0.0), ("lorahub", 31.0))
    }
    composite = {"3": {"oracle": cell, "meteora": other}, "10": {"oracle": cell | {"right": 7.0}}}
    assert evaluation.composite_table(results, composite).splitlines() == [
        "| method | tasks | 3: attempted | 3: right | 10: attempted | 10: right |",
        "|---|---|---|---|---|---|",
        "| oracle | 97.2 | 2.50 [2.00, 3.00] | 1.25 [0.50, 1.88] | 2.50 [2.00, 3.00] | 7.00 [0.50, 1.88] |",
        "| meteora | 0.0 | 2.50 [2.00, 3.00] | 0.00 [0.00, 0.00] at temperature 15 |  |  |",
        "| lorahub | 31.0 |  |  |  |  |",
        "",
        "questions a prompt, 7 prompts of each size; tasks: mean in percent",
    ]


def faked(seen, best=None):
    """Stands for the model: composites get right answers at the temperature `best`, everything else
    gets none."""

    def say(mole, asked, method, temperature, o):
        seen.append((method, temperature, asked))
        answers = lambda c: "".join(f"{j}. {row['response']}\n" for j, (_, row) in enumerate(c.questions, 1))  # noqa: E731
        return [answers(c) if temperature == best else "" for c in asked]

    return {
        "answer_composites": say, "answer_all": lambda mole, prompts, *_: [""] * len(prompts),
        "measure_routing": lambda *_: {"gates": {"right": 1.0, "first_qkv": 2.0, "tokens": 3}},
        "draw_composite": lambda mole, composite, method, temperature, o: f"{method} at {temperature}",
    }  # fmt: skip


def test_the_temperature_is_chosen_on_training_questions(wide, tmp_path):
    """Chosen on the questions that are then reported, it would be fitted to them; and methods
    without a temperature must not be answered once for each."""
    seen = []
    args = [*wide, "--composites", 9, "--composite_temperature", "1,5,15", "--out", tmp_path]
    assert run_eval(*args, **faked(seen, 5.0))[0] == 0
    splits = [{row["prompt"].split()[0] for c in asked for _, row in c.questions} for _, _, asked in seen]
    assert [(method, t, *split) for (method, t, _), split in zip(seen, splits, strict=True)] == [
        ("base", 1.0, "test"), ("oracle", 1.0, "test"), ("meteora", 1.0, "train"), ("meteora", 5.0, "train"),
        ("meteora", 15.0, "train"), ("meteora", 5.0, "test"),
    ]  # fmt: skip
    assert [len(asked) for _, _, asked in seen] == [9, 9, 2, 2, 2, 9]
    found = results_of(tmp_path)["composite"]["2"]
    assert {method: r.get("temperature") for method, r in found.items()} == {
        "base": None,
        "oracle": None,
        "meteora": 5.0,
    }
    assert found["meteora"]["attempted"] == 2.0 and found["base"]["attempted"] == 0.0
    text = (tmp_path / "results.md").read_text()
    assert text.count("at temperature 5 |") == 1 and "\nquestions a prompt, 9 prompts" in text
    assert (tmp_path / "composite-2-meteora.svg").read_text() == "meteora at 5.0"


def test_a_picture_of_a_seeded_method_has_a_name_for_any_system(wide, tmp_path):
    """A colon in it cannot be a file's name on Windows."""
    assert run_eval(*wide[:-1], "random_gate:1", "--out", tmp_path, **faked([]))[0] == 0
    assert (tmp_path / "composite-2-random_gate-1.svg").read_text() == "random_gate:1 at 1.0"


def test_one_temperature_is_for_all_and_lorahub_has_no_composites(wide, tmp_path):
    """LoraHub's weights are a task's; a composite has several. Sizes keep their order and have
    their own prompts."""
    seen = []
    args = [*wide, "--composite", "3,2", "--composite_temperature", 7]
    args += ["--methods", "lorahub,meteora", "--out", tmp_path]
    assert run_eval(*args, **faked(seen))[0] == 0
    assert [(method, t, {len(c.questions) for c in asked}) for method, t, asked in seen] == [
        ("meteora", 7.0, {3}), ("meteora", 7.0, {2}),
    ]  # fmt: skip
    results = results_of(tmp_path)
    assert list(results["methods"]) == ["lorahub", "meteora"]
    assert [list(table) for table in results["composite"].values()] == [["meteora"]] * 2
    assert list(results["composite"]) == ["3", "2"]
    assert "temperature" not in results["composite"]["3"]["meteora"]


def test_differences_and_cosines_are_written_and_shown(wide, tmp_path):
    """Pairs of answers of two tasks, or to another method than the one asked for; the cosines of
    some adapters instead of all."""
    texts = {"uniform": "the lazy dog runs 1", "adapter:ant": ""}
    say = lambda mole, prompts, method, *_: [texts[method]] * len(prompts)  # noqa: E731
    args = [*wide, "--methods", "adapter:ant,uniform", "--against", "adapter:ant", "--out", tmp_path]
    status, out, err = run_eval(*args, **faked([]) | {"answer_all": say})
    assert status == 0, err
    results = results_of(tmp_path)
    less = results["against"]["tasks"]["uniform"]
    means = [results["methods"][method]["mean"] for method in ("uniform", "adapter:ant")]
    assert less["difference"] == pytest.approx(means[0] - means[1], abs=0.02) and less["difference"] > 20
    assert less["low"] < less["difference"] < less["high"] and list(results["against"]["tasks"]) == [
        "uniform"
    ]
    nothing = {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert results["against"]["composite"] == {"2": {"uniform": nothing}}
    assert f"| mean less adapter:ant |  |  | +{less['difference']:.1f} [" in out
    assert results["cosines"] == describe_cosines(load(wide[1], wide[3]).pool)
    assert "cosines of the pool's adapters: mean " in out and "2: right, less adapter:ant" in out


@pytest.mark.parametrize("flag", [True, False])
def test_meteora_metrics_score_as_the_released_code_did(wide, tmp_path, flag):
    """Its tables can only be compared with scores made its way: a target anywhere in an answer is
    right, empty answers are dropped, BLEU is of one sentence. Not by default."""
    texts = {"ant": ["so the lazy dog runs 0", ""], "bee": ["the lazy dog runs 0", "the fox", ""]}
    texts["cat"] = ["the lazy dog runs 0", "the quick dog"]
    say = lambda mole, prompts, *_: texts[prompts[0].split()[1]]  # noqa: E731
    args = [*wide, "--composite", "", "--methods", "base", "--out", tmp_path, *["--meteora_metrics"] * flag]
    assert run_eval(*args, answer_all=say)[0] == 0
    results = results_of(tmp_path)
    found = {name: (s["score"], s["n"]) for name, s in results["methods"]["base"]["tasks"].items()}
    bleu = corpus_bleu(texts["cat"], [["the lazy dog runs 0", "the lazy dog runs 1"]]).score
    ours = {"ant": (0.0, 2), "bee": (33.33, 3), "cat": (pytest.approx(bleu, abs=0.005), 2)}
    theirs = {"ant": (100.0, 1), "bee": (50.0, 2), "cat": (100.0, 2)}
    assert found == (theirs if flag else ours) and bleu < 70
    assert results["meta"]["options"]["meteora_metrics"] is flag and results["composite"] == {}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--composite", "3,x"], "--composite is '3,x', expected whole numbers"),
        (["--composite", "2.5"], "--composite is '2.5'"), (["--composite", "0"], "--composite is '0'"),
        (["--composite", "3,-2"], "--composite is '3,-2'"),
        (["--composites", 0], "--composites is 0, expected a whole number"),
        (["--composite_temperature", "hot"], "--composite_temperature is 'hot', expected numbers from 1e-06"),
        (["--composite_temperature", "1,0"], "--composite_temperature is '1,0'"),
        (["--composite_temperature", "nan"], "--composite_temperature is 'nan'"),
        (["--composite_temperature", ","], "--composite_temperature is ','"),
        (["--ood", "--composite", "", "--methods", "adapter:ant"],
         "--ood: adapter:ant has no adapter of a task"),
        (["--against", "uniform"], "--against is 'uniform', expected one of --methods: base, oracle, meteora"),
        (["--against", "base", "--meteora_metrics"], "--against needs all answers"),
        (["--encoder", "nowhere"], "nowhere: no such folder of a sentence-transformers model"),
        (["--composite", "4"], "composite-4 needs 4 tasks, there are 3: ant, bee, cat"),
        (["--methods", "lorahub:ant,soft"], "soft.safetensors: python train.py gates --kind soft makes it"),
    ],
)  # fmt: skip
def test_bad_composites_are_one_line(wide, tmp_path, args, words):
    """A typo among the sizes must be one clear line with its option, not a traceback after hours of
    answers."""
    status, out, err = run_eval(*wide, *args, "--out", tmp_path / "out", **faked([]))
    assert (status, out) == (2, "") and not (tmp_path / "out" / "results.json").exists()
    errors = [line for line in re.split(r"[\r\n]+", err) if "error: " in line]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in err


def test_unseen_tasks(wide, tmp_path):
    """Scored on tasks that something was trained on, or with gates that know the adapters that
    join, the column would say nothing of a pool that grows."""
    model, pool = (wide[wide.index(name) + 1] for name in ("--model", "--pool"))
    shutil.copytree(pool, tmp_path / "pool")
    mole, seen = load(model, pool), []
    args = [*wide, "--pool", tmp_path / "pool", "--composite", "", "--out", tmp_path / "out", "--unseen"]
    args += ["--methods", "base,ramole,meteora_top2"]
    say = lambda mole, prompts, method, o, exclude: seen.append((method, exclude)) or [""] * len(prompts)  # noqa: E731
    for tasks, words in (
        ("ant", ""),
        ("ant\nbee\ncat", "--unseen: router and retriever have seen every task"),
    ):
        save_routers(
            tmp_path / "pool" / "router.safetensors", router_loras(mole.pool), mole.model, {"tasks": tasks}
        )
        nothing = {"measure_routing": lambda *_: {}, "retrieval": lambda *_: {"1": 0.0, "n": 3}}
        status, _, err = run_eval(*args, answer_all=say, **nothing)
        assert (status, words in err) == (2 if words else 0, True), err
    later = ("bee", "cat")
    assert seen == [(method, later if method == "meteora_top2" else ())
                    for method in ("base", "ramole", "meteora_top2") for _ in later]  # fmt: skip
    assert sorted(results_of(tmp_path / "out")["methods"]["base"]["tasks"]) == ["bee", "cat"]
