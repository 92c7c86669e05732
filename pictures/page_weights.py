"""The weights of each Linear at each token, as few bytes as the page's heat maps need.

Of a Linear at a token the page shows the adapters that weigh most, MOST of them at most. They travel
as pairs, the slot and the weight: one byte each, or two for the slot in a pool of more than 256
slots. A weight byte counts 255ths of `unit`, 1 unless some weight is larger; 0 says that there is
no adapter.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST = 4


class Heaviest(NamedTuple):
    """What n tokens used in m Linears."""

    slot: Tensor  # (n, m, k) int16, the heaviest first
    weight: Tensor  # (n, m, k) float32, 0 for no adapter
    ess: Tensor  # (n,) float32, effective number of adapters, 0 where no adapter took part
    below_zero: bool  # whether some weights are: the page leaves those out


def heaviest(weights: Tensor) -> Heaviest:
    """Weights (m, n, e) of n tokens in m Linears -> their Heaviest.

    A token's effective number of adapters is (sum |w|)^2 / sum w^2 in a Linear, averaged over the
    Linears in which it uses an adapter (ESS, arXiv 2603.10160).
    """
    norm = partial(torch.linalg.vector_norm, weights, dim=-1, dtype=torch.float64)
    total = norm(ord=1)  # (m, n)
    ess = total**2 / (norm(ord=2) ** 2).clamp(min=1e-30)
    ess = ess.sum(0) / (total > 0).sum(0).clamp(min=1)  # (n,)
    top = weights.topk(min(MOST, weights.shape[-1]), -1)
    slot, weight = (y.movedim(0, 1).cpu() for y in (top.indices.short(), top.values.float().clamp(min=0)))
    return Heaviest(slot, weight, ess.float().cpu(), bool((weights < 0).any()))


class LinearWeights:
    """Keeps what decode() shows it of each forward (its `watch`): the Heaviest of all tokens."""

    def __init__(self):
        self.forwards = []  # the prompts' first, then each step's

    def __call__(self, weights: Tensor) -> None:
        """One forward's weights (m, b, t, e)."""
        b, t = weights.shape[1:3]
        found = heaviest(weights.flatten(1, 2))
        rows = [y.unflatten(0, (b, t)) for y in found[:3]]
        self.forwards.append(Heaviest(*rows, found.below_zero))

    def of_row(self, row: int, prompt: int, answer: int) -> Heaviest:
        """Of row `row`'s `prompt` tokens and, after them, its answer's first `answer` tokens: the
        first was computed with the prompt's last token, each later one in a step of its own."""
        if not self.forwards:
            none = torch.zeros(prompt + answer, 0, 0)
            return Heaviest(none.short(), none, none.sum((1, 2)), False)
        first, *steps = self.forwards
        parts = []
        for j in range(3):
            before = [first[j][row, :prompt], first[j][row, prompt - 1 : prompt]]
            parts.append(torch.cat([*before, *(step[j][row] for step in steps)])[: prompt + answer])
        return Heaviest(*parts, any(forward.below_zero for forward in self.forwards))


def pack(rows: list[Heaviest], e: int) -> tuple[list[bytes], int, float]:
    """The tokens of all `rows` as bytes -> (bytes for each token: k pairs of slot and weight for
    each Linear in turn, two bytes of the slot with the low one first where e > 256; k; unit)."""
    weight = np.concatenate([row.weight.numpy() for row in rows])  # (n, m, k)
    slot = np.concatenate([row.slot.numpy() for row in rows])
    k = int((weight > 0).sum(-1).max(initial=0))
    unit = max(1.0, float(weight.max(initial=0)))
    parts = [slot[..., :k] & 255, np.rint(weight[..., :k] / unit * 255)]
    if e > 256:
        parts.insert(1, slot[..., :k] >> 8)
    pairs = np.stack(parts, -1).astype(np.uint8)  # (n, m, k, 2 or 3)
    return [token.tobytes() for token in pairs], k, unit
