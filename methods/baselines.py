"""What people do instead of a trained per-token gate: merged adapters, untrained, simpler and per-example routers.

    merge           average_ab, TIES (arXiv 2306.01708), DARE (2311.03099), svd: one adapter, or one delta, out of all
    ArrowGate       Arrow (2405.11157): a token goes to the adapters whose strongest input direction it lies along
    LoRAFlowGate    LoRA-Flow (2402.11455): one trained mixture of all adapters a token and layer
    SmearLinear     SMEAR (2306.03745): one merged adapter an example, by the mean of its prompt
    lorahub         LoraHub (2307.13269): one merged adapter, its weights searched on a few examples without gradients

A merge acts either on A and B apart (_ab), (mean B)(mean A) with its cross terms B_i A_j, or on the products B A
(_ba): the two differ by more than the size of the update itself. The mean of the products is no merge here: it is a
mixture of weights 1/e, exact and of full rank. Letters as in moe_lora.py; e counts the pool's members in a merge, its
slots in a gate. `scale` is folded into B first. An adapter that lacks a Linear counts as zero there.
"""

import copy
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from common.files import InputError
from moe_lora import Mixture, MultiLoRALinear
from pool.adapters import Adapter, peft_config

# Merges -------------------------------------------------------------------------------------------------------------

MERGES = ("average_ab", "ties_ab", "ties_ba", "dare_ab", "dare_ba", "svd")
DENSITY = {"ties": 0.2, "dare": 0.1}  # the share of entries kept; the papers' top 20 % and drop rate p = 0.9


def merge(pool, method, density=None, seed=0, names=(), exclude=()):
    """All members of the pool, or `names` of them, or all but `exclude`, as one: an Adapter of scale 1, or
    {module path: delta (o, i)} for ties_ba and dare_ba.

    Float32, whatever the pool's dtype, and independent of its order and spare room. The rank is that of the largest
    member. Deltas are as large as the base: with a large one, call merge_linear for one Linear at a time.
    """
    generator = torch.Generator(next(iter(pool.A.values())).device).manual_seed(seed)
    stacks = member_stacks(pool, sorted(names or pool.members.keys() - set(exclude)))
    merged = {path: merge_linear(A, B, method, density, generator) for path, A, B in stacks}
    return merged if method.endswith("_ba") else derived_adapter(pool, method, merged)


def merge_linear(A, B, method, density=None, generator=None):
    """One Linear's A (e, r, i) and scaled B (e, o, r) -> (A (r, i), B (o, r)), or delta (o, i) for the _ba methods."""
    if method not in MERGES:
        raise ValueError(f"merge {method!r}, expected one of {MERGES}")
    kind, _, space = method.partition("_")
    density = DENSITY.get(kind) if density is None else density
    if kind == "average":
        return A.mean(0), B.mean(0)
    if kind == "svd":
        return mean_svd(A, B)
    parts = [B @ A] if space == "ba" else [A, B]
    parts = [ties(part, density) if kind == "ties" else dare(part, density, generator) for part in parts]
    return parts[0] if space == "ba" else tuple(parts)


def ties(stack, density):
    """TIES on a stack (e, ...): trim each to its `density` largest in magnitude, elect each entry's sign by the total,
    mean over those that have it.

    Trimmed within the tensor, as PEFT does; the paper trims an adapter's entries of all tensors together. Zeros aren't
    counted: the padding of a smaller rank must not widen its share.
    """
    stack = torch.stack([_trim(one, density) for one in stack])
    elected = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack.sign() == elected
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def _trim(one, density):
    size = one.abs().flatten()
    keep = max(1, int(density * int(size.count_nonzero())))
    return one * (one.abs() >= size.topk(keep, sorted=False).values.min())


def dare(stack, density, generator):
    """DARE on a stack (e, ...): each entry kept with probability `density` and divided by it, else 0; then the mean."""
    kept = [one * torch.bernoulli(torch.full_like(one, density), generator=generator) for one in stack]
    return sum(kept) / (density * len(kept))


def factored_svd(A, B):
    """SVD of B A, A (..., r, i), B (..., o, r): U (..., o, c), S (..., c), Vh (..., c, i), from QR of the factors and
    an SVD of at most (r, r); the product (o, i) is never formed."""
    Qa, Ra = torch.linalg.qr(A.mT)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.mT


def mean_svd(A, B):
    """The best rank-r approximation of the mean of B A: that mean is one product of inner size e*r."""
    e, r, i = A.shape
    U, S, Vh = factored_svd(A.reshape(e * r, i), B.transpose(0, 1).reshape(-1, e * r) / e)
    spare = max(0, r - len(S))  # a Linear smaller than the rank
    return F.pad(Vh[:r], (0, 0, 0, spare)), F.pad(U[:, :r] * S[:r], (0, spare))


