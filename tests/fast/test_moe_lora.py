"""What the fast gated Linear does its own way."""

import math

import pytest
import torch
from torch import nn

from fast.moe_lora import FastMultiLoRALinear, dropout
from helpers_kernels import problem
from helpers_models import LoudestGate


@pytest.mark.parametrize("p", [0.1, 0.5, 0.85])
def test_dropout_keeps_the_mean(p):
    """A share of zeros that doesn't fit the scale makes training's adapters stronger or weaker than
    generation's. Each byte of the random words must be as random as the others: a column never
    dropped would be one never trained."""
    torch.manual_seed(0)
    n = 8 * 50021
    y = dropout(torch.ones(n // 4, 4), p)
    share = round(256 * p) / 256
    noise = 5 * math.sqrt(share * (1 - share) / n)  # five standard deviations
    zero = (y == 0).double()
    assert y.shape == (n // 4, 4) and abs(float(zero.mean()) - share) < noise
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - share)).item()}
    assert abs(float(y.double().mean()) - 1) < noise / (1 - share)
    assert (zero.view(-1, 8).mean(0) - share).abs().max() < noise * math.sqrt(8)
    pairs = torch.corrcoef(zero.view(-1, 8).T) - torch.eye(8)
    assert pairs.abs().max() < 5 / math.sqrt(n / 8)


def test_dropout_by_the_seed():
    """A resumed training equals an uninterrupted one only if the masks come from torch's generator,
    and they must differ from call to call: one mask for ever is pruning."""
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    runs = []
    for seed in (5, 5, 7):
        torch.manual_seed(seed)
        runs.append((dropout(x, 0.3), dropout(x, 0.3)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1]) and not torch.equal(runs[0][0], runs[2][0])
    kept = runs[0][0] != 0
    assert torch.equal(runs[0][0][kept], x[kept] * (256 / (256 - 77)))
    assert dropout(x.bfloat16(), 0.3).dtype == torch.bfloat16
    assert torch.equal(dropout(x, 0.0), x)


def test_dropout_reaches_the_kernel_past_a_gate_that_asked_for_ax():
    """The gate's A x is of the undropped input: shared with the kernel while training, it would
    switch dropout off unseen."""
    base = nn.Linear(11, 13, bias=False)
    x, A, B, scale, *_ = (y.float() for y in problem(n=7, e=5, r=3, i=11, o=13))
    linear = FastMultiLoRALinear(base, A, B, scale, LoudestGate(5), backend="dense", dropout=0.5)
    torch.manual_seed(0)
    got = linear.train()(x[None])[0]
    torch.manual_seed(0)
    want = base(x) + dropout(x, 0.5) @ torch.einsum("e,eor,eri->oi", scale, B, A).T / 5
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
