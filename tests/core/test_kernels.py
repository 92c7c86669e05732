"""The kernel: every spelling equals a loop over tokens written out here, forward and backward, for any routing."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import CHUNK, SPELLINGS, Own, choose, compute_ax, lora_mix, lora_own, top_k_mixture

ROUTINGS = ("alike", "uniform", "zipf", "distinct")


def by_hand(x, A, B, scale, idx, weight):
    """The equation, one token and one adapter at a time."""
    rows = []
    for token, slots, weights in zip(x, idx.tolist(), weight, strict=True):
        parts = [w * scale[j] * (B[j] @ (A[j] @ token)) for j, w in zip(slots, weights, strict=True)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def route(kind, n, e, k, generator):
    """idx (n, k): all tokens alike, uniform, popular adapters first (Zipf), or no adapter used twice (as far as e
    goes)."""
    if kind == "alike":
        return torch.randperm(e, generator=generator)[:k].expand(n, k).clone()
    if kind == "distinct":
        return torch.randperm(e, generator=generator)[torch.arange(n * k).view(n, k) % e]
    odds = torch.ones(e) if kind == "uniform" else 1 / torch.arange(1, e + 1)
    return torch.multinomial(odds.expand(n, e), k, generator=generator)


def problem(n=5, e=7, k=3, r=5, i=13, o=11, routing="uniform", seed=0, dtype=torch.float64):
    """(x, A, B, scale, idx, weight): adapters of ranks 1 to r, zero-padded, each with a scale of its own."""
    g = torch.Generator().manual_seed(seed)
    normal = {"generator": g, "dtype": torch.float64}
    rank = torch.randint(1, r + 1, (e,), generator=g)
    keep = (torch.arange(r) < rank[:, None]).double()  # (e, r)
    A, B = torch.randn(e, r, i, **normal) * keep[:, :, None], torch.randn(e, o, r, **normal) * keep[:, None, :]
    scale, weight = torch.rand(e, **normal) + 0.5, torch.rand(n, k, **normal).softmax(-1)
    low = torch.float64 if dtype == torch.float64 else torch.float32  # weights and scales are never below float32
    x, idx = torch.randn(n, i, **normal), route(routing, n, e, k, g)
    return x.to(dtype), A.to(dtype), B.to(dtype), scale.to(low), idx, weight.to(low)


def with_gradients(function, x, A, B, scale, idx, weight, **options):
    """[y, dx, dA, dB, dweight] under one fixed cotangent."""
    leaves = [y.clone().requires_grad_() for y in (x, A, B, weight)]
    y = function(*leaves[:3], scale, idx, leaves[3], **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), leaves)]


def assert_same(spelling, sizes, **options):
    want = with_gradients(by_hand, *sizes)
    got = with_gradients(lora_mix, *sizes, spelling=spelling, **options)
    for name, a, b in zip(("y", "dx", "dA", "dB", "dweight"), got, want, strict=True):
        assert a.shape == b.shape, (spelling, name)
        assert (a - b).abs().max() <= 1e-10 * max(1, b.abs().max()), (spelling, name, (a - b).abs().max())


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("e", "k"), [(1, 1), (2, 1), (3, 2), (7, 3), (7, 7), (31, 1), (31, 3), (31, 31)])
def test_every_spelling_is_the_equation(spelling, routing, e, k):
    """A spelling that swaps an axis, counts a token twice or loses the backward of one operand under some routing would
    train and answer wrongly while looking plausible."""
    assert_same(spelling, problem(e=e, k=k, routing=routing))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_size(data):
    """A spelling that is right for round sizes may break where a size is 1 or where sizes coincide (squeeze,
    broadcast)."""
    n, r, i, o = (data.draw(st.integers(1, top), label) for label, top in zip("nrio", (7, 5, 11, 13), strict=True))
    e = data.draw(st.integers(1, 31), "e")
    k = data.draw(st.integers(1, e), "k")
    routing, seed = data.draw(st.sampled_from(ROUTINGS)), data.draw(st.integers(0, 2**31))
    sizes = problem(n, e, k, r, i, o, routing, seed)
    for spelling in SPELLINGS:
        assert_same(spelling, sizes)


@pytest.mark.parametrize("bytes", [1, 2000, 5000])
def test_some_tokens_at_a_time(bytes, monkeypatch):
    """bmm copies what a few tokens use, then what the next do: a token lost or twice between two of them."""
    monkeypatch.setattr("kernels.COPIES", bytes)
    assert_same("bmm", problem(n=7, e=5, k=2))


def by_chunks(x, A, B, scale, idx, weight):
    """lora_own, which has no gradient for weights."""
    return lora_own(x, A, B, scale, Own.of(idx[:, 0], weight[:, 0].detach())) + 0 * weight.sum().to(x.dtype)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3 * CHUNK), st.integers(0, 2**16))
def test_one_adapter_a_token(slots, seed):
    """Training sorts tokens by adapter into chunks: a token in another's place, an empty place that counts, or a chunk
    of another adapter would train another task's."""
    x, A, B, scale, _, weight = problem(n=len(slots), e=7, k=1, seed=seed)
    weight[::5] = 0  # tokens that train no adapter
    idx = torch.tensor(slots)[:, None]
    own = Own.of(idx[:, 0], weight[:, 0])
    assert len(own.slot) > 1 and own.weight.shape == (len(own.slot), CHUNK)
    assert all(torch.equal(a, b) for a, b in zip(own.of_each_token(), (idx, weight), strict=True))
    got, want = (with_gradients(f, x, A, B, scale, idx, weight) for f in (by_chunks, by_hand))
    torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-10, atol=1e-10)