def member_stacks(pool, names):
    """Yields (path, A (e, r, i), scaled B (e, o, r)) of the named members in float32. r is the largest rank among them,
    not the pool's, which may remember an adapter that has left."""
    slots = [pool.slot(name) for name in names]
    r = max(pool.adapter(name).rank for name in names)
    for path, A in pool.A.items():
        yield path, A[slots, :r].float(), pool.B[path][slots, :, :r].float() * pool.scale[path][slots, None, None]


def derived_adapter(pool, name, merged):
    """{module path: (A (r, i), B (o, r))} -> an Adapter of scale 1."""
    A, B = ({path: pair[j].contiguous() for path, pair in merged.items()} for j in (0, 1))
    r = next(iter(A.values())).shape[0]
    base = next(iter(pool.members.values())).adapter.config.get("base_model_name_or_path")
    return Adapter(name, A, B, dict.fromkeys(A, 1.0), peft_config(r, r, 0.0, A, base))


def merged_linear(base, delta):
    """A Linear like `base` whose weight is W + delta, added in float32; it keeps the original, untouched, as `base` and
    shares its bias."""
    merged = copy.copy(base)
    merged._parameters = dict(base._parameters)
    weight = (base.weight.detach().float() + delta).to(base.weight.dtype)
    merged.weight = nn.Parameter(weight, requires_grad=False)
    merged._modules = {"base": base}
    return merged


# Arrow --------------------------------------------------------------------------------------------------------------


def arrow_prototypes(A, B):
    """Unit top right singular vectors (e, i) of B_j A_j, A (e, r, i), B (e, o, r); zero where B A is zero.

    Their sign is arbitrary; `scale` can't change them.
    """
    _, S, Vh = factored_svd(A.float(), B.float())
    return Vh[:, 0] * (S[:, :1] > 0)


class ArrowGate(nn.Module):
    """Arrow: logits |v_j . x|, the k largest, softmax over those at a temperature; no training.

    `known` (e,) bool: the slots that may be chosen, by default those with a prototype. Where fewer than k are, k is
    their number. As in PEFT's Arrow x is the Linear's own input, not normalised (no cosine, whatever its docstring
    says), scale multiplies each adapter's output and isn't in the logits, and outputs are mixed, not parameters. PEFT's
    differs in prototypes by 15 power iterations from a random start, wrong where two singular values are close;
    prototypes and logits in the adapters' dtype, here float32; dropout on the output, not the input; one rank for all.
    """

    def __init__(self, prototypes, k, temperature=1.0, known=None):
        super().__init__()
        self.register_buffer("prototypes", prototypes, persistent=False)
        if known is None:
            known = prototypes.any(-1)
            known = known if known.any() else ~known  # every B A is zero: any choice is right, none would be NaN
        self.register_buffer("known", known, persistent=False)
        self.k, self.temperature = min(k, int(known.sum())), temperature

    def forward(self, x, sample, ax):
        logits = F.linear(x.float(), self.prototypes.float()).abs().masked_fill(~self.known, float("-inf"))
        top, idx = logits.topk(self.k, dim=-1)  # (n, k)
        return Mixture(idx, F.softmax((top - top[:, :1]) / self.temperature, dim=-1))


# LoRA-Flow ----------------------------------------------------------------------------------------------------------


class LoRAFlowGate(nn.Module):
    """LoRA-Flow: softmax(G x) + bias over all e slots; weights may be negative and needn't sum to 1.

    `known` (e,) bool: the slots that G and bias were trained for; the others weigh 0. The mixture is kept for the
    layer's other Linears, which come after this one.
    """

    sequential = True

    def __init__(self, G, bias, known=None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(G), nn.Parameter(bias)  # G (e, i), bias (e,)
        self.register_buffer("known", all_slots(G) if known is None else known, persistent=False)
        self.mixture = None

    def forward(self, x, sample, ax):
        logits = F.linear(x.float(), self.weight.float()).masked_fill(~self.known, float("-inf"))  # (n, e)
        weight = F.softmax(logits, dim=-1) + self.bias.float() * self.known
        idx = torch.arange(logits.shape[1], device=x.device).expand_as(logits)
        self.mixture = Mixture(idx, weight)
        return self.mixture


class Follower(nn.Module):
    """Uses the mixture that the layer's LoRAFlowGate has just computed."""

    sequential = True

    def __init__(self, leader):
        super().__init__()
        self.leader = (leader,)  # in a tuple it is no submodule: its parameters are counted, saved and moved once

    def forward(self, x, sample, ax):
        return self.leader[0].mixture


def loraflow_gates(pool, known=None):
    """{module path: gate}: a LoRAFlowGate on each layer's first Linear, zero and so uniform at the start, Followers on
    the others. `known` (capacity,) bool, by default the slots in use."""
    gates, leaders = {}, {}
    for path, A in pool.A.items():  # in module order: what comes first also runs first
        layer = re.match(r".*?layers\.\d+", path)[0]
        if layer in leaders:
            gates[path] = Follower(leaders[layer])
            continue
        mask = member_mask(pool, A.device) if known is None else known
        G, bias = (torch.zeros(size, device=A.device) for size in ((pool.capacity, A.shape[2]), pool.capacity))
        gates[path] = leaders[layer] = LoRAFlowGate(G, bias, mask)
    return gates


def all_slots(G):
    return torch.ones(len(G), dtype=torch.bool, device=G.device)


def member_mask(pool, device=None, exclude=()):
    """(capacity,) bool: the slots in use, but for the adapters of `exclude`."""
    mask = torch.zeros(pool.capacity, dtype=torch.bool, device=device)
    mask[[pool.slot(name) for name in pool.resident if name not in exclude]] = True
    return mask


# SMEAR --------------------------------------------------------------------------------------------------------------


class Prompt:
    """What the SmearLinears of a model share: mask (b, t) bool, the prompt's real tokens; None while decoding."""

    def __init__(self, mask=None):
        self.mask = mask


class SmearRouter(nn.Module):
    """p = softmax(G mean x) over a sample's prompt tokens: (b, e) float32, kept until the next prompt; set `p` to
    choose it by hand. `known` (e,) bool as in the gates."""

    def __init__(self, G, prompt, known=None):
        super().__init__()
        self.weight, self.prompt, self.p = nn.Parameter(G), prompt, None  # G (e, i)
        self.register_buffer("known", all_slots(G) if known is None else known, persistent=False)

    def forward(self, x):
        if self.prompt.mask is not None:
            mask = self.prompt.mask[..., None]  # (b, t, 1)
            x = x.view(*mask.shape[:2], -1)
            mean = x.float().masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)  # (b, i)
            logits = F.linear(mean, self.weight.float()).masked_fill(~self.known, float("-inf"))
            self.p = F.softmax(logits, dim=-1)
        return self.p


