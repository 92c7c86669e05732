"""What several methods compute from a pool's stacks: float32 copies, derived adapters, SVDs."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from common.files import warn_once
from pool.adapters import Adapter, peft_config
from pool.slots import Pool


def factored_svd(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of B A, A (..., r, i), B (..., o, r): U (..., o, c), S (..., c), Vh (..., c, i).

    QR of the factors leaves an SVD of at most (r, r); the matrix (o, i) is never formed.
    """
    Qa, Ra = torch.linalg.qr(A.mT)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.mT


def aligned_pool(pool: Pool) -> Pool:
    """The pool's resident adapters in the same slots, with other factors of the same B A.

    Where B A = U S V^T is the SVD, the new A is V^T and the new B is U S. The rows of A have length 1,
    that of the largest singular value first. Where a singular value is zero up to rounding, the row of
    A and the column of B are zero, as in padding.
    """
    like = next(iter(pool.A.values()))
    aligned = Pool(dict(pool.shapes), pool.capacity, pool.rank, like.dtype, like.device, pool.alloc_B)
    dtype = torch.promote_types(like.dtype, torch.float32)
    for path, A in pool.A.items():
        U, S, Vh = factored_svd(A.to(dtype), pool.B[path].to(dtype))
        c = S.shape[1]  # less than r where the Linear is that small
        relative = S / S[:, :1].clamp(min=torch.finfo(dtype).tiny)
        real = relative > c * torch.finfo(dtype).eps  # (e, c)
        aligned.A[path][:, :c] = Vh * real[..., None]
        aligned.B[path][..., :c] = U * (S * real)[:, None]
        aligned.scale[path].copy_(pool.scale[path])
    aligned.members = {name: replace(pool.members[name]) for name in pool.resident}
    aligned.need(aligned.members)
    return aligned


def member_stacks(pool: Pool, names: list[str]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields (path, A (e, r, i), scaled B (e, o, r)) of the named members in float32.

    r is their largest rank. The pool's may be larger, because of an adapter that has left.
    """
    slots = list(map(pool.slot, names))
    r = max(pool.adapter(name).rank for name in names)
    for path, A in pool.A.items():
        scale = pool.scale[path][slots, None, None]
        yield path, A[slots, :r].float(), pool.B[path][slots, :, :r].float() * scale


def derived_adapter(pool: Pool, name: str, merged: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Adapter:
    """{module path: (A (r, i), B (o, r))} -> an Adapter of scale 1, computed from the pool's."""
    return unit_adapter(name, merged, common_base(pool, pool.members))


def cut_to_ranks(pool: Pool, ranks: torch.Tensor) -> list[Adapter]:
    """The pool's adapters, cut to `ranks` (m, e) int64 in its m Linears; each scale is multiplied into B."""
    adapters = []
    for slot, name in enumerate(pool.names):
        factors = {}
        for path, r in zip(pool.A, ranks[:, slot].tolist(), strict=True):
            B = pool.B[path][slot, :, :r] * pool.scale[path][slot]
            factors[path] = pool.A[path][slot, :r], B
        samples = pool.members[name].adapter.samples
        adapters.append(replace(derived_adapter(pool, name, factors), samples=samples))
    return adapters


def unit_adapter(
    name: str, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], base: str | None
) -> Adapter:
    """{module path: (A (r, i), B (o, r))}, r as it may be in each -> an Adapter of scale 1.

    lora_alpha is r, the largest rank, and alpha_pattern is rank_pattern. So a reader that knows
    nothing of patterns (vLLM's) finds the right scale, and the rank that it needs room for.
    """
    A = {path: a.contiguous() for path, (a, _) in factors.items()}
    B = {path: b.contiguous() for path, (_, b) in factors.items()}
    r = max(map(len, A.values()))
    config = peft_config(r, r, 0.0, A, base)
    smaller = {path: len(a) for path, a in A.items() if len(a) < r}
    if smaller:
        config |= {"rank_pattern": smaller, "alpha_pattern": smaller}
    return Adapter(name, A, B, dict.fromkeys(A, 1.0), config)


def common_base(pool: Pool, names: Iterable[str]) -> str | None:
    """The base that the configs of all the named members name, None where they disagree."""
    configs = [pool.members[name].adapter.config for name in names]
    bases = {config.get("base_model_name_or_path") for config in configs}
    return bases.pop() if len(bases) == 1 else None


def average_factors(pool: Pool, name: str, names: Iterable[str]) -> Adapter:
    """(mean B)(mean A) of the named members: an Adapter of scale 1, with cross terms B_i A_j."""
    stacks = member_stacks(pool, sorted(names))
    return derived_adapter(pool, name, {path: (A.mean(0), B.mean(0)) for path, A, B in stacks})


def warn_if_uneven(pool: Pool, method: str) -> None:
    """One warning where adapters differ in Linears, rank or scale and the method compares them by
    their size."""
    kinds = set()
    for member in pool.members.values():
        scale = member.adapter.scale
        kinds.add((member.adapter.config["r"], tuple(sorted(scale.items()))))
    if len(kinds) > 1:
        found = "the adapters differ in Linears, rank or scale"
        instead = "selection and logo_top1 don't"
        warn_once(f"{found}, and {method} favours some for that alone; {instead}")
