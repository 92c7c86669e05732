"""Gates that learn from the LM loss alone (RAMoLE's comparisons, arXiv 2406.16989).

soft        weight = softmax over all e of G x / T
moe_topK    the K largest of that softmax as they are: renormalised, a single one would always
            be 1, and the LM loss would have no gradient
"""

import torch
from torch import Tensor, nn

from common.files import InputError
from kernels import linear_in
from methods.protocol import TopKGates, TrainedGates
from moe_lora import AX, Mixture, meteora_gates
from pool.slots import Pool


class Soft(TrainedGates):
    """All adapters, by a softmax."""

    pattern = "soft"
    names = ("soft",)
    about = "MeteoRA's gate without the top-k: all adapters"
    paper = "2406.16989"
    made_by = "train.py gates --kind soft"
    kind = "soft"

    @staticmethod
    def new_gates(pool: Pool, k: int, temperature=1.0, known=None) -> dict[str, nn.Module]:
        """MeteoraGates with k = e."""
        return meteora_gates(pool, pool.capacity, temperature, known)

    @classmethod
    def check_run(cls, args, names: list[str]) -> None:
        """Raises InputError where there is one adapter, of which no softmax learns."""
        super().check_run(args, names)
        if len(names) < 2:
            raise InputError(f"--kind soft needs two adapters or more, {args.pool} has {len(names)}")


class MoEGate(nn.Module):
    """A mixture of experts' gate: softmax(G x / T) over all known slots, k of its weights kept."""

    linear_in = staticmethod(linear_in)

    def __init__(self, G: Tensor, k: int, temperature=1.0, known: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(G)  # G (e, i)
        self.k = k
        self.temperature = temperature
        known = torch.ones(len(G), dtype=torch.bool, device=G.device) if known is None else known
        self.register_buffer("known", known, persistent=False)

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of k adapters a token."""
        logits = self.linear_in(x, self.weight, torch.float32)  # (n, e)
        logits = logits.masked_fill(~self.known, float("-inf"))
        weight, idx = (logits / self.temperature).softmax(-1).topk(self.k, dim=-1)  # (n, k)
        return Mixture(idx, weight)


class MoE(TopKGates):
    """A mixture of experts: the k largest of a softmax over all."""

    pattern = r"moe_top([1-9][0-9]{0,5})"
    names = ("moe_top1", "moe_top3")
    about = "a mixture of experts: the k largest of a softmax over all, from the LM loss alone"
    paper = "2406.16989"
    kind = "moe"

    @staticmethod
    def new_gates(pool: Pool, k: int, temperature=1.0, known=None) -> dict[str, nn.Module]:
        """MoEGates of zero."""
        return meteora_gates(pool, k, temperature, known, make=MoEGate)
