"""LoRA-Flow (arXiv 2402.11455): one trained mixture of all adapters for each token and layer.

    weight = softmax(G h / T) + bias

h is the input of the layer's first adapted Linear or, as in the released code, the residual stream
before the layer's first norm. A weight may be negative.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.fields import parse_number
from common.files import InputError
from common.options import ABOVE_0, Signed
from common.printable import shown
from methods.protocol import TrainedGates, member_mask
from methods.shared_mixture import SharedMixture, running_order
from moe_lora import AX, Mixture
from pool.gate_files import GateFile
from pool.slots import Pool
from training.gates import GatesRun

Reads = Literal["input", "residual"]


@dataclass
class LoRAFlowRun(GatesRun):
    """Options of `train.py gates --kind loraflow`."""

    reads: Reads = "input"  # what a gate reads: its Linear's input, or the residual before the norm
    bias_start: Signed = 0.0  # bias of every adapter at the start


class LoRAFlowGate(nn.Module):
    """LoRA-Flow: softmax(G h / T) + bias over all e slots. The weights needn't sum to 1.

    `known` (e,) bool: the slots that G and bias were trained with; the others weigh 0. h is x or, with
    `reads_residual`, the residual stream that keep() got last. `mixture` is kept for the layer's other
    Linears, which run after this one.
    """

    sequential = True

    def __init__(
        self, G: Tensor, bias: Tensor, known: Tensor | None = None, temperature=1.0, reads_residual=False
    ):
        super().__init__()
        self.weight = nn.Parameter(G)  # G (e, i), or (e, width of the residual stream)
        self.bias = nn.Parameter(bias)  # (e,)
        known = torch.ones(len(G), dtype=torch.bool, device=G.device) if known is None else known
        self.register_buffer("known", known, persistent=False)
        self.temperature = temperature
        self.reads_residual = reads_residual
        self.residual = None
        self.mixture = None

    def keep(self, norm: nn.Module, inputs: tuple[Tensor]) -> None:
        """A pre-hook of the layer's input_layernorm: keeps its input, the residual stream."""
        self.residual = inputs[0]

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of all e adapters."""
        h = self.residual if self.reads_residual else x
        logits = F.linear(h.float(), self.weight.float()) / self.temperature  # (n, e)
        logits = logits.masked_fill(~self.known, float("-inf"))
        weight = F.softmax(logits, dim=-1) + self.bias.float() * self.known
        idx = torch.arange(logits.shape[1], device=x.device).expand_as(logits)
        self.mixture = Mixture(idx, weight)
        return self.mixture


def layer_of(path: str) -> str:
    """The layer of a Linear's module path: model.layers.N."""
    return re.match(r".*?layers\.\d+", path)[0]


def loraflow_gates(
    pool: Pool, known: Tensor | None = None, reads: Reads = "input", temperature=1.0, bias_start=0.0
) -> dict[str, nn.Module]:
    """{module path: gate}: a LoRAFlowGate on each layer's first Linear, SharedMixtures on the others. As
    G is zero, the softmax is uniform at the start. `known` (capacity,) bool: by default the slots in
    use."""
    gates = {}
    leaders = {}
    for path in sorted(pool.A, key=running_order):
        layer = layer_of(path)
        if layer in leaders:
            gates[path] = SharedMixture(leaders[layer])
            continue
        A = pool.A[path]
        o, i = pool.shapes[path]
        writes_residual = path.endswith(("o_proj", "down_proj"))  # the other Linears read it
        width = o if reads == "residual" and writes_residual else i
        mask = member_mask(pool, A.device) if known is None else known
        G = torch.zeros(pool.capacity, width, device=A.device)
        bias = torch.full((pool.capacity,), float(bias_start), device=A.device)
        gates[path] = leaders[layer] = LoRAFlowGate(G, bias, mask, temperature, reads == "residual")
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
    Run = LoRAFlowRun
    has_temperature = False  # it is in the file

    @classmethod
    def kept(cls, args: LoRAFlowRun) -> dict[str, str]:
        """What the gates read, and their temperature."""
        return {"reads": args.reads, "temperature": repr(args.gate_temperature)}

    @classmethod
    def gates_of(cls, rows: GateFile, pool: Pool, temperature: float) -> dict[str, nn.Module]:
        """loraflow_gates() as the file's metadata say; without these, by the defaults. Raises InputError
        for values that aren't valid."""
        reads = rows.metadata.get("reads", LoRAFlowRun.reads)
        if reads not in get_args(Reads):
            raise InputError(f"{rows.file}: reads is {shown(reads)}, expected {' or '.join(get_args(Reads))}")
        T = rows.metadata.get("temperature", str(LoRAFlowRun.gate_temperature))
        T = parse_number(f"{rows.file}: temperature", T, ABOVE_0)
        return loraflow_gates(pool, rows.known, reads, T)

    @classmethod
    def start_gates(cls, pool: Pool, args) -> dict[str, nn.Module]:
        """Gates as the options say."""
        return loraflow_gates(pool, None, args.reads, args.gate_temperature, args.bias_start)

    @staticmethod
    def hooks(model, gates: dict[str, nn.Module]) -> list:
        """Adds the hooks that pass the residual stream to the gates that read it -> their handles."""
        handles = []
        for path, gate in gates.items():
            if getattr(gate, "reads_residual", False):
                norm = model.get_submodule(f"{layer_of(path)}.input_layernorm")
                handles.append(norm.register_forward_pre_hook(gate.keep))
        return handles
