"""The operation at speed: the same as kernels.py's, chunk by chunk, for known adapters, and by a
cost model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast.kernels import (
    GROUP,
    GroupedTokens,
    alloc_B,
    compute_ax,
    lora_mix,
    mix_grouped,
    pick_backend,
    top_k_mixture,
)
from helpers_kernels import KernelTests, assert_same, by_hand, check_any_size, problem, with_gradients


class TestFastKernels(KernelTests):
    lora_mix = staticmethod(lora_mix)
    compute_ax = staticmethod(lambda x, A: compute_ax(x, A)[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_size(data):
    """A backend that is right for round sizes may break where a size is 1 or where sizes coincide
    (squeeze, broadcast)."""
    check_any_size(lora_mix, data)


def test_compute_ax_of_several_stacks():
    """(n, e, r) with e and r swapped, or one stack's rows in another's place, would pass unseen
    where sizes agree."""
    x, first, *_ = problem(n=3, e=7, r=5)
    second = problem(n=3, e=7, r=5, seed=1)[1]
    for got, A in zip(compute_ax(x, first, second), (first, second), strict=True):
        want = torch.stack([torch.stack([A[j] @ token for j in range(7)]) for token in x])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_padded_layout_of_B():
    """A pool writes adapters into it by slot and rank, as into any (e, o, r)."""
    B = alloc_B(3, 11, 5, dtype=torch.bfloat16)
    assert B.shape == (3, 11, 5) and B.dtype == torch.bfloat16 and not B.any()
    assert B.stride() == (5 * 27, 1, 27)


def test_grouped_tokens_of_another_dtype():
    """While training, A and B are float32 under a bfloat16 base: the result is in x's dtype,
    gradients in theirs."""
    x, A, B, scale, idx, weight = problem(dtype=torch.float32, k=1)
    got = with_gradients(by_groups, x.bfloat16(), A, B, scale, idx, weight)
    want = with_gradients(by_hand, x.bfloat16().float(), A, B, scale, idx, weight)
    assert [y.dtype for y in got] == [torch.bfloat16] * 2 + [torch.float32] * 3
    assert (got[0].float() - want[0]).norm() <= 1e-2 * want[0].norm()


@pytest.mark.parametrize("bytes", [1, 2000, 5000])
def test_some_tokens_at_a_time(bytes, monkeypatch):
    """bmm copies what a few tokens use, then what the next do: a token lost or twice between two of
    them."""
    monkeypatch.setattr("fast.kernels.COPIES", bytes)
    assert_same(lora_mix, "bmm", problem(n=7, e=5, k=2))


def by_groups(x, A, B, scale, idx, weight):
    """mix_grouped, which has no gradient for weights."""
    return mix_grouped(
        x, A, B, scale, GroupedTokens.of(idx[:, 0], weight[:, 0].detach())
    ) + 0 * weight.sum().to(x.dtype)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3 * GROUP), st.integers(0, 2**16))
def test_one_adapter_a_token(slots, seed):
    """Training sorts tokens by adapter into groups: a token in another's position, an empty one
    that counts, or a group of another adapter would train another task's."""
    x, A, B, scale, _, weight = problem(n=len(slots), e=7, k=1, seed=seed)
    weight[::5] = 0  # tokens that train no adapter
    idx = torch.tensor(slots)[:, None]
    grouped = GroupedTokens.of(idx[:, 0], weight[:, 0])
    assert len(grouped.slot) > 1 and grouped.weight.shape == (len(grouped.slot), GROUP)
    assert torch.equal(grouped.slot[grouped.position // GROUP], idx[:, 0])
    assert torch.equal(grouped.weight.flatten()[grouped.position], weight[:, 0])
    got, want = (with_gradients(f, x, A, B, scale, idx, weight) for f in (by_groups, by_hand))
    torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-10, atol=1e-10)


def test_gradients_in_a_fixed_order():
    """Summed as threads happen to come, a resumed run is another run: rows of one adapter, not next
    to each other, and tensors large enough for torch to share among threads."""
    x, A, B, scale, _, weight = problem(n=6 * 71, e=2, k=1, r=7, i=1201, o=1009, dtype=torch.float32)
    idx, threads = torch.tensor([0, 1] * 3).repeat_interleave(71)[:, None], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (with_gradients(by_groups, x, A, B, scale, idx, weight) for _ in range(9))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("e", "most", "many"), [(5, 8, None), (29, 32, None), (131, 134, 1)])
def test_auto_not_compiled(e, most, many):
    """There bmm copies adapters: for `most` uses of one in all they pay, and for any number of
    tokens where each uses one of more than a hundred."""
    A = torch.zeros(e, 3, 7)
    assert [pick_backend(torch.zeros(n, 7), A, 1) for n in (most, 1009)] == [
        "bmm",
        "bmm" if many else "dense",
    ]
    assert pick_backend(torch.zeros(most + 1, 7), A, 1) == ("bmm" if many else "dense")
    assert pick_backend(torch.zeros(1009, 7), A.requires_grad_(), 1) == "dense"
    assert pick_backend(torch.zeros(1, 7), A, e) == "dense"  # all are read


@pytest.mark.parametrize(("dtype", "amx", "wide", "least"), [
    (torch.float32, True, (), 4), (torch.bfloat16, True, (), 15), (torch.bfloat16, False, (), 10),
    (torch.bfloat16, False, (torch.bfloat16,), 4),
])  # fmt: skip
def test_auto_in_a_compiled_block(dtype, amx, wide, least, monkeypatch):
    """There bmm copies no adapter, and win from `least` adapters for each that a token uses; taken
    by the rule for eager ones, a long prompt took half as long again. The gradient of the adapters
    does copy them."""
    monkeypatch.setattr("fast.kernels.AMX", amx)
    monkeypatch.setattr("fast.matmul.WIDENED", wide)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr("fast.kernels.statically_at_most", lambda n, most: n <= most)
    x = torch.zeros(101, 7, dtype=dtype)
    for k in (3, 5):
        found = [pick_backend(x, torch.zeros(e, 3, 7), k) for e in (k * least - 7, k * least - 6)]
        assert found == ["dense", "bmm"]
    assert pick_backend(x, torch.zeros(31, 3, 7, requires_grad=True), 1) == "dense"
    assert pick_backend(x[:5], torch.zeros(2, 3, 7), 3) == "bmm"  # few tokens
    assert [pick_backend(x[:16], torch.zeros(e, 3, 7), 10) for e in (18, 19)] == ["dense", "bmm"]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_as_maxima(k, monkeypatch):
    """As compiled blocks choose: also where fewer than k may be chosen, whose other slots must
    weigh nothing."""
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(3))
    logits[:5, 3:] = float("-inf")
    want_idx, want = top_k_mixture(logits, k, 1.3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    idx, weight = top_k_mixture(logits, k, 1.3)
    torch.testing.assert_close(weight, want)
    used = want > 0
    assert torch.equal(idx[used], want_idx[used]) and used.sum() == 5 * min(k, 3) + 6 * k
