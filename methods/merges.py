"""Merges of all adapters into one: means, TIES (arXiv 2306.01708), DARE (2311.03099), SVD.

A merge acts either on A and B apart (_ab), (mean B)(mean A) with its cross terms B_i A_j, or on the
matrices B A (_ba): the two differ by more than the size of the update itself. The mean of the B A
is no merge here: it is a mixture of weights 1/e, exact and of full rank (methods/fixed.py,
uniform). `scale` is folded into B first. An adapter that lacks a Linear counts as zero there.
Letters as in moe_lora.py; e counts the merged adapters.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.protocol import Merged, OwnLinears
from methods.session import Mole, Ranking
from moe_lora import swap
from pool.adapters import Adapter
from pool.slots import Pool
from pool.stacks import derived_adapter, factored_svd, member_stacks

MERGES = ("average_ab", "ties_ab", "ties_ba", "dare_ab", "dare_ba", "svd")
DENSITY = {"ties": 0.2, "dare": 0.1}  # share of entries kept: the papers' top 20 % and p = 0.9


def merge(
    pool: Pool, method: str, density: float | None = None, seed=0, names=(), exclude=()
) -> Adapter | dict:
    """All members of the pool, or `names` of them, or all but `exclude`, as one: an Adapter of
    scale 1, or {module path: delta (o, i)} for ties_ba and dare_ba.

    Float32, whatever the pool's dtype, and independent of its order and spare room. The rank is
    that of the largest member. Deltas are as large as the base: with a large one, call merge_linear
    for one Linear at a time.
    """
    generator = torch.Generator(next(iter(pool.A.values())).device).manual_seed(seed)
    stacks = member_stacks(pool, sorted(names or pool.members.keys() - set(exclude)))
    merged = {path: merge_linear(A, B, method, density, generator) for path, A, B in stacks}
    return merged if method.endswith("_ba") else derived_adapter(pool, method, merged)


def merge_linear(
    A: Tensor, B: Tensor, method: str, density: float | None = None, generator=None
) -> Tensor | tuple:
    """One Linear's A (e, r, i) and scaled B (e, o, r) -> (A (r, i), B (o, r)), or delta (o, i) of
    the _ba methods."""
    if method not in MERGES:
        raise ValueError(f"merge {method!r}, expected one of {MERGES}")
    kind, _, space = method.partition("_")
    density = DENSITY.get(kind) if density is None else density
    if kind == "average":
        return A.mean(0), B.mean(0)
    if kind == "svd":
        return mean_svd(A, B)

    def merged(stack):
        return ties(stack, density) if kind == "ties" else dare(stack, density, generator)

    return merged(B @ A) if space == "ba" else (merged(A), merged(B))


def ties(stack: Tensor, density: float) -> Tensor:
    """TIES on a stack (e, ...): trim each to its `density` largest in magnitude, elect each entry's
    sign by the total, mean over those that have it.

    Trimmed within the tensor, as PEFT does; the paper trims an adapter's entries of all tensors
    together. Zeros aren't counted: the padding of a smaller rank must not widen its share.
    """
    stack = torch.stack([_trim(one, density) for one in stack])
    elected = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack.sign() == elected
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def _trim(one, density):
    size = one.abs().flatten()
    keep = max(1, int(density * int(size.count_nonzero())))
    return one * (one.abs() >= size.topk(keep, sorted=False).values.min())


def dare(stack: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE on a stack (e, ...): each entry kept with probability `density` and divided by it, else
    0; then the mean."""
    total = torch.zeros_like(stack[0])
    for one in stack:
        total += one * torch.bernoulli(torch.full_like(one, density), generator=generator)
    return total / (density * len(stack))


def mean_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of the mean of B A, itself one matmul of inner size e*r."""
    e, r, i = A.shape
    U, S, Vh = factored_svd(A.reshape(e * r, i), B.transpose(0, 1).reshape(-1, e * r) / e)
    spare = max(0, r - len(S))  # a Linear smaller than the rank
    return F.pad(Vh[:r], (0, 0, 0, spare)), F.pad(U[:, :r] * S[:r], (0, spare))


def merged_linear(base: nn.Linear, delta: Tensor) -> nn.Linear:
    """A Linear like `base` whose weight is W + delta, added in float32; it keeps the original,
    untouched, as `base` and shares its bias."""
    merged = copy.copy(base)
    merged._parameters = dict(base._parameters)
    weight = (base.weight.detach().float() + delta).to(base.weight.dtype)
    merged.weight = nn.Parameter(weight, requires_grad=False)
    merged._modules = {"base": base}
    return merged


class MergedFactors(Merged):
    """A and B merged apart, or an SVD of the mean: one adapter."""

    pattern = "average_ab|ties_ab|dare_ab|svd"
    names = ("average_ab", "ties_ab", "dare_ab", "svd")
    about = "merged into one adapter: mean of A and of B; TIES; DARE; SVD of the mean of B A"
    paper = "2306.01708, 2311.03099"

    def merge(self, mole: Mole, found: Ranking, exclude: tuple) -> Adapter:
        """merge() of all adapters but those of `exclude`."""
        return merge(mole.pool, self.name, exclude=exclude)


class MergedMatrices(OwnLinears):
    """The matrices B A merged: a copy of W is edited."""

    pattern = "ties_ba|dare_ba"
    names = ("ties_ba", "dare_ba")
    about = "TIES and DARE on the matrices B A"
    paper = "2306.01708, 2311.03099"
    edits_W = True

    def deltas(self, mole: Mole, exclude: tuple) -> dict[str, Tensor]:
        """merge() of all adapters but those of `exclude`."""
        return merge(mole.pool, self.name, exclude=exclude)

    def attach(self, mole: Mole, backend: str, exclude: tuple) -> None:
        """A Linear of weight W + delta for each that the pool covers."""
        for path, delta in self.deltas(mole, exclude).items():
            swap(mole.model, path, merged_linear(mole.model.get_submodule(path), delta))
