"""LoRA-Flow (arXiv 2402.11455): one trained mixture of all adapters for each token and layer.

weight = softmax(G x) + bias,   x the input of the layer's first Linear; it may be negative
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.protocol import TrainedGates, member_mask
from methods.shared_mixture import SharedMixture
from moe_lora import AX, Mixture
from pool.slots import Pool


class LoRAFlowGate(nn.Module):
    """LoRA-Flow: softmax(G x) + bias over all e slots, which needn't sum to 1.

    `known` (e,) bool: the slots that G and bias were trained for; the others weigh 0. The mixture
    is kept for the layer's other Linears, which come after this one.
    """

    sequential = True

    def __init__(self, G: Tensor, bias: Tensor, known: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(G)  # G (e, i)
        self.bias = nn.Parameter(bias)  # (e,)
        known = torch.ones(len(G), dtype=torch.bool, device=G.device) if known is None else known
        self.register_buffer("known", known, persistent=False)
        self.mixture = None

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of all e adapters."""
        logits = F.linear(x.float(), self.weight.float())  # (n, e)
        logits = logits.masked_fill(~self.known, float("-inf"))
        weight = F.softmax(logits, dim=-1) + self.bias.float() * self.known
        idx = torch.arange(logits.shape[1], device=x.device).expand_as(logits)
        self.mixture = Mixture(idx, weight)
        return self.mixture


def loraflow_gates(pool: Pool, known: Tensor | None = None) -> dict[str, nn.Module]:
    """{module path: gate}: a LoRAFlowGate on each layer's first Linear, zero and so uniform at the
    start, SharedMixtures on the others. `known` (capacity,) bool, by default the slots in use."""
    gates = {}
    leaders = {}
    for path, A in pool.A.items():  # in module order: what comes first also runs first
        layer = re.match(r".*?layers\.\d+", path)[0]
        if layer in leaders:
            gates[path] = SharedMixture(leaders[layer])
            continue
        mask = member_mask(pool, A.device) if known is None else known
        G = torch.zeros(pool.capacity, A.shape[2], device=A.device)
        bias = torch.zeros(pool.capacity, device=A.device)
        gates[path] = leaders[layer] = LoRAFlowGate(G, bias, mask)
    return gates


class LoRAFlow(TrainedGates):
    """One mixture a token and layer."""

    pattern = "loraflow"
    names = ("loraflow",)
    about = "LoRA-Flow: one mixture a token and layer"
    paper = "2402.11455"
    made_by = "train.py gates --kind loraflow"
    decides = "per token and layer"
    kind = "loraflow"
    has_temperature = False

    @staticmethod
    def new_gates(pool: Pool, k: int, temperature=1.0, known=None) -> dict[str, nn.Module]:
        """loraflow_gates()."""
        return loraflow_gates(pool, known)
