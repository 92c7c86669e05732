"""Compiled blocks: the same results as without, one graph for everything, no recompiling, no stale
step."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from fast.compiled import MAX_DECODE_ROWS, SIMD_LANES, compile_function, mark_dynamic_tokens
from fast.kernels import alloc_B, lora_mix
from fast.matmul import linear
from generate import load, stream
from helpers_commands import ROOT
from helpers_models import make_pool, random_adapter, random_gates
from helpers_training import examples, meteora_gates_of, pool_in_model
from moe_lora import Recorder, SampleGate, attach, detach, fixed_rows, set_gates
from pool.adapters import linear_shapes
from pool.gate_files import parameters_of
from pool.load import load_base
from tasks import tiny as tiny_tasks
from training.adapters import adapters_step
from training.dropout import token_dropout
from training.gates import GateTermTraining, gates_step


@pytest.fixture
def model(small_model):
    torch._dynamo.reset()
    counters.clear()
    return load_base(small_model)


def with_gates(model, capacity=None, k=2):
    """Attaches the five adapters with gates as methods/batch.py does. Returns (pool, SampleGates)."""
    pool = make_pool(linear_shapes(model), capacity=capacity)
    gates = {path: SampleGate(gate) for path, gate in random_gates(pool, k).items()}
    attach(model, pool, gates)
    return pool, list(gates.values())


def set_rows(pool, gates, routed):
    """Rows that their gates route, and rows with the adapter ant or the base alone."""
    idx, weight = fixed_rows(pool, [{"ant": 1.0} if j % 2 else {} for j in range(len(routed))])
    set_gates(gates, idx, weight, torch.tensor(routed))


@torch.inference_mode()
def logits(model, b, t, steps, recorded=False):
    """Logits (b, t + steps, v) of a prompt and so many single tokens, and the routing of the last
    step, if any."""
    ids = torch.randint(331, (b, t + steps), generator=torch.Generator().manual_seed(31 * b + t))
    cache = model.new_cache(b, t + steps)
    cache.replayable = True
    out, recorder = [model(ids[:, :t], cache)], Recorder(model, b)
    if recorded:
        recorder.__enter__()
    out += [model(ids[:, [j]], cache) for j in range(t, t + steps)]
    recorder.__exit__()
    return torch.cat(out, 1), recorder.read(b).clone()


def graphs():
    return counters["stats"]["unique_graphs"]


# (rows, prompt tokens, tokens after it): one row and several, first two, for which a recorded step
# failed to compile; enough tokens for the cache to be read in longer pieces; a prompt of one token;
# more rows than a whole block takes (attention not compiled).
SHAPES = [(1, 5, 3), (2, 13, 70), (3, 7, 2), (1, 1, 2), (11, 3, 2), (1, 67, 3), (5, 1, 2)]


@pytest.mark.slow
def test_compiled_is_the_same_in_few_graphs(model):
    """A compiled block that loses a mask, a position or an adapter answers wrongly only where it is
    fast; one that compiles again for a new length or batch is slower than none."""
    pool, gates = with_gates(model)
    unrecorded = list(itertools.product(SHAPES, [False]))
    both = list(itertools.product(SHAPES, [False, True]))

    def run(shape, recorded):
        set_rows(pool, gates, [True] * shape[0])
        return logits(model, *shape, recorded)

    want = {case: run(*case) for case in both}
    assert graphs() == 0
    model.compile_blocks()
    # Five: before and after, and the step for one row, for few and for more. Eight: the steps again
    # while routing is recorded.
    for cases, made in ((unrecorded, 5), (both, 8)):
        for case in cases:
            text, routing = want[case]
            got_text, got_routing = run(*case)
            torch.testing.assert_close(got_text, text, rtol=0, atol=1e-4, msg=str(case))
            torch.testing.assert_close(got_routing, routing, rtol=0, atol=1e-4, msg=str(case))
        assert graphs() == made, graphs()


@pytest.mark.parametrize("wide", [(), (torch.bfloat16,)], ids=["library", "widened"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("o", [521, 518], ids=["one row at a time", "seven rows"])
def test_few_tokens_and_many(o, dtype, wide, monkeypatch):
    """Few tokens are sums and many a product, of one weight: taken for each other where the number
    of tokens is a symbol, either is several times slower, and only a wrong sum is seen in the
    answers. So is what a smaller batch leaves in the lanes of a vector that it doesn't fill."""
    monkeypatch.setattr("fast.matmul.WIDENED", wide)
    torch._dynamo.reset()
    counters.clear()
    W, bias, run = torch.randn(o, 67).to(dtype), torch.randn(o).to(dtype), compile_function(linear)
    for n in (1, 3, SIMD_LANES, 11, 2, MAX_DECODE_ROWS, SIMD_LANES + 1, MAX_DECODE_ROWS + 3):
        (x,) = mark_dynamic_tokens(torch.randn(n, 67).to(dtype), decode=n <= MAX_DECODE_ROWS)
        with torch.inference_mode():
            got, want = run(x, W, bias), F.linear(*(y.double() for y in (x, W, bias)))
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert got.dtype == dtype and (got - want).norm() < limit * want.norm(), n
    assert graphs() == 4, graphs()


