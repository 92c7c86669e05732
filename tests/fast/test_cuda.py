"""On a GPU: `pytest -m cuda`. The same answers as on the CPU, a step as one CUDA graph."""

import csv
from pathlib import Path

import pytest
import torch

from generate import load, stream
from helpers_training import options, run, run_folder
from methods.ramole import RouterRun
from tasks import tiny as tiny_tasks
from training import adapters as train_adapters
from training.adapters import adapters_step

pytestmark = pytest.mark.cuda


def answers(device, method, compile):
    """Tokens of tiny/'s answers in float32, eight prompts by threes."""
    prompts = [tiny_tasks.examples(name, "test", 1)[0]["prompt"] for name in sorted(tiny_tasks.TASKS)[:8]]
    mole = load(dtype="float32", device=device)
    batches = [prompts[j : j + 3] for j in range(0, 8, 3)] + [prompts[:1]]
    return [
        token
        for some in batches
        for token in stream(mole, some, method=method, routing=True, compile=compile)
    ]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("method", ["base", "meteora", "ramole", "selection", "arrow", "logo"])
def test_the_answers_of_the_cpu(method, compile):
    """A tensor left on the other device, a graph that reads memory given to others, TF32 where
    float32 was said."""
    torch._dynamo.reset()
    got, want = answers("cuda", method, compile), answers("cpu", method, False)
    assert [(t.row, t.id, t.finish) for t in got] == [(t.row, t.id, t.finish) for t in want]
    for a, b in zip(got, want, strict=True):
        assert dict(a.adapters) == pytest.approx(dict(b.adapters), abs=2e-3)


def test_a_step_is_one_graph(monkeypatch):
    """Captured but never replayed, or captured anew each step, it would be slower than no capture."""
    torch._dynamo.reset()
    replays, made = [], torch.cuda.CUDAGraph
    monkeypatch.setattr(
        torch.cuda,
        "CUDAGraph",
        type("Counted", (made,), {"replay": lambda self: replays.append(made.replay(self))}),
    )
    mole = load(dtype="bfloat16", device="cuda")
    tokens = list(stream(mole, ["Spell the word: strawberry"], compile=True))
    # the prompt gives the first token, a step that is captured the second, and one more at a longer
    # view of the cache
    assert len(tokens) >= 7
    assert len(tokens) - 3 <= len(replays) <= len(tokens) - 2


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["adapters", "top1", "top2", "router", "base"])
def test_training_is_the_cpus(kind, compile, small_model, tmp_path):
    """A batch, a label or a fresh tensor left on the CPU is a traceback; a random choice by the
    GPU's generator is another model."""
    logs = []
    for device in ("cpu", "cuda"):
        torch._dynamo.reset()
        more = {"device": device, "compile": compile, "seed": 3}
        if kind == "router":
            pool = options("top2", small_model, tmp_path / device)
            more |= {"share": 1.0, "candidates": "random", "steps": 5, "batch_size": 4}
            o = RouterRun(pool.model, tasks=pool.tasks, pool=pool.pool, **more)
            folder = Path(o.pool) / "runs" / "router"
        else:
            more |= {"dropout": 0.0} if kind == "adapters" else {"dtype": "float32"}
            o = options(kind, small_model, tmp_path / device, **more)
            folder = run_folder(o)
        run(o)
        rows = list(csv.DictReader((folder / "log.csv").open()))
        logs.append([{key: float(value) for key, value in row.items()} for row in rows])
    assert len(logs[0]) == 5
    for cpu, cuda in zip(*logs, strict=True):
        assert cuda == pytest.approx(cpu, rel=1e-2)


def test_a_run_goes_on(small_model, tmp_path, monkeypatch):
    """The optimizer's state belongs to the GPU but for its counts."""
    more = {"steps": 7, "device": "cuda"}
    whole, parts = (options("adapters", small_model, tmp_path / name, **more) for name in "ab")
    run(whole)
    calls = iter(range(5))  # the last checkpoint is behind the fourth step

    def stops(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return adapters_step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_adapters, "adapters_step", stops)
        run(parts)
    run(parts, resume=True)
    logs = [list(csv.reader((run_folder(o) / "log.csv").open()))[1:] for o in (whole, parts)]
    for row, want in zip(*logs, strict=True):
        assert [float(x) for x in row] == pytest.approx([float(x) for x in want], rel=1e-3)
