"""LoRA dropout that doesn't depend on the batch: what is dropped of a token comes from its own seed.

So a step gives the same gradients, up to rounding, however its examples are split into batches or
among processes.
"""

import random

import torch
from torch import Tensor, nn

from model import Llama
from moe_lora import attached
from pool.slots import Pool
from tasks.folders import Batch

# Odd constants: two of splitmix64, a generator of random 64-bit words, and its step. As signed numbers.
STEP = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


class TokenDropout(nn.Module):
    """Sets each number to zero with probability p, and divides the others by 1 - p. p is rounded to
    1/256, as a number has one random byte. `number`: Linears of different numbers drop other things.
    `seeds` (n,) int64 are those of the next forward's tokens."""

    per_token = ("seeds",)

    def __init__(self, p: float, number: int):
        super().__init__()
        self.cut = round(256 * p)
        self.register_buffer("salt", torch.tensor(number) * MIX_2, persistent=False)
        self.seeds = None

    def forward(self, x: Tensor) -> Tensor:
        """x (n, i) -> (n, i)."""
        columns = torch.arange((x.shape[-1] + 7) // 8, device=x.device) * STEP
        words = random_words((self.seeds + self.salt)[:, None] + columns)  # (n, i / 8)
        # From one dimension: of two, torch.compile (2.13) would get the size wrong and crash.
        octets = words.flatten().view(torch.uint8).view(len(x), -1)  # (n, i rounded up)
        keep = octets[:, : x.shape[-1]] >= self.cut
        return x * keep * (256 / (256 - self.cut))


def random_words(z: Tensor) -> Tensor:
    """int64 -> random int64 of the same shape: splitmix64's function of the same 64 bits."""
    z = (z ^ shifted(z, 30)) * MIX_1
    z = (z ^ shifted(z, 27)) * MIX_2
    return z ^ shifted(z, 31)


def shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits with zeros from the left; torch's own shift repeats the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def token_dropout(pool: Pool, p: float) -> dict[str, TokenDropout]:
    """{module path: TokenDropout}, for attach(); {} for p = 0."""
    return {
        path: TokenDropout(p, number).to(A.device) for number, (path, A) in enumerate(pool.A.items()) if p
    }


def seed_dropout(model: Llama, batch: Batch) -> None:
    """Before a forward of the batch's real tokens: a token's seed comes from the batch's seed, the ids of
    its row and its place in the row."""
    dropouts = [linear.dropout for linear in attached(model).values() if linear.dropout]
    if not dropouts:
        return
    seeds = []
    for ids, n in zip(batch.ids.tolist(), batch.lengths, strict=True):
        seeds.append(random.Random(f"{batch.seed}/dropout/{ids[:n]}").getrandbits(64) - 2**63)
    places = torch.arange(batch.ids.shape[1]) * MIX_1
    seeds = torch.tensor(seeds)[:, None] + places  # (b, t)
    for dropout in dropouts:
        dropout.seeds = seeds.to(batch.real.device)[batch.real]
