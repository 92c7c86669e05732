"""Arrow (arXiv 2405.11157): tokens go by the adapters' strongest input directions; no training.

prototype v_j = the top right singular vector of B_j A_j
logit_j = |v_j . x|,   weight = softmax over the k largest
"""

import torch.nn.functional as F
from torch import Tensor, nn

from methods.protocol import Gated, member_mask
from methods.session import Mole
from moe_lora import AX, Mixture
from pool.slots import Pool
from pool.stacks import factored_svd, warn_if_uneven


def arrow_prototypes(A: Tensor, B: Tensor) -> Tensor:
    """Unit top right singular vectors (e, i) of B_j A_j, A (e, r, i), B (e, o, r), zero where B A
    is zero. Their sign is arbitrary; `scale` can't change them."""
    _, S, Vh = factored_svd(A.float(), B.float())
    return Vh[:, 0] * (S[:, :1] > 0)


class ArrowGate(nn.Module):
    """Arrow: logits |v_j . x|, the k largest, softmax over those at a temperature; no training.

    `known` (e,) bool: the slots that may be chosen, by default those with a prototype. Where fewer
    than k are, k is their number. As in PEFT's Arrow x is the Linear's own input, not normalised
    (no cosine, whatever its docstring says), scale multiplies each adapter's output and isn't in
    the logits, and outputs are mixed, not parameters. PEFT's differs in prototypes by 15 power
    iterations from a random start, wrong where two singular values are close; prototypes and logits
    in the adapters' dtype, here float32; dropout on the output, not the input; one rank for all.
    """

    def __init__(self, prototypes: Tensor, k: int, temperature=1.0, known: Tensor | None = None):
        super().__init__()
        self.register_buffer("prototypes", prototypes, persistent=False)
        if known is None:
            known = prototypes.any(-1)
            if not known.any():  # every B A is zero: any choice is right, none would give NaN
                known = ~known
        self.register_buffer("known", known, persistent=False)
        self.k = min(k, int(known.sum()))
        self.temperature = temperature

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of k adapters a token."""
        logits = F.linear(x.float(), self.prototypes.float()).abs()  # (n, e)
        logits = logits.masked_fill(~self.known, float("-inf"))
        top, idx = logits.topk(self.k, dim=-1)  # (n, k)
        return Mixture(idx, F.softmax((top - top[:, :1]) / self.temperature, dim=-1))


class Arrow(Gated):
    """Prototypes from the adapters as they are."""

    pattern = "arrow"
    names = ("arrow",)
    about = "Arrow: tokens go by the adapters' strongest input directions; no training"
    paper = "2405.11157"

    def gates(self, mole: Mole, pool: Pool, temperature: float, exclude: tuple) -> dict[str, nn.Module]:
        """ArrowGates over the pool's adapters but those of `exclude`."""
        warn_if_uneven(pool, self.name)
        known = member_mask(pool, mole.device, exclude)
        gates = {}
        for path in pool.A:
            prototypes = arrow_prototypes(pool.A[path], pool.B[path]).to(mole.dtype)
            gates[path] = ArrowGate(prototypes, self.top_k, temperature, known)
        return gates
