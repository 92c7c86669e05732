"""MeteoRA's gate, once: the gate of one Linear chooses a token's adapters for all Linears after it.

    weight = softmax over the k largest of  G x / T,   x the input of the Linear --decide_at
    loss   = MeteoRA's, with a gate term for this one gate

AdaFuse (arXiv 2603.11873) also decides once a token. Linears that run before the gate use no
adapter. GateTermTraining (training/gates.py) computes the loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.files import InputError
from common.options import nearest
from methods.protocol import TopKGates
from methods.shared_mixture import SharedMixture, running_order
from moe_lora import AX, MeteoraGate, Mixture
from pool.gate_files import GateFile
from pool.slots import Pool
from training.gates import GateTermRun, GateTermTraining

FIRST = "model.layers.0.self_attn.o_proj"  # the first that sees more than the token's embedding


@dataclass
class OnceRun(GateTermRun):
    """Options of `train.py gates --kind meteora_once`."""

    decide_at: str = FIRST  # the Linear whose gate chooses for all Linears after it


class DecidingGate(MeteoraGate):
    """A MeteoraGate that keeps its mixture for the Linears after it."""

    sequential = True
    mixture = None

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of k adapters per token, kept as `mixture`."""
        self.mixture = super().forward(x, sample, ax)
        return self.mixture


class NoAdapter(nn.Module):
    """The gate of a Linear that runs before the deciding one: it uses no adapter."""

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of one adapter, of weight 0."""
        idx = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        return Mixture(idx, idx.float())


def once_gates(
    pool: Pool,
    k: int,
    temperature=1.0,
    known: Tensor | None = None,
    decide_at: str = FIRST,
    source: str = "--decide_at",
) -> dict[str, nn.Module]:
    """{module path: gate}: at `decide_at` a DecidingGate with G zero, before it NoAdapters, after it
    SharedMixtures. `known` (capacity,) bool marks the slots that may be chosen. Raises InputError,
    which begins with `source`, where no adapter of the pool adapts that Linear."""
    if decide_at not in pool.A:
        hint = nearest(decide_at, pool.A) or f", as {next(iter(pool.A))}"
        raise InputError(f"{source} is {decide_at!r}, expected a Linear that an adapter adapts{hint}")
    k = min(k, int(known.sum())) if known is not None else k
    G = pool.A[decide_at].new_zeros(pool.capacity, pool.A[decide_at].shape[2]).float()
    leader = DecidingGate(G, k, temperature, known)
    gates = {}
    for path in pool.A:
        before = running_order(path) < running_order(decide_at)
        gates[path] = NoAdapter() if before else SharedMixture(leader)
    return gates | {decide_at: leader}


class MeteoraOnce(TopKGates):
    """One gate, whose mixture all Linears after it use."""

    pattern = r"meteora_once(?:_top([1-9][0-9]{0,5}))?"
    names = ("meteora_once", "meteora_once_top1", "meteora_once_top2")
    about = "MeteoRA's gate of one Linear, whose choice all Linears after it use"
    paper = "2405.13053, 2603.11873"
    decides = "per token"
    kind = "meteora_once"
    Run = OnceRun
    Training = GateTermTraining
    gates_know_tasks = True

    @property
    def has_temperature(self) -> bool:
        """With k = 1 the weight is 1 at any temperature."""
        return self.top_k > 1

    @classmethod
    def kept(cls, args) -> dict[str, str]:
        """The deciding Linear."""
        return {"decide_at": args.decide_at}

    @classmethod
    def gates_of(cls, rows: GateFile, pool: Pool, temperature: float) -> dict[str, nn.Module]:
        """once_gates() that decide at the file's Linear."""
        decide_at = rows.metadata.get("decide_at", "")
        return once_gates(pool, rows.k, temperature, rows.known, decide_at, f"{rows.file}: decide_at")

    @classmethod
    def start_gates(cls, pool: Pool, args) -> dict[str, nn.Module]:
        """Gates as the options say."""
        return once_gates(pool, args.top_k, args.gate_temperature, decide_at=args.decide_at)
