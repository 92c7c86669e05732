"""One operation, the weighted sum of each token's adapters, in several spellings proved equal.

    y[n] = sum over k of  weight[n, k] * scale[j] * B[j] A[j] x[n],   j = idx[n, k]          (MeteoRA, section 3)

x (n, i), A (e, r, i), B (e, o, r), scale (e,), idx (n, k) int64, weight (n, k) float32; the result is (n, o) in x's
dtype. Every spelling is differentiable in x, A, B and weight by autograd. Adapters of smaller rank are zero-padded to
r, adapters that a module lacks are zero: both exact. A and B are cast to x's dtype, products accumulate in float32.

    loop    the definition: for each adapter that some token uses, gather its tokens, two products, scatter-add
    bmm     gather each token's k adapters, two batched products as sums: nothing else is read; in a compiled block the
            gathering is joined with the sums, else some tokens' adapters are copied at a time
    dense   all adapters for all tokens, two large products with a mask between them; arithmetic n*e*r*(i+o)

Where each token's one adapter is known in advance, as in training, lora_own has the least arithmetic, n*r*(i+o).
"""

from typing import NamedTuple

import torch

from fast.compiled import FEW, at_most
from fast.matmul import divisor, linear, product, widened

SPELLINGS = ("auto", "loop", "bmm", "dense")
AMX = torch.cpu._is_amx_tile_supported()
CHUNK = 64  # tokens of one adapter that lora_own takes together
COPIES = 2**23  # bytes of adapters that bmm copies at a time


def lora_mix(x, A, B, scale, idx, weight, spelling="auto", ax=None):
    """The operation; `ax` may be a callable -> (n, e, r), A x for all adapters, where others need that too."""
    weight = weight * scale.to(weight.dtype)[idx]  # (n, k)
    if spelling == "auto":
        spelling = choose(x, A, idx.shape[1])
    if spelling not in MIXES:
        raise ValueError(f"spelling {spelling!r}, expected one of {SPELLINGS}")
    return MIXES[spelling](x, A, B, idx, weight, ax)


def choose(x, A, k):
    """The cost model, in multiply-adds: bmm does n*k*r*(i+o) and dense n*e*r*(i+o), but the library's products do
    lead() times as many a second as compiled sums, and cost as much as six adapters to start. They gain nothing for few
    tokens, where all is reading. Sums that are not compiled copy an adapter at each use, in the time in which a product
    reads one, or fifteen times a sum's where tokens fill a product; their gradient does so too. The numbers are
    measured (LOG.md)."""
    n, e = len(x), len(A)
    if not torch.compiler.is_compiling():
        copies = n * k * lead(x) <= 4 * (e + 3) or (15 * k * lead(x) <= e and not A.requires_grad)
        return "bmm" if k < e and copies else "dense"
    if at_most(n, FEW):
        sums = at_most(n * k, 16) or (5 * k <= 2 * (e + 6) and not A.requires_grad)
    else:
        sums = k * lead(x) <= e + 6 and not A.requires_grad
    return "bmm" if sums else "dense"


def lead(x):
    """How many multiply-adds a library's product does in the time of one of a compiled sum: 4 in float32 and 15 with
    AMX, measured; 10 with other bf16 products and 15 on a GPU, estimated (LOG.md)."""
    if x.dtype == torch.float32 or widened(x, x.dtype):
        return 4
    return 15 if AMX or x.device.type != "cpu" else 10


def zero_B(e, o, r, **options):
    """B (e, o, r), zero, as sums read it fastest: a rank's numbers together, and 16 numbers left out between one rank
    and the next, a view with gaps. Without these the ranks that are summed side by side are, at most widths, a multiple
    of 4,096 bytes apart, and put each other out of the cache (LOG.md)."""
    return torch.zeros(e, r, o + 16, **options)[..., :o].transpose(1, 2)


def compute_ax(x, *stacks):
    """A x for all adapters of one stack A or several, in one product: [(n, e, r), ...]."""
    e, r, i = stacks[0].shape
    rows = [A.reshape(e * r, i) for A in stacks]
    rows = rows[0] if len(rows) == 1 else torch.cat(rows)
    return list(linear(x, rows).view(-1, len(stacks), e, r).unbind(1))


