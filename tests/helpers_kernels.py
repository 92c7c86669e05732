"""The operation, one token at a time, and the tests that kernels.py and fast/kernels.py both have
to pass."""

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import BACKENDS

ROUTINGS = ("alike", "uniform", "zipf", "distinct")


def by_hand(x, A, B, scale, idx, weight):
    """The equation, one token and one adapter at a time."""
    rows = []
    for token, slots, weights in zip(x, idx.tolist(), weight, strict=True):
        parts = [w * scale[j] * (B[j] @ (A[j] @ token)) for j, w in zip(slots, weights, strict=True)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def route(kind, n, e, k, generator):
    """idx (n, k): all tokens alike, uniform, popular adapters first (Zipf), or no adapter used
    twice (as far as e goes)."""
    if kind == "alike":
        return torch.randperm(e, generator=generator)[:k].expand(n, k).clone()
    if kind == "distinct":
        return torch.randperm(e, generator=generator)[torch.arange(n * k).view(n, k) % e]
    odds = torch.ones(e) if kind == "uniform" else 1 / torch.arange(1, e + 1)
    return torch.multinomial(odds.expand(n, e), k, generator=generator)


def problem(n=5, e=7, k=3, r=5, i=13, o=11, routing="uniform", seed=0, dtype=torch.float64):
    """(x, A, B, scale, idx, weight): adapters of ranks 1 to r, zero-padded, each with a scale of
    its own."""
    g = torch.Generator().manual_seed(seed)
    normal = {"generator": g, "dtype": torch.float64}
    rank = torch.randint(1, r + 1, (e,), generator=g)
    keep = (torch.arange(r) < rank[:, None]).double()  # (e, r)
    A = torch.randn(e, r, i, **normal) * keep[:, :, None]
    B = torch.randn(e, o, r, **normal) * keep[:, None, :]
    scale, weight = torch.rand(e, **normal) + 0.5, torch.rand(n, k, **normal).softmax(-1)
    low = torch.float64 if dtype == torch.float64 else torch.float32  # for weights and scales
    x, idx = torch.randn(n, i, **normal), route(routing, n, e, k, g)
    return x.to(dtype), A.to(dtype), B.to(dtype), scale.to(low), idx, weight.to(low)


def with_gradients(function, x, A, B, scale, idx, weight, **options):
    """[y, dx, dA, dB, dweight] under one fixed cotangent."""
    leaves = [y.clone().requires_grad_() for y in (x, A, B, weight)]
    y = function(*leaves[:3], scale, idx, leaves[3], **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), leaves)]


def assert_same(lora_mix, backend, sizes, **options):
    want = with_gradients(by_hand, *sizes)
    got = with_gradients(lora_mix, *sizes, backend=backend, **options)
    for name, a, b in zip(("y", "dx", "dA", "dB", "dweight"), got, want, strict=True):
        assert a.shape == b.shape, (backend, name)
        assert (a - b).abs().max() <= 1e-10 * max(1, b.abs().max()), (backend, name, (a - b).abs().max())


