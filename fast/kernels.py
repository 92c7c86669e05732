"""kernels.py's operation at speed: a cost model for the backends, fused gathers, a layout of B.

The backends and their results, up to rounding, are those of kernels.py. bmm is written as
multiply-and-sums: torch.compile fuses the gather into them, so that no adapter is copied. Outside
of a compiled block bmm copies the adapters of some tokens at a time. Where each token's one adapter
is known in advance, as in training, mix_grouped does the least arithmetic: n*r*(i+o) multiply-adds.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fast.compiled import MAX_DECODE_ROWS, statically_at_most
from fast.matmul import gemm, largest_divisor, linear, widened
from kernels import BACKENDS, mix_loop, sum_dtype

AMX = torch.cpu._is_amx_tile_supported()
GROUP = 64  # positions in a group of GroupedTokens
COPIES = 2**23  # bytes of adapters that bmm copies at a time


def lora_mix(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: torch.Tensor,
    idx: torch.Tensor,
    weight: torch.Tensor,
    backend: str = "auto",
    get_ax: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """kernels.lora_mix, same shapes. Raises ValueError for an unknown backend."""
    scaled = weight * scale.to(weight.dtype)[idx]  # (n, k)
    if backend == "auto":
        backend = pick_backend(x, A, idx.shape[1])
    if backend not in MIXES:
        raise ValueError(f"backend {backend!r}, expected one of {BACKENDS}")
    return MIXES[backend](x, A, B, idx, scaled, get_ax)


def pick_backend(x: torch.Tensor, A: torch.Tensor, k: int) -> str:
    """The cost model, in multiply-adds: bmm does n*k*r*(i+o), dense does n*e*r*(i+o).

    The GEMM of dense does gemm_advantage() times as many a second as compiled multiply-and-sums,
    and its start costs as much as six adapters. For a decode batch it has no advantage: there the
    time goes into reading. Outside of a compiled block bmm copies an adapter at each use, and so
    does its gradient. With a handful of tokens a copy takes as long as a GEMM's reading of one
    adapter; with enough tokens to fill a GEMM, fifteen times as long as the sum. All is measured
    (LOG.md).
    """
    n = len(x)
    e = len(A)
    if not torch.compiler.is_compiling():
        copies = n * k * gemm_advantage(x) <= 4 * (e + 3)
        copies = copies or (15 * k * gemm_advantage(x) <= e and not A.requires_grad)
        return "bmm" if k < e and copies else "dense"
    if statically_at_most(n, MAX_DECODE_ROWS):
        gathered = statically_at_most(n * k, 16) or (5 * k <= 2 * (e + 6) and not A.requires_grad)
    else:
        gathered = k * gemm_advantage(x) <= e + 6 and not A.requires_grad
    return "bmm" if gathered else "dense"


def gemm_advantage(x: torch.Tensor) -> int:
    """How many multiply-adds a GEMM does while a compiled multiply-and-sum does one (LOG.md).
    Measured: 4 in float32, 15 with AMX. Estimated: 10 with other bf16 matmuls, 15 on a GPU."""
    if x.dtype == torch.float32 or widened(x, x.dtype):
        return 4
    return 15 if AMX or x.device.type != "cpu" else 10


def alloc_B(e: int, o: int, r: int, **options) -> torch.Tensor:
    """B (e, o, r), zero, stored (e, r, o) with 16 elements of padding a row.

    Unpadded rows lie a multiple of 4 KiB apart at most widths. A loop reads the rows of all ranks
    at the same time; they would share one cache set and evict each other (LOG.md). `options` are
    those of torch.zeros.
    """
    return torch.zeros(e, r, o + 16, **options)[..., :o].transpose(1, 2)


def compute_ax(x: torch.Tensor, *stacks: torch.Tensor) -> list[torch.Tensor]:
    """A x of all adapters of one stack A (e, r, i) or several, in one matmul: [(n, e, r), ...]."""
    e, r, i = stacks[0].shape
    rows = [A.reshape(e * r, i) for A in stacks]
    rows = rows[0] if len(rows) == 1 else torch.cat(rows)
    return list(linear(x, rows).view(-1, len(stacks), e, r).unbind(1))


def mix_bmm(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    idx: torch.Tensor,
    scaled: torch.Tensor,
    get_ax: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Each token's k adapters as multiply-and-sums, into which torch.compile fuses the gather."""

    def mix(x, idx, scaled):
        ax = gathered_ax(x, A, idx) * scaled[..., None]
        halves = B.chunk(unroll_factor(x, 2), 1)
        ys = [(b[idx].to(x.dtype).transpose(2, 3) * ax[..., None]).sum((1, 2)) for b in halves]
        return torch.cat(ys, -1).to(x.dtype)

    size = idx.shape[1] * (A.shape[1:].numel() + B.shape[1:].numel()) * x.element_size()
    return chunked(mix, size, x, idx, scaled)