def accumulate(x):
    """The dtype of sums: float32, or float64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def _loop(x, A, B, idx, weight, ax):
    y = torch.zeros(x.shape[0], B.shape[1], dtype=accumulate(x), device=x.device)
    for j in idx.unique().tolist():
        rows, slots = (idx == j).nonzero(as_tuple=True)
        ax = linear(x[rows], A[j])  # (tokens of j, r)
        bax = linear(ax * weight[rows, slots, None].to(x.dtype), B[j])
        y = y.index_add(0, rows, bax.to(y.dtype))
    return y.to(x.dtype)


def _bmm(x, A, B, idx, weight, ax):
    """As sums: a compiler joins them with the gathering, and no copy of an adapter is made."""

    def sums(x, idx, weight):
        ax = ax_of(x, A, idx) * weight[..., None]
        ys = [(b[idx].to(x.dtype).transpose(2, 3) * ax[..., None]).sum((1, 2)) for b in B.chunk(at_once(x, 2), 1)]
        return torch.cat(ys, -1).to(x.dtype)

    size = idx.shape[1] * (A.shape[1:].numel() + B.shape[1:].numel()) * x.element_size()
    return in_pieces(sums, size, x, idx, weight)


def at_once(x, most):
    """How many sums a loop makes side by side, so that one needn't wait for another's addition: `most` of many tokens
    in a compiled block on a CPU, elsewhere one. One too where gradients are recorded: these took longer (LOG.md)."""
    many = torch.compiler.is_compiling() and not torch.is_grad_enabled() and not at_most(len(x), FEW)
    return most if many and x.device.type == "cpu" else 1


def ax_of(x, A, idx):
    """A x of the adapters idx (n, k), as sums: (n, k, r)."""
    ranks = A.unflatten(1, (-1, at_once(x, divisor(A.shape[1], 8)))).unbind(2)

    def sums(x, idx):
        ax = [(a[idx].to(x.dtype) * x[:, None, None]).sum(-1, True, dtype=accumulate(x)) for a in ranks]
        return torch.cat(ax, -1).flatten(2)

    return in_pieces(sums, idx.shape[1] * A.shape[1:].numel() * x.element_size(), x, idx)


def in_pieces(function, size, *tensors):
    """`function` of tensors (n, ...), which copies `size` bytes of adapters for each of n: of so many at a time that
    the copies stay in a processor's caches. Compiled there are no copies, and one graph for any n."""
    if torch.compiler.is_compiling() or len(tensors[0]) * size <= COPIES:
        return function(*tensors)
    pieces = zip(*(y.split(max(1, COPIES // size)) for y in tensors), strict=True)
    return torch.cat([function(*some) for some in pieces])


def _dense(x, A, B, idx, weight, ax):
    e, o, r = B.shape
    ax = ax() if ax else compute_ax(x, A)[0]
    slots = torch.arange(e, device=x.device)
    mask = ((idx[..., None] == slots) * weight[..., None]).sum(1)  # (n, e)
    ax = (ax * mask[..., None].to(x.dtype)).flatten(1)  # (n, e*r)
    return product(ax, B.transpose(1, 2).reshape(e * r, o).T.to(x.dtype))


class Own(NamedTuple):
    """The one adapter of each of n tokens: these sorted by adapter, in m chunks of CHUNK places, each chunk of one."""

    slot: torch.Tensor  # (m,) int64, of each chunk
    weight: torch.Tensor  # (m, CHUNK) float32, of the token at each place, 0 where there is none
    token: torch.Tensor  # (m * CHUNK,) int64, at each place, any where there is none
    place: torch.Tensor  # (n,) int64, of each token

    @classmethod
    def of(cls, slots, weight):
        """slots (n,) int64, weight (n,) float32."""
        count = torch.bincount(slots)
        chunks = -(-count // CHUNK)  # (e,)
        before = CHUNK * (chunks.cumsum(0) - chunks) - (count.cumsum(0) - count)  # places left empty in other chunks
        order, tokens = slots.argsort(stable=True), torch.arange(len(slots), device=slots.device)
        slot = torch.arange(len(count), device=slots.device).repeat_interleave(chunks)
        slot = slot if len(slot) > 1 else slot.repeat(2)  # to a compiler a size of 1 is a graph of its own
        place, token = torch.empty_like(slots), slots.new_zeros(len(slot) * CHUNK)
        place[order] = tokens + before[slots[order]]
        token[place] = tokens
        return cls(slot, weight.new_zeros(len(token)).index_copy(0, place, weight).view(-1, CHUNK), token, place)

    def of_each_token(self):
        """idx (n, 1), weight (n, 1)."""
        return self.slot[self.place // CHUNK, None], self.weight.flatten()[self.place, None]


def lora_own(x, A, B, scale, own):
    """The operation where each token uses one adapter, its `own`: x (n, i) -> (n, o), two products a chunk."""
    e, r, i = A.shape
    dtype = torch.float32 if widened(x, x.dtype) else x.dtype
    picks = one_hot(own.slot, e, A.dtype)  # (m, e)
    A = (picks @ A.flatten(1)).view(-1, r, i).to(dtype)
    B = (picks @ B.permute(2, 0, 1)).transpose(0, 1).to(dtype)  # (m, r, o); flatten would copy all of B
    weight = (own.weight * scale[own.slot, None].to(own.weight.dtype)).to(dtype)[..., None]  # (m, CHUNK, 1)
    return _Chunks.apply(x, A, B, weight, own.token, own.place)


class _Chunks(torch.autograd.Function):
    """A[j] x, weighted, times B[j] for the tokens of each chunk j, and the gradients by the products that are fastest.
    That of reading rows of x in another order would be sums, as rows may be read twice: here it is reading too."""

    @staticmethod
    def forward(ctx, x, A, B, weight, token, place):
        rows = x[token].view(len(A), CHUNK, -1).to(A.dtype)  # (m, CHUNK, i)
        ax = (rows @ A.mT) * weight  # (m, CHUNK, r)
        ctx.save_for_backward(x, A, B, weight, token, place, ax)
        return (ax @ B).flatten(0, 1)[place].to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, A, B, weight, token, place, ax = ctx.saved_tensors
        rows, dy = (y[token].view(len(A), CHUNK, -1).to(A.dtype) for y in (x, dy))
        da = (dy @ B.mT) * weight  # (m, CHUNK, r)
        dx = (da @ A).flatten(0, 1)[place].to(x.dtype)
        return dx, da.mT @ rows, ax.mT @ dy, None, None, None


def one_hot(idx, e, dtype):
    """idx (..., k) -> (..., k, e). A product with it is a gathering whose gradient is a product too: indexing's adds up
    in whatever order threads come."""
    return (idx[..., None] == torch.arange(e, device=idx.device)).to(dtype)


def top_k_mixture(logits, k, temperature):
    """logits (..., e) -> idx (..., k), their softmax at `temperature` (..., k), the largest first. In a compiled block
    as k maxima, which the compiler joins with what is around them: torch.topk stays a call of its own, a slow one."""
    if k > 8 or not torch.compiler.is_compiling():
        top, idx = logits.topk(k, dim=-1)
        return idx, torch.softmax((top - top[..., :1]) / temperature, -1)
    slots, rest, chosen, top = torch.arange(logits.shape[-1], device=logits.device), logits, [], []
    for _ in range(k):
        chosen.append(rest.argmax(-1, keepdim=True))  # (..., 1)
        top.append(rest.amax(-1, keepdim=True))  # -inf where none is left
        rest = rest.masked_fill(slots == chosen[-1], float("-inf"))
    odds = ((torch.cat(top, -1) - top[0]) / temperature).exp()
    return torch.cat(chosen, -1), odds / odds.sum(-1, keepdim=True)


MIXES = {"loop": _loop, "bmm": _bmm, "dense": _dense}