@torch.inference_mode()
def test_copies_are_no_guard(monkeypatch):
    """How many adapters bmm may copy at a time is nothing to a compiled block, which copies none:
    asked there, it is a graph for each side of that number, or an error."""
    monkeypatch.setattr("fast.kernels.COPIES", 3 * 2 * 3 * (67 + 11) * 4)  # of three tokens
    torch._dynamo.reset()
    counters.clear()
    A, B, scale = torch.randn(31, 3, 67), torch.randn(31, 11, 3), torch.ones(31)
    run = compile_function(lambda x, idx, weight: lora_mix(x, A, B, scale, idx, weight, "bmm"))
    for n in (2, 3, 5, 7):
        x, idx, weight = mark_dynamic_tokens(
            torch.randn(n, 67), torch.randint(31, (n, 2)), torch.rand(n, 2), decode=True
        )
        torch.testing.assert_close(run(x, idx, weight), lora_mix(x, A, B, scale, idx, weight, "loop"))
    assert graphs() == 1, graphs()


@torch.inference_mode()
@pytest.mark.parametrize("r", [1, 5, 12])
def test_ranks_side_by_side(r):
    """A long prompt's sums take several ranks and both halves of an output at once: one left out,
    or put in another's place, is a wrong answer in compiled blocks alone."""
    torch._dynamo.reset()
    counters.clear()
    A, B = torch.randn(7, r, 67), alloc_B(7, 11, r).copy_(torch.randn(7, 11, r))
    scale = torch.rand(7)
    run = compile_function(lambda x, idx, weight: lora_mix(x, A, B, scale, idx, weight, "bmm"))
    for n in (MAX_DECODE_ROWS + 1, 29, 41):
        x, idx, weight = mark_dynamic_tokens(torch.randn(n, 67), torch.randint(7, (n, 3)), torch.rand(n, 3))
        got, want = run(x, idx, weight), lora_mix(x, A, B, scale, idx, weight, "loop")
        assert (got - want).abs().max() < 1e-5 * want.abs().max(), n
    assert graphs() == 1, graphs()


@torch.inference_mode()
def test_head_of_few_rows(model):
    """The head is a fifth of a small model's weights: left out, it alone would run at half the
    speed. The last hidden states of a prompt are no contiguous tensor, which must not be a graph of
    its own."""
    hidden = torch.randn(MAX_DECODE_ROWS + 3, 3, 44)
    cases = [hidden[:1, 1], hidden[:3, 1], hidden[:SIMD_LANES, 1]]
    cases += [hidden[:2, 1].clone(), hidden[:11, 1], hidden[:, 1]]
    want = [model.head(x) for x in cases]
    model.compile_blocks()
    for x, y in zip(cases, want, strict=True):
        torch.testing.assert_close(model.head(x), y, rtol=0, atol=1e-5)
    assert graphs() == 3, graphs()


@pytest.mark.slow
def test_rows_with_fixed_adapters(model):
    """Requests with a fixed adapter run beside routed ones: every mixture of them has to share a
    graph."""
    pool, gates = with_gates(model)
    cases = [([False], 3), ([False, False], 5), ([True, False, True], 4), ([False, True], 1)]

    def run(routed, t):
        set_rows(pool, gates, routed)
        return logits(model, len(routed), t, 3)[0]

    want = [run(*case) for case in cases]
    model.compile_blocks()
    for case, text in zip(cases, want, strict=True):
        torch.testing.assert_close(run(*case), text, rtol=0, atol=1e-4, msg=str(case))
    assert graphs() == 4, graphs()