def gathered_ax(x: torch.Tensor, A: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """A x of the adapters idx (n, k), as multiply-and-sums: (n, k, r)."""
    ranks = A.unflatten(1, (-1, unroll_factor(x, largest_divisor(A.shape[1], 8)))).unbind(2)

    def mix(x, idx):
        ax = [(a[idx].to(x.dtype) * x[:, None, None]).sum(-1, True, dtype=sum_dtype(x)) for a in ranks]
        return torch.cat(ax, -1).flatten(2)

    return chunked(mix, idx.shape[1] * A.shape[1:].numel() * x.element_size(), x, idx)


def unroll_factor(x: torch.Tensor, most: int) -> int:
    """How many independent sums a loop carries, to hide the latency of dependent adds: `most` for a
    prompt in a compiled block on a CPU, else one. With gradients one is fastest (LOG.md)."""
    compiled = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    prompt = compiled and not statically_at_most(len(x), MAX_DECODE_ROWS)
    return most if prompt and x.device.type == "cpu" else 1


def chunked(function: Callable, size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of tensors (n, ...), which copies `size` bytes of adapters for each of n tokens.

    It gets a chunk of tokens at a time, so that the copies stay in the caches. A compiled block
    makes no copies, and has one graph for any n.
    """
    if torch.compiler.is_compiling() or len(tensors[0]) * size <= COPIES:
        return function(*tensors)
    chunks = zip(*(y.split(max(1, COPIES // size)) for y in tensors), strict=True)
    return torch.cat([function(*some) for some in chunks])


def mix_dense(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    idx: torch.Tensor,
    scaled: torch.Tensor,
    get_ax: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """All adapters for all tokens, two GEMMs."""
    e, o, r = B.shape
    ax = get_ax() if get_ax else compute_ax(x, A)[0]
    slots = torch.arange(e, device=x.device)
    per_adapter = ((idx[..., None] == slots) * scaled[..., None]).sum(1)  # (n, e)
    ax = (ax * per_adapter[..., None].to(x.dtype)).flatten(1)  # (n, e*r)
    return gemm(ax, B.transpose(1, 2).reshape(e * r, o).T.to(x.dtype))


MIXES = {"loop": mix_loop, "bmm": mix_bmm, "dense": mix_dense}


def top_k_mixture(logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (..., e) -> idx (..., k), their softmax at `temperature` (..., k), the largest first.

    A compiled block computes k maxima, which fuse into what is around them; torch.topk doesn't
    fuse, and is slow.
    """
    if k > 8 or not torch.compiler.is_compiling():
        top, idx = logits.topk(k, dim=-1)
        return idx, torch.softmax((top - top[..., :1]) / temperature, -1)
    slots = torch.arange(logits.shape[-1], device=logits.device)
    rest = logits
    chosen = []
    top = []
    for _ in range(k):
        chosen.append(rest.argmax(-1, keepdim=True))  # (..., 1)
        top.append(rest.amax(-1, keepdim=True))  # -inf where none is left
        rest = rest.masked_fill(slots == chosen[-1], float("-inf"))
    odds = ((torch.cat(top, -1) - top[0]) / temperature).exp()
    return torch.cat(chosen, -1), odds / odds.sum(-1, keepdim=True)


# Each token's adapter is known in advance -------------------------------------------------------


class GroupedTokens(NamedTuple):
    """n tokens sorted by adapter, in m groups of GROUP positions; a group has one adapter."""

    slot: torch.Tensor  # (m,) int64, the adapter of each group
    weight: torch.Tensor  # (m, GROUP) float32, of the token at each position, 0 where it is empty
    token: torch.Tensor  # (m * GROUP,) int64, the token at each position, any where it is empty
    position: torch.Tensor  # (n,) int64, of each token

    @classmethod
    def of(cls, slots: torch.Tensor, weight: torch.Tensor) -> "GroupedTokens":
        """slots (n,) int64, weight (n,) float32."""
        device = slots.device
        count = torch.bincount(slots)
        groups = -(-count // GROUP)  # (e,)
        # (e,) positions that the groups of the earlier adapters leave empty
        empty = GROUP * (groups.cumsum(0) - groups) - (count.cumsum(0) - count)
        order = slots.argsort(stable=True)
        tokens = torch.arange(len(slots), device=device)
        slot = torch.arange(len(count), device=device).repeat_interleave(groups)
        slot = slot if len(slot) > 1 else slot.repeat(2)  # torch.compile specialises on size 1
        position = torch.empty_like(slots)
        position[order] = tokens + empty[slots[order]]
        token = slots.new_zeros(len(slot) * GROUP)
        token[position] = tokens
        weight = weight.new_zeros(len(token)).index_copy(0, position, weight)
        return cls(slot, weight.view(-1, GROUP), token, position)


def mix_grouped(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: torch.Tensor,
    grouped: GroupedTokens,
) -> torch.Tensor:
    """The operation where each token uses one adapter: x (n, i) -> (n, o), two matmuls a group."""
    e, r, i = A.shape
    dtype = torch.float32 if widened(x, x.dtype) else x.dtype
    # A matmul with a one-hot matrix is a gather whose gradient is a matmul too, with a fixed order
    # of additions.
    picks = (grouped.slot[:, None] == torch.arange(e, device=x.device)).to(A.dtype)  # (m, e)
    A = (picks @ A.flatten(1)).view(-1, r, i).to(dtype)
    # (m, r, o); B.flatten(1) would copy all of B
    B = (picks @ B.permute(2, 0, 1)).transpose(0, 1).to(dtype)
    weight = grouped.weight * scale[grouped.slot, None].to(grouped.weight.dtype)
    return _MixGroups.apply(x, A, B, weight.to(dtype)[..., None], grouped.token, grouped.position)


class _MixGroups(torch.autograd.Function):
    """weight * B[j] A[j] x for the tokens of each group j, with its gradient written out.

    A gather's gradient is a scatter-add because an index may repeat; here none does, so the
    gradient is a gather too.
    """

    @staticmethod
    def forward(ctx, x, A, B, weight, token, position):
        rows = x[token].view(len(A), GROUP, -1).to(A.dtype)  # (m, GROUP, i)
        ax = (rows @ A.mT) * weight  # (m, GROUP, r)
        ctx.save_for_backward(x, A, B, weight, token, position, ax)
        return (ax @ B).flatten(0, 1)[position].to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, A, B, weight, token, position, ax = ctx.saved_tensors
        rows = x[token].view(len(A), GROUP, -1).to(A.dtype)
        dy = dy[token].view(len(A), GROUP, -1).to(A.dtype)
        da = (dy @ B.mT) * weight  # (m, GROUP, r)
        dx = (da @ A).flatten(0, 1)[position].to(x.dtype)
        return dx, da.mT @ rows, ax.mT @ dy, None, None, None
