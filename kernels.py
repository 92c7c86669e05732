"""One operation, the weighted sum of each token's adapters, in several spellings proved equal.

    y[n] = sum over k of  weight[n, k] * scale[j] * B[j] A[j] x[n],   j = idx[n, k]          (MeteoRA, section 3)

x (n, i), A (e, r, i), B (e, o, r), scale (e,), idx (n, k) int64, weight (n, k) float32; the result is (n, o) in x's
dtype. Every spelling is differentiable in x, A, B and weight by autograd. Adapters of smaller rank are zero-padded to
r, adapters that a module lacks are zero: both exact. A and B are cast to x's dtype, products accumulate in float32.

    loop    the definition: for each adapter that some token uses, gather its tokens, two products, scatter-add
    bmm     gather each token's k adapters, two batched products; memory n*k*r*(i+o)
    dense   all adapters for all tokens, two large products with a mask between them; arithmetic n*e*r*(i+o)
"""

import torch

SPELLINGS = ("auto", "loop", "bmm", "dense")


def lora_mix(x, A, B, scale, idx, weight, spelling="auto", ax=None):
    """The operation; `ax` may bring A x for all adapters, (n, e, r), where a gate has computed it already.

    auto: bmm where the n*k adapters it reads are fewer than dense's e, else dense.
    """
    weight = weight * scale.to(weight.dtype)[idx]  # (n, k)
    if spelling == "auto":
        spelling = "bmm" if idx.numel() < A.shape[0] and ax is None else "dense"
    if spelling == "loop":
        return _loop(x, A, B, idx, weight)
    if spelling == "bmm":
        return _bmm(x, A, B, idx, weight)
    if spelling == "dense":
        return _dense(x, A, B, idx, weight, ax)
    raise ValueError(f"spelling {spelling!r}, expected one of {SPELLINGS}")


def compute_ax(x, A):
    """A x for all adapters, in one product: (n, e, r)."""
    e, r, i = A.shape
    return (x @ A.reshape(e * r, i).T.to(x.dtype)).view(-1, e, r)


def _loop(x, A, B, idx, weight):
    y = torch.zeros(x.shape[0], B.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for j in idx.unique().tolist():
        rows, slots = (idx == j).nonzero(as_tuple=True)
        ax = x[rows] @ A[j].T.to(x.dtype)  # (tokens of j, r)
        bax = (ax * weight[rows, slots, None].to(x.dtype)) @ B[j].T.to(x.dtype)
        y = y.index_add(0, rows, bax.to(y.dtype))
    return y.to(x.dtype)


def _bmm(x, A, B, idx, weight):
    n, k = idx.shape
    ax = A[idx].to(x.dtype).flatten(1, 2) @ x[:, :, None]  # (n, k*r, 1)
    ax = ax.view(n, k, -1) * weight[..., None].to(x.dtype)
    b = B[idx].to(x.dtype).transpose(1, 2).flatten(2, 3)  # (n, o, k*r)
    return (b @ ax.view(n, -1, 1)).squeeze(-1)


def _dense(x, A, B, idx, weight, ax):
    e, o, r = B.shape
    ax = compute_ax(x, A) if ax is None else ax
    mask = torch.zeros(x.shape[0], e, dtype=weight.dtype, device=x.device).scatter_add(1, idx, weight)  # (n, e)
    ax = (ax * mask[..., None].to(x.dtype)).flatten(1)  # (n, e*r)
    return ax @ B.transpose(1, 2).reshape(e * r, o).to(x.dtype)