class SmearLinear(MultiLoRALinear):
    """SMEAR: a Linear with one merged adapter a sample, (sum p_j s_j B_j)(sum p_j A_j), p by its SmearRouter; every
    token of a sample uses it, those after the prompt too."""

    def forward(self, x):
        y, p = self.base(x), self.gate(x)
        x = x.reshape(len(p), -1, x.shape[-1])  # (b, t, i)
        if self.trace is not None:
            self.trace[: x[..., 0].numel()] = p.detach().repeat_interleave(x.shape[1], 0)
        e = p.shape[1]  # slots that joined since the router was made weigh nothing
        A = torch.tensordot(p.to(x.dtype), self.A[:e].to(x.dtype), 1)  # (b, r, i)
        B = torch.tensordot((p * self.scale[:e]).to(x.dtype), self.B[:e].to(x.dtype), 1)  # (b, o, r)
        return y + (x @ A.mT @ B.mT).view(y.shape)


def smear_routers(pool, prompt, known=None):
    """{module path: SmearRouter}, zero and so uniform at the start; attach them with make=SmearLinear."""
    known = member_mask(pool, next(iter(pool.A.values())).device) if known is None else known
    zeros = {path: torch.zeros(pool.capacity, A.shape[2], device=A.device) for path, A in pool.A.items()}
    return {path: SmearRouter(G, prompt, known) for path, G in zeros.items()}


# LoraHub ------------------------------------------------------------------------------------------------------------


def lorahub(pool, weights):
    """(sum of w s B)(sum of w A) over `weights` {name: w}: an Adapter of scale 1. A weight counts twice: the product
    goes with its square."""
    names = sorted(weights)
    if not names:
        raise InputError("lorahub: every adapter is excluded")
    w = torch.tensor([float(weights[name]) for name in names], device=next(iter(pool.A.values())).device)
    stacks = member_stacks(pool, names)
    merged = {path: (torch.tensordot(w, A, 1), torch.tensordot(w, B, 1)) for path, A, B in stacks}
    return derived_adapter(pool, "lorahub", merged)


def lorahub_search(loss, e, steps=40, seed=0, l1=0.05, bound=1.5):
    """Minimises loss(w: list of e floats) + l1 * mean |w| over |w| <= bound, in `steps` calls of `loss`, the first at
    zeros (the base alone). Returns (best w, its value with the penalty).

    The paper's objective, start, bounds and budget; it searches by nevergrad, this is a (1+1) evolution strategy with
    the one-fifth rule: a step that helps makes steps larger by 1.5, four that don't undo that.
    """
    generator = torch.Generator().manual_seed(seed)
    best, w, step = math.inf, torch.zeros(e), 0.4
    for turn in range(steps):
        new = w
        if turn:  # a fifth of the weights at a time: to find one adapter of 28 leaves 0.80 of the error, with all 0.90
            some = torch.rand(e, generator=generator) < 0.2
            some[torch.randint(e, (1,), generator=generator)] = True
            new = (w + step * some * torch.randn(e, generator=generator)).clamp(-bound, bound)
        value = float(loss(new.tolist())) + l1 * float(new.abs().mean())
        better = value < best
        if better:
            best, w = value, new
        if turn:
            step *= 1.5 if better else 1.5**-0.25
    return w.tolist(), best
