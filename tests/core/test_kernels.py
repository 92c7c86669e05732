"""The kernel: every backend equals a loop over tokens written out by hand, forward and backward,
for any routing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from helpers_kernels import KernelTests, check_any_size, problem
from kernels import pick_backend


class TestKernels(KernelTests):
    lora_mix = staticmethod(kernels.lora_mix)
    compute_ax = staticmethod(kernels.compute_ax)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_size(data):
    """A backend that is right for round sizes may break where a size is 1 or where sizes coincide
    (squeeze, broadcast)."""
    check_any_size(kernels.lora_mix, data)


def test_compute_ax_is_a_times_x():
    """(n, e, r) with e and r swapped has the same number of elements and would pass unseen where e
    = r."""
    x, A, *_ = problem(n=3, e=7, r=5)
    want = torch.stack([torch.stack([A[j] @ token for j in range(7)]) for token in x])
    torch.testing.assert_close(kernels.compute_ax(x, A), want, rtol=0, atol=1e-12)


def test_the_rule_picks_what_reads_fewer_adapters():
    """Turned round, one token would read the whole pool, and a prompt copy an adapter for every
    token."""
    assert [pick_backend(n, 31, 3) for n in (1, 10, 11)] == ["bmm", "bmm", "dense"]
    assert pick_backend(1, 5, 5) == "dense"