def test_gradients_in_a_fixed_order():
    """Summed as threads happen to come, a resumed run is another run: rows of one adapter, not next to each other,
    and tensors large enough for torch to share among threads."""
    x, A, B, scale, _, weight = problem(n=6 * 71, e=2, k=1, r=7, i=1201, o=1009, dtype=torch.float32)
    idx, threads = torch.tensor([0, 1] * 3).repeat_interleave(71)[:, None], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (with_gradients(by_chunks, x, A, B, scale, idx, weight) for _ in range(9))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_padding_slots_weigh_nothing(spelling):
    """Requests that use fewer adapters than others in the batch are padded with a repeated index of weight 0: written
    with scatter instead of scatter_add, the 0 would overwrite the real weight. Repeats that do weigh something add
    up."""
    x, A, B, scale, idx, weight = problem(n=5, e=7, k=2)
    padded = torch.cat((idx, idx[:, :1], idx[:, :1]), 1), torch.cat((weight, weight.new_zeros(5, 2)), 1)
    assert_same(spelling, (x, A, B, scale, *padded))
    want = by_hand(x, A, B, scale, idx, weight)
    torch.testing.assert_close(lora_mix(x, A, B, scale, *padded, spelling), want, rtol=0, atol=1e-10)
    twice = torch.cat((idx, idx), 1), torch.cat((weight / 4, weight * 3 / 4), 1)
    assert_same(spelling, (x, A, B, scale, *twice))
    torch.testing.assert_close(lora_mix(x, A, B, scale, *twice, spelling), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_ax_given_equals_not_given(spelling):
    """A gate that has computed A x hands it over; a kernel that lays it out otherwise would mix up adapters and ranks,
    and one that forgets its graph would lose the gradient of A."""
    sizes = problem(n=3, e=11, k=2)

    def with_ax(x, A, B, scale, idx, weight):
        return lora_mix(x, A, B, scale, idx, weight, spelling, ax=lambda: compute_ax(x, A)[0])

    for a, b in zip(with_gradients(with_ax, *sizes), with_gradients(by_hand, *sizes), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_compute_ax_is_a_times_x():
    """(n, e, r) with e and r swapped has the same number of elements and would pass unseen where e = r."""
    x, A, *_ = problem(n=3, e=7, r=5)
    want = torch.stack([torch.stack([A[j] @ token for j in range(7)]) for token in x])
    torch.testing.assert_close(compute_ax(x, A), [want], rtol=0, atol=1e-12)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(spelling, routing, dtype, limit):
    """A spelling that accumulates in bfloat16 or rounds the weights too early would drift from the others."""
    sizes = problem(n=7, e=11, k=3, routing=routing, dtype=dtype)
    y = lora_mix(*sizes, spelling=spelling)
    want = by_hand(*(s.double() if s.is_floating_point() else s for s in sizes))
    assert y.dtype == dtype
    assert (y.double() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("spelling", [*SPELLINGS, "own"])
def test_stacks_of_another_dtype(spelling):
    """While training, A and B are float32 under a bfloat16 base: the result is in x's dtype, gradients in theirs."""
    x, A, B, scale, idx, weight = problem(dtype=torch.float32, k=1 if spelling == "own" else 3)
    run = by_chunks if spelling == "own" else functools.partial(lora_mix, spelling=spelling)
    got = with_gradients(run, x.bfloat16(), A, B, scale, idx, weight)
    want = with_gradients(by_hand, x.bfloat16().float(), A, B, scale, idx, weight)
    assert [y.dtype for y in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert (got[0].float() - want[0]).norm() <= 1e-2 * want[0].norm()


@pytest.mark.parametrize("spelling", ["loop", "bmm"])
def test_unused_adapters_are_not_read(spelling):
    """What no token uses costs nothing and can't hurt: 0 * NaN is NaN, so one bad adapter would spoil every answer."""
    x, A, B, scale, idx, weight = problem(n=3, e=31, k=2)
    want = by_hand(x, A, B, scale, idx, weight)
    unused = sorted(set(range(31)) - set(idx.flatten().tolist()))
    A[unused], B[unused] = float("nan"), float("nan")
    torch.testing.assert_close(lora_mix(x, A, B, scale, idx, weight, spelling), want, rtol=0, atol=1e-10)


class Operations(TorchDispatchMode):
    """The names of the torch operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations(spelling, **sizes):
    tensors = problem(**sizes)
    with Operations() as seen:
        lora_mix(*tensors, spelling=spelling)
    return seen.names


@pytest.mark.parametrize("spelling", ["bmm", "dense"])
def test_no_loop_over_adapters(spelling):
    """A loop over adapters in Python makes 28 adapters 28 times as slow, and nothing but the clock would tell."""
    small, large = operations(spelling, n=5, e=3, k=2), operations(spelling, n=29, e=31, k=23)
    assert small == large
    assert len(operations("loop", n=5, e=3, k=2)) < len(operations("loop", n=29, e=31, k=23))  # and that it'd be seen


def test_auto_takes_the_spelling_that_reads_fewer_adapters():
    """auto's choice is its whole content: reversed, decoding one token would read all the pool."""
    few, many = {"n": 2, "e": 31, "k": 2}, {"n": 29, "e": 31, "k": 3}
    assert operations("auto", **few) == operations("bmm", **few) != operations("dense", **few)
    assert operations("auto", **many) == operations("dense", **many) != operations("bmm", **many)


@pytest.mark.parametrize(("e", "most", "many"), [(5, 8, None), (29, 32, None), (131, 134, 1)])
def test_auto_not_compiled(e, most, many):
    """There sums copy adapters: for `most` uses of one in all they pay, and for any number of tokens where each uses
    one of more than a hundred."""
    A = torch.zeros(e, 3, 7)
    assert [choose(torch.zeros(n, 7), A, 1) for n in (most, 1009)] == ["bmm", "bmm" if many else "dense"]
    assert choose(torch.zeros(most + 1, 7), A, 1) == ("bmm" if many else "dense")
    assert choose(torch.zeros(1009, 7), A.requires_grad_(), 1) == "dense"
    assert choose(torch.zeros(1, 7), A, e) == "dense"  # all are read


@pytest.mark.parametrize(("dtype", "amx", "wide", "least"), [
    (torch.float32, True, (), 4), (torch.bfloat16, True, (), 15), (torch.bfloat16, False, (), 10),
    (torch.bfloat16, False, (torch.bfloat16,), 4),
])  # fmt: skip
def test_auto_in_a_compiled_block(dtype, amx, wide, least, monkeypatch):
    """There sums copy no adapter, and win from `least` adapters for each that a token uses; taken by the rule for eager
    ones, a long prompt took half as long again. The gradient of the adapters in a sum does copy them."""
    monkeypatch.setattr("kernels.AMX", amx)
    monkeypatch.setattr("fast.matmul.WIDENED", wide)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr("kernels.at_most", lambda n, most: n <= most)
    x = torch.zeros(101, 7, dtype=dtype)
    for k in (3, 5):
        found = [choose(x, torch.zeros(e, 3, 7), k) for e in (k * least - 7, k * least - 6)]
        assert found == ["dense", "bmm"]
    assert choose(x, torch.zeros(31, 3, 7, requires_grad=True), 1) == "dense"
    assert choose(x[:5], torch.zeros(2, 3, 7), 3) == "bmm"  # few tokens
    assert [choose(x[:16], torch.zeros(e, 3, 7), 10) for e in (18, 19)] == ["dense", "bmm"]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_as_maxima(k, monkeypatch):
    """As compiled blocks choose: also where fewer than k may be chosen, whose other slots must weigh nothing."""
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(3))
    logits[:5, 3:] = float("-inf")
    want_idx, want = top_k_mixture(logits, k, 1.3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    idx, weight = top_k_mixture(logits, k, 1.3)
    torch.testing.assert_close(weight, want)
    used = want > 0
    assert torch.equal(idx[used], want_idx[used]) and used.sum() == 5 * min(k, 3) + 6 * k


def test_unknown_spelling():
    """A typo that falls through to some default would time and test the wrong code."""
    with pytest.raises(ValueError, match="'triton'.*loop"):
        lora_mix(*problem(), spelling="triton")
