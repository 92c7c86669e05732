"""RAMoLE's RouterLoRA (arXiv 2406.16989): weighs the adapters retrieved for a request, token by token; its file."""

import torch
import torch.nn.functional as F
from torch import nn

from common.files import InputError, read_safetensors, write_safetensors
from kernels import sum_dtype
from moe_lora import Mixture


class RouterLoRA(nn.Module):
    """RAMoLE's router for one Linear: weighs the adapters retrieved for a request, token by token (Eqs. 6 to 11).

        q = A_r x,   v_j = s_j B_j A_j x,   key_j = B_r^T v_j,   weight = softmax over the retrieved j of <q, key_j> / d

    A_r (r_q, i) and B_r (o, r_q) are all that trains, so an adapter that joins later needs nothing. <q, key_j> is
    q . inner_j (A_j x) with inner_j = s_j B_r^T B_j (r_q, r): no adapter's full output is formed to be scored.
    `divisor` d is sqrt(r_q) by default, `scaled` says whether s_j is part of the scored v_j; what the paper does in
    either case isn't certain. `idx` (b, k) int64 and `bias` (b, k) float32 are the batch's candidates: the bias is
    added to the scores, -inf where a row has fewer. With a `prior` it is the retrieval score over that temperature, so
    that a router that knows nothing of an adapter trusts the retriever; without (0), as in the paper, it is zero.
    """

    per_batch = ("idx", "bias")

    def __init__(self, A, B, divisor=None, scaled=True, prior=0.0):
        super().__init__()
        self.A, self.B, self.scaled, self.prior = nn.Parameter(A), nn.Parameter(B), scaled, prior
        self.divisor = divisor or len(A) ** 0.5
        self.inner = self.idx = self.bias = self.stacks = None  # no buffers: they are the pool's and the batch's

    def bind(self, B, scale):
        """The pool's stacks of this Linear, B (e, o, r), scale (e,); called again where they have changed."""
        self.stacks = (B, scale)
        inner = None if self.training else self._inner().detach()
        if self.inner is None or inner is None or self.inner.shape != inner.shape:
            self.inner = inner
        else:  # in place: a compiled or captured step holds it
            self.inner.copy_(inner)

    def _inner(self):
        """(e, r_q, r) float32."""
        B, scale = self.stacks
        inner = torch.einsum("oq,eor->eqr", self.B.to(sum_dtype(B)), B.to(sum_dtype(B)))
        return inner * scale[:, None, None].to(inner.dtype) if self.scaled else inner

    def forward(self, x, sample, ax):
        inner = self._inner() if self.inner is None else self.inner
        idx, bias = self.idx[sample], self.bias[sample]  # (n, k)
        q = F.linear(x.to(inner.dtype), self.A.to(inner.dtype))  # (n, r_q)
        a = ax(idx)[..., : inner.shape[-1]]  # (n, k, r); ranks that came after bind() are another adapter's
        if self.inner is None:  # training
            picks = F.one_hot(idx, len(inner)).to(inner.dtype)  # a gather whose gradient has a fixed order of additions
            inner = (picks @ inner.flatten(1)).unflatten(-1, inner.shape[1:])
        else:
            inner = inner[idx]
        key = (inner * a.to(inner.dtype)[:, :, None]).sum(-1)  # (n, k, r_q)
        score = (key * q[:, None]).sum(-1) / self.divisor + bias
        weight = torch.exp(score - score.amax(-1, keepdim=True).clamp(min=-3e38))  # no row is NaN
        return Mixture(idx, weight / weight.sum(-1, keepdim=True).clamp(min=1e-30))


def router_loras(pool, r=8, seed=0, divisor=None, scaled=True, prior=0.0):
    """{module path: RouterLoRA} untrained: A_r uniform within 1/sqrt(i), B_r zero, and so weights even at the start;
    were both zero, neither would get a gradient."""
    generator, routers = torch.Generator().manual_seed(seed), {}
    for path, A in pool.A.items():
        i, o = A.shape[2], pool.B[path].shape[1]
        A_r = (torch.rand(r, i, generator=generator) * 2 - 1) * i**-0.5
        routers[path] = RouterLoRA(A_r.to(A.device), torch.zeros(o, r, device=A.device), divisor, scaled, prior)
        routers[path].bind(pool.B[path], pool.scale[path])
    return routers


def set_candidates(routers, idx, bias):
    """Gives RouterLoRAs the candidates of a batch: idx (b, k) int64, bias (b, k) float32."""
    for router in routers:
        router.idx = idx
        router.bias = bias


def candidate_rows(pool, retrieved, k, prior=0.0, device=None):
    """[[(adapter name, score), ...]] one for each sample, k at most -> idx (b, k), bias (b, k) for RouterLoRA."""
    idx, bias = torch.zeros(len(retrieved), k, dtype=torch.int64), torch.full((len(retrieved), k), float("-inf"))
    for row, pairs in enumerate(retrieved):
        for column, (name, score) in enumerate(pairs):
            idx[row, column], bias[row, column] = pool.slot(name), score / prior if prior else 0.0
    return idx.to(device), bias.to(device)


# Files ---------------------------------------------------------------------------------------------------------------


def save_routers(file, routers, model, about):
    """{module path: RouterLoRA} -> POOL/router.safetensors, bound to the base alone. `about` {key: text}: how it was
    trained."""
    tensors = {f"{path}.router_{n}.weight": getattr(r, n).detach() for path, r in routers.items() for n in "AB"}
    first = next(iter(routers.values()))
    how = {"divisor": repr(float(first.divisor)), "scaled": str(int(first.scaled)), "prior": repr(float(first.prior))}
    write_safetensors(file, tensors, {"base": model.fingerprint, **how, **about})


def load_routers(file, pool, model, dtype=torch.float32):
    """File -> {module path: RouterLoRA} for the pool's Linears. Raises InputError where it was made for another base or
    lacks one of them."""
    tensors, metadata = read_safetensors(file)
    if lacks := {"base", "divisor", "scaled", "prior"} - metadata.keys():
        raise InputError(f"{file}: metadata lacks {', '.join(sorted(lacks))}: not a router of this project")
    if metadata["base"] != model.fingerprint:
        raise InputError(f"{file}: made for base {metadata['base'][:12]}, this one is {model.fingerprint[:12]}: "
                         "python train.py router makes one for it")  # fmt: skip
    routers = {}
    for path, A in pool.A.items():
        parts = [tensors.get(f"{path}.router_{n}.weight") for n in "AB"]
        i, o = A.shape[2], pool.B[path].shape[1]
        found = [None if part is None else tuple(part.shape) for part in parts]
        if None in found or found != [(found[0][0], i), (o, found[0][0])]:
            raise InputError(f"{file}: {path}: expected router_A (r, {i}) and router_B ({o}, r), found {found}")
        A_r, B_r = (part.to(A.device, dtype) for part in parts)
        how = float(metadata["divisor"]), metadata["scaled"] == "1", float(metadata["prior"])
        routers[path] = RouterLoRA(A_r, B_r, *how)
        routers[path].requires_grad_(False).eval().bind(pool.B[path], pool.scale[path])
    return routers