class Operations(TorchDispatchMode):
    """The names of the torch operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations(lora_mix, backend, **sizes):
    tensors = problem(**sizes)
    with Operations() as seen:
        lora_mix(*tensors, backend=backend)
    return seen.names


def check_any_size(lora_mix, data):
    """assert_same for sizes, k and routing drawn by hypothesis."""
    largest = {"n": 7, "r": 5, "i": 11, "o": 13}
    n, r, i, o = (data.draw(st.integers(1, top), label) for label, top in largest.items())
    e = data.draw(st.integers(1, 31), "e")
    k = data.draw(st.integers(1, e), "k")
    routing, seed = data.draw(st.sampled_from(ROUTINGS)), data.draw(st.integers(0, 2**31))
    sizes = problem(n, e, k, r, i, o, routing, seed)
    for backend in BACKENDS:
        assert_same(lora_mix, backend, sizes)


class KernelTests:
    """Tests of a lora_mix; `compute_ax(x, A)` is its A x."""

    lora_mix = compute_ax = None

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize(("e", "k"), [(1, 1), (2, 1), (3, 2), (7, 3), (7, 7), (31, 1), (31, 3), (31, 31)])
    def test_every_backend_is_the_equation(self, backend, routing, e, k):
        """A backend that swaps an axis, counts a token twice or loses the backward of one operand
        under some routing would train and answer wrongly while looking plausible."""
        assert_same(self.lora_mix, backend, problem(e=e, k=k, routing=routing))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_padding_slots_weigh_nothing(self, backend):
        """Requests that use fewer adapters than others in the batch are padded with a repeated
        index of weight 0: written with scatter instead of scatter_add, the 0 would overwrite the
        real weight. Repeats that do weigh something add up."""
        x, A, B, scale, idx, weight = problem(n=5, e=7, k=2)
        padded = torch.cat((idx, idx[:, :1], idx[:, :1]), 1), torch.cat((weight, weight.new_zeros(5, 2)), 1)
        assert_same(self.lora_mix, backend, (x, A, B, scale, *padded))
        want = by_hand(x, A, B, scale, idx, weight)
        torch.testing.assert_close(self.lora_mix(x, A, B, scale, *padded, backend), want, rtol=0, atol=1e-10)
        twice = torch.cat((idx, idx), 1), torch.cat((weight / 4, weight * 3 / 4), 1)
        assert_same(self.lora_mix, backend, (x, A, B, scale, *twice))
        torch.testing.assert_close(self.lora_mix(x, A, B, scale, *twice, backend), want, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_ax_given_equals_not_given(self, backend):
        """A gate that has computed A x hands it over; a kernel that lays it out otherwise would mix
        up adapters and ranks, and one that forgets its graph would lose the gradient of A."""
        sizes = problem(n=3, e=11, k=2)

        def with_ax(x, A, B, scale, idx, weight):
            return self.lora_mix(x, A, B, scale, idx, weight, backend, get_ax=lambda: self.compute_ax(x, A))

        for a, b in zip(with_gradients(with_ax, *sizes), with_gradients(by_hand, *sizes), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
    def test_lower_precision(self, backend, routing, dtype, limit):
        """A backend that accumulates in bfloat16 or rounds the weights too early would drift from
        the others."""
        sizes = problem(n=7, e=11, k=3, routing=routing, dtype=dtype)
        y = self.lora_mix(*sizes, backend=backend)
        want = by_hand(*(s.double() if s.is_floating_point() else s for s in sizes))
        assert y.dtype == dtype
        assert (y.double() - want).norm() <= limit * want.norm()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_stacks_of_another_dtype(self, backend):
        """Training's A and B are float32 under a bfloat16 base: the result is in x's dtype,
        gradients in theirs."""
        x, A, B, scale, idx, weight = problem(dtype=torch.float32)
        got = with_gradients(self.lora_mix, x.bfloat16(), A, B, scale, idx, weight, backend=backend)
        want = with_gradients(by_hand, x.bfloat16().float(), A, B, scale, idx, weight)
        assert [y.dtype for y in got] == [torch.bfloat16] * 2 + [torch.float32] * 3
        assert (got[0].float() - want[0]).norm() <= 1e-2 * want[0].norm()

    @pytest.mark.parametrize("backend", ["loop", "bmm"])
    def test_unused_adapters_are_not_read(self, backend):
        """What no token uses costs nothing and can't hurt: 0 * NaN is NaN, so one bad adapter would
        spoil every answer."""
        x, A, B, scale, idx, weight = problem(n=3, e=31, k=2)
        want = by_hand(x, A, B, scale, idx, weight)
        unused = sorted(set(range(31)) - set(idx.flatten().tolist()))
        A[unused], B[unused] = float("nan"), float("nan")
        got = self.lora_mix(x, A, B, scale, idx, weight, backend)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("backend", ["bmm", "dense"])
    def test_no_loop_over_adapters(self, backend):
        """A loop over adapters in Python makes 28 adapters 28 times as slow, and nothing but the
        clock would tell."""
        small, large = {"n": 5, "e": 3, "k": 2}, {"n": 29, "e": 31, "k": 23}
        assert operations(self.lora_mix, backend, **small) == operations(self.lora_mix, backend, **large)
        loops = [len(operations(self.lora_mix, "loop", **sizes)) for sizes in (small, large)]
        assert loops[0] < loops[1]  # so a loop would be seen

    def test_auto_takes_the_backend_that_reads_fewer_adapters(self):
        """auto's choice is its whole content: reversed, decoding one token would read all the pool."""
        few, many = {"n": 2, "e": 31, "k": 2}, {"n": 29, "e": 31, "k": 3}
        for sizes, best, other in ((few, "bmm", "dense"), (many, "dense", "bmm")):
            auto = operations(self.lora_mix, "auto", **sizes)
            assert auto == operations(self.lora_mix, best, **sizes)
            assert auto != operations(self.lora_mix, other, **sizes)

    def test_unknown_backend(self):
        """A typo that falls through to some default would time and test the wrong code."""
        with pytest.raises(ValueError, match="'triton'.*loop"):
            self.lora_mix(*problem(), backend="triton")
