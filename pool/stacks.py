"""What methods compute from a pool's stacks: float32 copies of its members, derived adapters, an
SVD of B A."""

import torch

from pool.adapters import Adapter, peft_config


def factored_svd(A, B):
    """SVD of B A, A (..., r, i), B (..., o, r): U (..., o, c), S (..., c), Vh (..., c, i), from QR
    of the factors and an SVD of at most (r, r); the matrix (o, i) is never formed."""
    Qa, Ra = torch.linalg.qr(A.mT)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.mT


def member_stacks(pool, names):
    """Yields (path, A (e, r, i), scaled B (e, o, r)) of the named members in float32. r is the
    largest rank among them, not the pool's, which may remember an adapter that has left."""
    slots = [pool.slot(name) for name in names]
    r = max(pool.adapter(name).rank for name in names)
    for path, A in pool.A.items():
        yield (
            path,
            A[slots, :r].float(),
            pool.B[path][slots, :, :r].float() * pool.scale[path][slots, None, None],
        )


def derived_adapter(pool, name, merged):
    """{module path: (A (r, i), B (o, r))} -> an Adapter of scale 1."""
    A, B = ({path: pair[j].contiguous() for path, pair in merged.items()} for j in (0, 1))
    r = next(iter(A.values())).shape[0]
    base = next(iter(pool.members.values())).adapter.config.get("base_model_name_or_path")
    return Adapter(name, A, B, dict.fromkeys(A, 1.0), peft_config(r, r, 0.0, A, base))


def average_factors(pool, name, names):
    """(mean B)(mean A) of the named members: an Adapter of scale 1, with cross terms B_i A_j."""
    return derived_adapter(
        pool, name, {path: (A.mean(0), B.mean(0)) for path, A, B in member_stacks(pool, sorted(names))}
    )
