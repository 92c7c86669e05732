"""One operation, the weighted sum of each token's adapters, in three backends.

    y[u] = sum over c of  weight[u, c] * scale[j] * B[j] A[j] x[u],   j = idx[u, c]

for token u of n and choice c of k. x (n, i) are the tokens, i and o the in and out features of a
Linear; A (e, r, i), B (e, o, r) and scale (e,) are e adapters of rank r. idx (n, k) int64 and
weight (n, k) float32 are each token's k adapters and their weights. y (n, o) has x's dtype. Every
backend is differentiable in x, A, B and weight by autograd.

    loop    the definition: for each adapter in use, two matmuls over the tokens that use it
    bmm     gathers each token's k adapters, then two batched matmuls: copies n*k*r*(i+o) numbers
    dense   all adapters for all tokens, two large matmuls; between them A x is multiplied by the
            tokens' weights (n, e), most of which are 0

An adapter of smaller rank is padded with zeros to r; one that doesn't change this Linear is all
zeros. Neither changes the result. A and B may have another dtype than x: loop and dense multiply
in x's dtype, bmm in float32 (float64 if x is float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_mix(x: Tensor, A: Tensor, B: Tensor, scale: Tensor, idx: Tensor, weight: Tensor,
             backend="auto", get_ax=None) -> Tensor:  # fmt: skip
    """The operation, shapes as above -> (n, o); backends differ only in rounding. `get_ax()` is A x
    of all adapters (n, e, r), which a gate may have computed already; only dense calls it.
    Raises ValueError for an unknown backend."""
    scaled = weight * scale.to(weight.dtype)[idx]  # (n, k)
    if backend == "auto":
        backend = pick_backend(len(x), len(A), idx.shape[1])
    if backend not in MIXES:
        raise ValueError(f"backend {backend!r}, expected one of {BACKENDS}")
    return MIXES[backend](x, A, B, idx, scaled, get_ax)


def pick_backend(n: int, e: int, k: int) -> str:
    """Whichever reads fewer adapters: bmm reads n*k, dense reads e."""
    return "bmm" if n * k < e else "dense"


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums accumulate in: float32, or float64 if x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


def linear_in(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T in another dtype than x's: x (n, i), weight (o, i) -> (n, o)."""
    return F.linear(x.to(dtype), weight.to(dtype))


def compute_ax(x: Tensor, A: Tensor) -> Tensor:
    """A x of all adapters, one matmul: x (n, i), A (e, r, i) -> (n, e, r)."""
    return F.linear(x, A.flatten(0, 1).to(x.dtype)).unflatten(-1, A.shape[:2])


# The backends: shapes as in lora_mix; `scaled` (n, k) is weight * scale; each returns (n, o).


def mix_loop(x: Tensor, A: Tensor, B: Tensor, idx: Tensor, scaled: Tensor, get_ax=None) -> Tensor:
    """The definition, one adapter at a time."""
    y = torch.zeros(len(x), B.shape[1], dtype=sum_dtype(x), device=x.device)
    for j in idx.unique().tolist():
        tokens, choices = torch.where(idx == j)  # tokens that use j, and its column in their idx
        ax = F.linear(x[tokens], A[j].to(x.dtype))  # (tokens of j, r)
        ax = ax * scaled[tokens, choices, None].to(x.dtype)
        y = y.index_add(0, tokens, F.linear(ax, B[j].to(x.dtype)).to(y.dtype))
    return y.to(x.dtype)


def mix_bmm(x: Tensor, A: Tensor, B: Tensor, idx: Tensor, scaled: Tensor, get_ax=None) -> Tensor:
    """Gathers the adapters that each token uses."""
    A = A[idx].to(sum_dtype(x))  # (n, k, r, i)
    B = B[idx].to(sum_dtype(x))  # (n, k, o, r)
    ax = torch.einsum("nkri,ni->nkr", A, x.to(A.dtype))
    return torch.einsum("nkor,nkr->no", B, ax * scaled[..., None]).to(x.dtype)


def mix_dense(x: Tensor, A: Tensor, B: Tensor, idx: Tensor, scaled: Tensor, get_ax=None) -> Tensor:
    """Computes every adapter for every token; those that a token doesn't use get weight 0."""
    chosen = F.one_hot(idx, len(A)).to(scaled.dtype)  # (n, k, e)
    per_adapter = (chosen * scaled[..., None]).sum(1)  # (n, e)
    ax = get_ax() if get_ax else compute_ax(x, A)  # (n, e, r)
    ax = ax * per_adapter[..., None].to(x.dtype)
    B = B.transpose(0, 1).flatten(1)  # (o, e*r)
    return F.linear(ax.flatten(1), B.to(x.dtype))


MIXES = {"loop": mix_loop, "bmm": mix_bmm, "dense": mix_dense}
BACKENDS = ("auto", *MIXES)
