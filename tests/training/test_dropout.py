"""training/dropout.py: what is dropped depends on a token's seed and on the Linear, on nothing else."""

import math

import pytest
import torch

from helpers_training import options, run, write_random_pool
from training.dropout import TokenDropout, random_words

SEEDS = torch.randint(-(2**63), 2**63 - 1, (50021,), generator=torch.Generator().manual_seed(0))


def dropped(x, p, seeds=SEEDS, number=0):
    dropout = TokenDropout(p, number)
    dropout.seeds = seeds[: len(x)]
    return dropout(x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.85])
def test_keeps_the_mean(p):
    """A share of zeros that doesn't fit the scale makes training's adapters stronger or weaker than
    generation's. Each byte of a random word must be as random as the others: a column never dropped
    would be one never trained."""
    n = 16 * len(SEEDS)
    y = dropped(torch.ones(len(SEEDS), 16), p)
    share = round(256 * p) / 256
    noise = 5 * math.sqrt(share * (1 - share) / n)  # five standard deviations
    zero = (y == 0).double()
    assert abs(float(zero.mean()) - share) < noise
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - share)).item()}
    assert abs(float(y.double().mean()) - 1) < noise / (1 - share)
    assert (zero.mean(0) - share).abs().max() < noise * math.sqrt(16)
    pairs = torch.corrcoef(zero.T) - torch.eye(16)
    assert pairs.abs().max() < 5 / math.sqrt(len(SEEDS))


def test_neighbours_are_independent():
    """Tokens' seeds and Linears' salts are sums of constants: a weak function of them would drop the
    same numbers again and again, one token or one Linear later."""
    seeds = 7 + torch.arange(len(SEEDS)) * (0xBF58476D1CE4E5B9 - 2**64)
    ones = torch.ones(len(SEEDS), 3)
    zero = torch.cat([(dropped(ones, 0.5, seeds, number) == 0).double() for number in range(4)], 1)
    later = torch.cat([zero[:-1], zero[1:]], 1)  # a token beside its neighbour
    pairs = torch.corrcoef(later.T) - torch.eye(24)
    assert pairs.abs().max() < 5.5 / math.sqrt(len(SEEDS))


def test_is_splitmix64():
    """The published words of the generator whose state starts at 1234567, for which the algorithm is known
    to be good."""
    states = 1234567 + torch.arange(1, 4) * (0x9E3779B97F4A7C15 - 2**64)
    words = [word % 2**64 for word in random_words(states).tolist()]
    assert words == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_other_tokens_change_nothing():
    """A mask that depends on the batch makes a run on two processes another run than on one."""
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    y = dropped(x, 0.3)
    kept = y != 0
    assert torch.equal(y[kept], x[kept] * (256 / (256 - 77)))
    assert torch.equal(dropped(x[2:5], 0.3, SEEDS[2:]), y[2:5])
    assert not torch.equal(dropped(x, 0.3, SEEDS[7:]) != 0, kept)
    assert not torch.equal(dropped(x, 0.3, number=1) != 0, kept)
    assert dropped(x.bfloat16(), 0.3).dtype == torch.bfloat16
    assert torch.equal(dropped(x, 0.0), x)


@pytest.mark.parametrize("kind", ["adapters", "samora", "drlora"])
def test_masks_differ_from_step_to_step_and_from_seed_to_seed(kind, small_model, tmp_path, monkeypatch):
    """One mask for ever is pruning, and two runs with the same masks are no two runs."""
    seen = []
    real = TokenDropout.forward

    def look(dropout, x):
        seen.append((x.shape[0], dropout.seeds.clone()))
        return real(dropout, x)

    monkeypatch.setattr(TokenDropout, "forward", look)
    for seed in (0, 1):
        o = options(kind, small_model, tmp_path / str(seed) / "out", seed=seed, steps=3, batch_size=11)
        if kind == "samora":
            write_random_pool(tmp_path / str(seed) / "out", small_model)
        run(o)
    assert all(len(seeds) == n for n, seeds in seen)
    tokens = torch.cat([seeds for _, seeds in seen]).tolist()
    linears = len(seen) // 6
    assert len(seen) == 6 * linears and len(set(tokens)) == len(tokens) / linears
