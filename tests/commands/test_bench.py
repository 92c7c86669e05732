"""The bench runs, on small sizes: its tables have the rows and the figures that people quote from
them."""

import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest

from bench import TrainBench
from common.files import InputError
from evaluation.measure import InSubprocess, in_turn, spread
from evaluation.timed import adapters_trainer, examples, steps_of, with_requests
from evaluation.timed_methods import MethodsBench, decoder
from helpers_commands import command
from helpers_models import write_adapters
from helpers_training import write_tasks
from model import load_llama
from moe_lora import attached
from tasks.folders import collate

SPELLED = ["3 adapters, auto, not compiled", "3 adapters, loop, not compiled"]
SMALL = ["--repeats", "2", "--threads", "1", "--r", "3", "--dtype", "float32"]


def run(*args):
    """The JSON object that `bench.py` prints last, its Markdown rows checked against it."""
    done = command("bench.py", *map(str, args), *SMALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(found["table"])  # and the heading
    assert {"processor", "threads", "dtype", "versions", "GB/s", "GFLOP/s", "load"} <= found.keys()
    return found["table"]


@pytest.mark.slow
def test_layer():
    """auto's distance from the best backend is what the cost model is judged by."""
    table = run("layer", "--n", "1,5", "--width", "13x17", "--e", "3,7", "--k", "2,5")
    sizes = [(3, 1, 2), (3, 5, 2), (7, 1, 2), (7, 1, 5), (7, 5, 2), (7, 5, 5)]
    assert [(row["e"], row["n"], row["k"]) for row in table] == sizes
    for row in table:
        for kind, backends in (("", ("loop", "bmm", "dense")), (", compiled", ("bmm", "dense"))):
            best = min(row[backend + kind] for backend in backends)
            assert row["auto / best" + kind] == pytest.approx(row["auto" + kind] / best)


@pytest.mark.parametrize(("args", "line"), [
    (["layer", "--n", "1,x"], "--n is '1,x', expected whole numbers from 1 to 1,000,000 with ',' between them"),
    (["layer", "--width", "5x7x11"],
     "--width is '5x7x11', expected pairs of in and out features as 576x1536"),
    (["decode", "--repeats", "0"], "--repeats is 0, expected a whole number from 1 to 1,000,000"),
    (["layer", "--width", "1000000x1000000", "--n", "1", "--e", "3", "--k", "1"], "--width 1000000x1000000"),
    (["decode", "--e", "1000000"], "1000000 adapters of rank 8 need "),
    (["methods", "--methods", "arow"], "no method 'arow', did you mean arrow"),
    (["methods", "--methods", "soft"], "method soft: needs "),
    (["decode", "--union", "²"], "--union is '²', expected whole numbers"),
    (["prefill", "--gguf", "nowhere.gguf"], "--gguf: nowhere.gguf: no such file"),
    (["cache", "--slots", "8", "--adapters", "7"], "--slots has 8, expected at most 7, the --adapters"),
    (["cache", "--share", "0"], "--share is 0, expected a number from 1e-09 to 1"),
    (["cache", "--zipf", "11"], "--zipf is 11, expected a number from 0 to 10"),
    (["split", "--pool", "nowhere"], "nowhere: no such pool folder"),
    (["prefill", "--e", "0"], "--e is '0', expected whole numbers from 1 to 1,000,000 with ',' between them"),
])  # fmt: skip
def test_bad_options(args, line):
    done = command("bench.py", *args)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {line}"), done.stderr


def test_cache():
    """A share of another number of slots than its row says would size a pool wrongly."""
    done = command("bench.py", "cache", "--adapters", 7, "--slots", "3,7", "--requests", 1000, "--rate", 5)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = {row["slots"]: row for row in found["table"]}
    assert list(rows) == ["3", "7", "7, the least for 95 %"] and found["adapters"] == 7
    assert rows["7"]["found, %"] == rows["7"]["Che, %"] == 100 and rows["7"]["stays, s"] is None
    assert rows["3"]["loads/s"] == pytest.approx(5 * (1 - rows["3"]["found, %"] / 100))


@pytest.mark.slow
def test_decode(small_model):
    """Rows of other work than their names say would make any ratio. A peer that decoded other tokens, or
    without its adapters, would be no measure, and requests that shared adapters no proof for a batch of
    different ones."""
    sizes = ["--e", "3", "--tokens", "7", "--context", "5", "--batch_size", "3"]
    table = run("decode", "--model", small_model, *sizes, "--requests", "7", "--union", "5,11")
    peers = [peer + batch for peer in ("transformers", "peft, one adapter", "peft, mixed batch")
             for batch in ("", ", batch")]  # fmt: skip
    requests = ["7 requests, base", "7 requests, 5 adapters", "7 requests, 11 adapters"]
    models = ["base", "base, batch", "3 adapters", "3 adapters, batch", *SPELLED]
    assert [row["row"] for row in table] == [*models, *requests, *peers]
    for row in table:
        assert row["batch"] == (7 if row["row"] in requests else 3 if row["row"].endswith(", batch") else 1)
        assert row["tokens/s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["low"] <= row["ms"] <= row["high"]
    read = [row["of the limit"] * row["ms"] for row in table if row["row"] in requests]  # as the bytes
    assert read[0] < read[1] < read[2]


@pytest.mark.slow
def test_a_peer_trains(small_model):
    """Without it the row beside ours is another program's, or none."""
    table = run("train", "--model", small_model, "--e", "3", "--gated", "5", "--tokens", "7")
    assert table[1]["row"] == "transformers + peft, one by one"


def test_each_request_of_the_oracle_has_an_adapter_of_its_own(small_model, tmp_path):
    """Requests that share an adapter read less memory than those of a table's other rows."""
    write_adapters(tmp_path, load_llama(small_model), ["ant", "bee", "cat"])
    args = MethodsBench(model=str(small_model), pool=str(tmp_path), dtype="float32", device="cpu", tokens=3)
    oracle = decoder(args, "oracle", 5)
    gate = next(iter(attached(oracle.model).values())).gate
    assert gate.idx[:, 0].tolist() == [0, 1, 2, 0, 1] and gate.weight[:, 0].tolist() == [1] * 5
    assert oracle().shape == (5, 4)  # the first token, too


@pytest.mark.slow
def test_methods(small_model, tmp_path):
    """A ratio to another row than its column says would make any method fast."""
    write_adapters(tmp_path, load_llama(small_model), ["ant", "bee", "cat"])
    sizes = ["--tokens", "3", "--context", "5", "--batch_size", "2"]
    table = run(
        "methods", "--model", small_model, "--pool", tmp_path, "--methods", "base,oracle,arrow", *sizes
    )
    assert [row["row"] for row in table] == ["base", "oracle", "arrow"]
    for row in table:
        for batch in ("", ", batch of 2"):
            assert row[f"/ base{batch}"] == pytest.approx(row[f"ms{batch}"] / table[0][f"ms{batch}"])


def test_sets_of_requests(small_model):
    o = SimpleNamespace(model=str(small_model), dtype="float32", device="cpu", r=3, seed=0, requests=7)
    model = with_requests(o, 11)
    idx = next(iter(attached(model).values())).gate.inner.idx.tolist()
    assert len({tuple(sorted(row)) for row in idx}) == 7 and set(sum(idx, [])) == set(range(11))
    with pytest.raises(InputError, match="7 sets of three adapters aren't 29 adapters together"):
        with_requests(o, 29)


@pytest.mark.slow
def test_prefill(small_model):
    """Rows of other work than their names say would make any ratio."""
    table = run("prefill", "--model", small_model, "--e", "3", "--no-peers", "--tokens", "7")
    assert [row["row"] for row in table] == ["base", "3 adapters", *SPELLED]
    for row in table:
        assert row["tokens/s"] == pytest.approx(1e3 * 7 / row["ms"])
        assert row["low"] <= row["ms"] <= row["high"]


@pytest.mark.slow
def test_train(small_model, tmp_path):
    """Padding counted as tokens, or an adapter's steps counted for all, would make the slower
    program the faster."""
    tasks = write_tasks(tmp_path / "tasks", count=9)
    o = TrainBench(model=str(small_model), dtype="float32", device="cpu", r=3, e=3, each=2, tasks=str(tasks))
    names = ["random0", "random1", "random2"]
    batches = steps_of(o, examples(o, names, 0))
    sizes, trainer = [len(collate(batch).real.nonzero()) for batch in batches], adapters_trainer(o)
    assert len(sizes) == 8 and len(set(sizes)) > 1 and [trainer() for _ in range(11)] == sizes + sizes[:3]
    for batch in batches:
        assert [example.task for example in batch] == names * 2
    args = ["--e", "3", "--each", "2", "--gated", "5", "--tasks", tasks, "--no-peers"]
    table = run("train", "--model", small_model, *args)
    assert [row["row"] for row in table] == ["3 adapters", "gates of 5, auto", "gates of 5, loop"]
    for row in table:
        low, high = min(sizes) / row["high"], max(sizes) / row["low"]
        assert low <= row["tokens/s"] / 1e3 <= high, row


def test_random_examples():
    """A step of fewer examples, or of shorter ones, than it is said to have would make any rate."""
    names = ["random0", "random1", "random2"]
    o = TrainBench(e=3, each=2, tokens=7)
    batches = steps_of(o, examples(o, names, 11))
    assert len(batches) == 8
    for batch in batches:
        assert [(x.task, len(x.ids), x.n_prompt) for x in batch] == [(name, 7, 3) for name in names * 2]


def dies(o):
    os._exit(3)


def test_a_row_apart_that_fails(tmp_path):
    """Waiting for ever for a process that has ended, or a traceback for an input error in it."""
    o = TrainBench(model=str(tmp_path / "none"), device="cpu")
    with pytest.raises(InputError, match="none: no such model folder"):
        InSubprocess(adapters_trainer, o)
    with pytest.raises(InputError, match="has ended"):
        InSubprocess(dies, o)


def test_ctrl_c_while_a_process_starts(monkeypatch):
    """It is for the process that waits, and not lost because the other one must not hear it."""

    def start(self):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            InSubprocess(dies, TrainBench())
    finally:
        signal.signal(signal.SIGINT, before)


def test_rows_are_timed_in_turn():
    """Row after row instead, a neighbour's burst of work would slow one row and flatter the others;
    in the same order each time, a row would always find its weights in the caches, or never."""
    calls = []
    found = in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 41, lambda: calls.append("-")
    )
    assert calls[:4] == ["a", "b", "a", "b"] and calls[4::2] == ["-"] * 82
    assert {"".join(calls[j : j + 4 : 2]) for j in range(5, 168, 4)} == {"ab", "ba"}
    assert {name: len(times) for name, times in found.items()} == {"a": 41, "b": 41}
    assert spread([3e-3, 1e-3, 2e-3, 5e-3, 4e-3]) == pytest.approx({"ms": 3, "low": 2, "high": 4})
