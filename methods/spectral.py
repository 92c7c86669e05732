"""SpectR (arXiv 2504.03454) and LAG (arXiv 2507.05346): a token uses the adapters in whose input
directions most of it lies; no training.

The pool is aligned first (pool/stacks.py): the rows of A_j are the right singular vectors of B_j A_j,
that of the largest singular value first. So A_j x says how much of x lies along each of them.

    SpectR   score_j = ||A_j x||,  softmax over the k largest
    LAG      the same among the 20 adapters with the largest |first entry of A_j x|, Arrow's score
"""

import torch.nn.functional as F
from torch import Tensor, nn

from methods.protocol import Gated, member_mask
from methods.session import Mole
from moe_lora import AX, Mixture
from pool.slots import Pool
from pool.stacks import aligned_pool, warn_if_uneven

SHORTLIST = 20  # adapters that LAG compares by their norm


class SpectralGate(nn.Module):
    """The k adapters with the largest ||A_j x||, weighed by a softmax over these norms.

    `known` (e,) bool: the slots that may be chosen. With `S` (e, r), the singular values, the score is
    ||S_j A_j x||, which is ||B_j A_j x||. With `first` (e, i), the first rows of A, LAG's shortlist
    comes first.
    """

    def __init__(self, known: Tensor, k: int, temperature=1.0, S: Tensor | None = None, first=None):
        super().__init__()
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("S", S, persistent=False)
        self.register_buffer("first", first, persistent=False)
        count = int(known.sum())
        self.k = min(k, count)
        self.shortlist = max(self.k, min(SHORTLIST, count))
        self.temperature = temperature

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of k adapters a token."""
        if self.first is None:
            top, idx = self.largest(self.norms(ax(), self.S), self.k)
        else:
            arrow_score = F.linear(x.float(), self.first.float()).abs()  # (n, e)
            _, short = self.largest(arrow_score, self.shortlist)  # (n, shortlist)
            norms = self.norms(ax(short), None if self.S is None else self.S[short])
            top, position = norms.topk(self.k, dim=-1)
            idx = short.gather(1, position)
        return Mixture(idx, F.softmax((top - top[:, :1]) / self.temperature, dim=-1))

    def largest(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """scores (n, e) -> the k largest among known slots, and their slots: both (n, k)."""
        return scores.masked_fill(~self.known, float("-inf")).topk(k, dim=-1)

    @staticmethod
    def norms(ax: Tensor, S: Tensor | None) -> Tensor:
        """||A_j x||, or with S ||S_j A_j x||: ax (n, adapters, r) -> (n, adapters) float32."""
        ax = ax.float()
        return (ax if S is None else ax * S).norm(dim=-1)


class SpectR(Gated):
    """All adapters, compared by the norm of A_j x."""

    pattern = "spectr(_weighted)?"
    names = ("spectr", "spectr_weighted")
    about = "SpectR: tokens go by all directions that an adapter reads; no training"
    paper = "2504.03454"
    shortlists = False

    def __init__(self, name: str, top_k=2, weighted: str | None = None):
        super().__init__(name, top_k)
        self.weighted = bool(weighted)

    def pool_of(self, mole: Mole) -> Pool:
        """The aligned pool."""
        return aligned_pool(mole.pool)

    def gates(self, mole: Mole, pool: Pool, temperature: float, exclude: tuple) -> dict[str, nn.Module]:
        """{module path: SpectralGate} over an aligned pool's adapters without those of `exclude`."""
        warn_if_uneven(pool, self.name)
        known = member_mask(pool, mole.device, exclude)
        gates = {}
        for path, A in pool.A.items():
            S = pool.B[path].float().norm(dim=1) if self.weighted else None  # columns of B = U S
            first = A[:, 0] if self.shortlists else None
            gates[path] = SpectralGate(known, self.top_k, temperature, S, first)
        return gates


class LAG(SpectR):
    """The 20 adapters of the best Arrow score, compared by the norm of A_j x."""

    pattern = "lag(_weighted)?"
    names = ("lag", "lag_weighted")
    about = "LAG: Arrow finds 20 adapters for a token, SpectR's score picks among them; no training"
    paper = "2507.05346"
    shortlists = True