def test_pool_changes_in_place(model):
    """Adapters come and go while compiled blocks run: neither a new graph, nor the old adapter's
    answers."""
    pool, gates = with_gates(model, capacity=7)
    shapes = pool.shapes
    model.compile_blocks()
    set_rows(pool, gates, [False])

    def run():
        return logits(model, 1, 1, 2)[0]

    without = run()
    made = graphs()
    pool.add(random_adapter("fly", shapes, 3, seed=3, size=0.1))
    set_gates(gates, *fixed_rows(pool, [{"fly": 1.0}]), torch.tensor([False]))
    with_fly = run()
    assert (with_fly - without).abs().max() > 1e-3
    pool.remove("fly")
    torch.testing.assert_close(run(), without, rtol=0, atol=1e-5)
    assert graphs() == made


@pytest.mark.slow
def test_texts_of_tiny():
    """What users see: twenty answers of the embedded default in float32, token for token and
    adapter for adapter."""
    torch._dynamo.reset()
    prompts = [tiny_tasks.examples(name, "test", 1)[0]["prompt"] for name in sorted(tiny_tasks.TASKS)[:20]]

    def answers(compile):
        mole = load(dtype="float32")
        return [
            list(stream(mole, prompts[j : j + 5], routing=True, compile=compile)) for j in range(0, 20, 5)
        ] + [list(stream(mole, prompts[:1], compile=compile))]

    for got, want in zip(answers(True), answers(False), strict=True):
        for a, b in zip(got, want, strict=True):
            assert (a.row, a.id, a.text, a.finish) == (b.row, b.id, b.text, b.finish)
            assert dict(a.adapters) == pytest.approx(dict(b.adapters), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapters", "gates"])
def test_gradients(what, small_model, tmp_path):
    """Gradients that a compiled block loses or shares wrongly train something else, faster; and
    steps of other lengths must not compile again."""
    torch._dynamo.reset()
    counters.clear()
    o = SimpleNamespace(
        micro_tokens=10_000, late_start=0.0, top_k=2, lm_weight=1.0, beta=3.0, adapters_too="", seed=0
    )
    found = []
    for compiled in (False, True):
        gates = meteora_gates_of(2) if what == "gates" else None
        model, pool, gates = pool_in_model(small_model, tmp_path / str(compiled), gates)
        stacks = {f"{p}.{n}": stack[p] for n, stack in (("A", pool.A), ("B", pool.B)) for p in pool.A}
        params = parameters_of(gates, pool.capacity) if what == "gates" else stacks
        if what == "adapters":
            detach(model)
            attach(model.train(), pool, gates, dropout=token_dropout(pool, 0.25))
        if compiled:
            model.compile_blocks()
        for param in params.values():
            param.requires_grad_()
        training = GateTermTraining(model, pool, gates, o) if what == "gates" else None
        for picked in (examples(small_model, 2), examples(small_model, 3), examples(small_model, 1)[1:]):
            logged = (
                gates_step(training, picked, 0)
                if training
                else adapters_step(model, pool, gates, picked, o, 0)
            )
            found.append((logged, {name: param.grad.clone() for name, param in params.items()}))
    for (want, slopes), (got, compiled_slopes) in zip(found[:3], found[3:], strict=True):
        assert got == pytest.approx(want, rel=1e-4)
        assert all(slope.abs().max() > 0 for slope in slopes.values())
        for name, slope in slopes.items():
            assert (compiled_slopes[name] - slope).abs().max() < 3e-4 * slope.abs().max(), name
    # Before and after, and both again for the first block, whose x has no gradient.
    assert graphs() == 4


def test_without_a_compiler():
    """Without it a laptop without g++ would show a traceback of the compiler's, not an answer."""
    environment = os.environ | {"CXX": "no-such-compiler"}
    line = [sys.executable, ROOT / "generate.py", "--compile", "--prompt", "What is the plural of mouse?"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0 and done.stdout.strip() == "mice", done.stderr
    assert done.stderr.count("warning") == 1 and "no C++ compiler" in done.stderr


@pytest.mark.slow
def test_two_threads_each_with_a_model(small_model):
    """A step captured in one thread must not hold the other's kernels: a server that answers from
    threads would overwrite one user's text with another's."""
    torch._dynamo.reset()
    models = [load_base(small_model) for _ in range(2)]
    want = [logits(model, 1, 5, 7)[0] for model in models]
    for model in models:
        model.compile_blocks()
        logits(model, 1, 5, 7)
    interval, wrong = sys.getswitchinterval(), []

    def work(j):
        for _ in range(20):
            wrong.append(float((logits(models[j], 1, 5, 7)[0] - want[j]).abs().max()))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as workers:
            list(workers.map(work, range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert len(wrong) == 40 and max(wrong) < 1e-4
