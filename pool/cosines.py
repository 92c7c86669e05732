"""How alike a pool's adapters are: the cosines of what they add to the base.

cos(j, l) = <s_j B_j A_j, s_l B_l A_l> / (||s_j B_j A_j|| ||s_l B_l A_l||)

over all Linears together. Where these are near 1, a choice among the adapters changes little.
"""

from itertools import combinations

import torch

from pool.slots import Pool
from pool.stacks import member_stacks


def cosines(pool: Pool, names: list[str]) -> torch.Tensor:
    """(e, e) float64, in the order of `names`; 0 where an adapter's B A is zero. B A is never formed:
    <B_j A_j, B_l A_l> = sum over both ranks of (B_j^T B_l) * (A_j A_l^T)."""
    inner = torch.zeros(len(names), len(names), dtype=torch.float64)
    for _, A, B in member_stacks(pool, names):
        A = A.double()  # (e, r, i); what float32 holds can overflow it when squared
        B = B.double()  # (e, o, r)
        for j in range(len(names)):
            both = (B[j].mT @ B) * (A[j] @ A.mT)  # (e, r, r)
            inner[j] += both.sum((1, 2)).cpu()
    norm = inner.diagonal().sqrt()
    return inner / (norm[:, None] * norm).clamp(min=torch.finfo(torch.float64).tiny)


def describe_cosines(pool: Pool) -> dict:
    """{"mean": over all pairs, "largest", "pair": the two adapters that are most alike}, {} where
    there are no two."""
    names = sorted(pool.names)
    if len(names) < 2:
        return {}
    found = cosines(pool, names)
    pairs = {}
    for (j, first), (other, second) in combinations(enumerate(names), 2):
        pairs[first, second] = float(found[j, other])
    pair = max(pairs, key=pairs.get)
    mean = sum(pairs.values()) / len(pairs)
    return {"mean": round(mean, 4), "largest": round(pairs[pair], 4), "pair": list(pair)}
