"""What the fast gated Linear does its own way."""

import torch
from torch import nn

from fast.moe_lora import FastMultiLoRALinear
from helpers_kernels import problem
from helpers_models import LoudestGate


def test_dropout_reaches_the_kernel_past_a_gate_that_asked_for_ax():
    """The gate's A x is of the undropped input: shared with the kernel while training, it would
    switch dropout off unseen."""
    base = nn.Linear(11, 13, bias=False)
    x, A, B, scale, *_ = (y.float() for y in problem(n=7, e=5, r=3, i=11, o=13))
    halved = lambda x: x * (torch.arange(11) % 2)  # noqa: E731
    linear = FastMultiLoRALinear(base, A, B, scale, LoudestGate(5), backend="dense", dropout=halved)
    got = linear.train()(x[None])[0]
    want = base(x) + halved(x) @ torch.einsum("e,eor,eri->oi", scale, B, A).T / 5
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
