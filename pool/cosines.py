"""How alike a pool's adapters are: the cosines between what they add to the base.

    cos(j, l) = <scale_j B_j A_j, scale_l B_l A_l> / (||scale_j B_j A_j|| ||scale_l B_l A_l||)

Products and norms are over all Linears together. Near 1, a choice between the two changes little.
"""

from itertools import combinations

import torch

from pool.slots import Pool
from pool.stacks import member_stacks


def cosines(pool: Pool, names: list[str]) -> torch.Tensor:
    """(e, e) float64 for the e adapters `names`, in their order; 0 where an adapter's B A is zero.

    B A is never formed: <B_j A_j, B_l A_l> is the sum of the entries of (B_j^T B_l) * (A_j A_l^T).
    """
    inner = torch.zeros(len(names), len(names), dtype=torch.float64)
    for _, A, B in member_stacks(pool, names):
        A = A.double()  # (e, r, i); in float32, squares could overflow
        B = B.double()  # (e, o, r)
        for j in range(len(names)):
            both = (B[j].mT @ B) * (A[j] @ A.mT)  # (e, r, r)
            inner[j] += both.sum((1, 2)).cpu()
    norm = inner.diagonal().sqrt()
    return inner / (norm[:, None] * norm).clamp(min=torch.finfo(torch.float64).tiny)


def describe_cosines(pool: Pool) -> dict:
    """{"mean", "largest": of the cosines of all pairs, "pair": the two most alike adapters}; {} with
    fewer than two adapters."""
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
