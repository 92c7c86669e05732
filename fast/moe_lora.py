"""moe_lora.py's gated Linear at speed: shared matmuls, grouped tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fast.compiled import MAX_DECODE_ROWS, mark_dynamic_tokens, statically_at_most
from fast.kernels import (
    GroupedTokens,
    compute_ax,
    gathered_ax,
    lora_mix,
    mix_grouped,
    pick_backend,
    top_k_mixture,
)
from fast.matmul import linear
from moe_lora import KnownAdapterGate, MeteoraGate, Mixture, MultiLoRALinear, SampleGate


class FastMultiLoRALinear(MultiLoRALinear):
    """MultiLoRALinear, same parameters, with faster paths for the gates that fast/ knows."""

    def __init__(self, *inputs, **options):
        super().__init__(*inputs, **options)
        for part in self.gate.modules():
            if hasattr(part, "linear_in"):
                part.linear_in = linear_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, i) or (b, t, i) -> (n, o) or (b, t, o)."""
        y = self.base(x)
        sample = self.batch_row_of_token(x)
        x = x.reshape(-1, x.shape[-1])
        ax = FastAX(x, self.A, lambda: compute_ax(x, self.A)[0])
        return self.add(y, x, ax, mixture_of(self.gate, x, sample, ax))

    def add(self, y: torch.Tensor, x: torch.Tensor, ax: Callable, mixture: Mixture) -> torch.Tensor:
        """Adds the chosen adapters' outputs for x (n, i) to y, the base's."""
        self.record(mixture)
        if self.dropout and self.training:
            x = self.dropout(x)
            ax = None
        if type(self.gate) is KnownAdapterGate and self.backend == "auto":
            grouped = grouped_tokens(self.gate)
            return y + mix_grouped(x, self.A, self.B, self.scale, grouped).view(y.shape)
        return y + lora_mix(x, self.A, self.B, self.scale, *mixture, self.backend, ax).view(y.shape)


def linear_in(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """kernels.linear_in."""
    return linear(x, weight, dtype=dtype)


def forward_together(linears: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """[linear(x), ...]. In a compiled block gated Linears of one input x (n, i) share one matmul
    for A x, and MeteoRA's gates share one for their logits."""
    gated = all(type(module) is FastMultiLoRALinear for module in linears)
    if not (gated and torch.compiler.is_compiling()):
        return [module(x) for module in linears]
    sample = linears[0].token_rows.sample
    inner = [getattr(module.gate, "inner", module.gate) for module in linears]
    shared_ax = once(lambda: compute_ax(x, *(module.A for module in linears)))
    shared = all(type(gate) is MeteoraGate for gate in inner)
    mixtures = meteora_mixtures(inner, x) if shared else [None] * len(linears)
    ys = []
    for j, (module, chosen) in enumerate(zip(linears, mixtures, strict=True)):
        ax = FastAX(x, module.A, lambda j=j: shared_ax()[j])
        if chosen is None or module.gate is not inner[j]:
            chosen = mixture_of(module.gate, x, sample, ax, chosen)
        ys.append(module.add(module.base(x), x, ax, chosen))
    return ys


def once(function: Callable) -> Callable:
    """`function` without arguments, computed at the first call and kept."""
    kept = []

    def call():
        if not kept:
            kept.append(function())
        return kept[0]

    return call


class FastAX:
    """moe_lora.AX; ax(idx) reads the adapters idx alone where that is cheaper."""

    def __init__(self, x: torch.Tensor, A: torch.Tensor, compute: Callable[[], torch.Tensor]):
        self.x = x
        self.A = A
        self.every = once(compute)

    def __call__(self, idx: torch.Tensor | None = None) -> torch.Tensor:
        if idx is None:
            return self.every()
        if pick_backend(self.x, self.A, idx.shape[1]) == "bmm":
            return gathered_ax(self.x, self.A, idx)
        return self.every().gather(1, idx[..., None].expand(-1, -1, self.A.shape[1]))


def mixture_of(
    gate: nn.Module,
    x: torch.Tensor,
    sample: torch.Tensor,
    ax: Callable,
    chosen: Mixture | None = None,
) -> Mixture:
    """gate(x, sample, ax). `chosen`: the Mixture of its inner gate, if computed already."""
    if type(gate) is MeteoraGate:
        return meteora_mixtures([gate], x)[0]
    if type(gate) is not SampleGate:
        return gate(x, sample, ax)
    # A compiled block doesn't read some_routed: a guard on it would make a second graph.
    if gate.inner is None or not (torch.compiler.is_compiling() or gate.some_routed):
        return gate.fixed(sample)
    chosen = chosen or mixture_of(gate.inner, x, sample, ax)
    if gate.all_routed:
        return chosen
    return gate.select(chosen, sample)


def meteora_mixtures(gates: Sequence[MeteoraGate], x: torch.Tensor) -> list[Mixture]:
    """The Mixtures of MeteoraGates of one input x (n, i), by one matmul and one top-k."""
    first = gates[0]
    if statically_at_most(x.shape[0], MAX_DECODE_ROWS):  # fused, and no copy of the weights
        logits = torch.stack([linear(x, gate.weight, dtype=torch.float32) for gate in gates], 1)
    else:
        logits = linear(x, torch.cat([gate.weight for gate in gates]), dtype=torch.float32)
        logits = logits.unflatten(-1, (len(gates), -1))  # (n, gates, e)
    if first.known is not None:
        logits = logits.masked_fill(~first.known, float("-inf"))
    for gate, some in zip(gates, logits.unbind(1), strict=True):
        if gate.keep_logits:
            gate.logits = some
    idx, weight = top_k_mixture(logits, min(first.k, logits.shape[-1]), first.temperature)
    if first.k == 1:
        weight = torch.ones_like(weight)
    return [Mixture(*both) for both in zip(idx.unbind(1), weight.unbind(1), strict=True)]


def grouped_tokens(gate: KnownAdapterGate) -> GroupedTokens:
    """A KnownAdapterGate's tokens, grouped once for all Linears that share the gate."""
    if not torch.compiler.is_compiling() and getattr(gate, "grouped_from", None) is not gate.idx:
        gate.grouped = GroupedTokens.of(gate.idx[:, 0], gate.weight[:, 0])
        gate.grouped_from = gate.idx
    return gate.grouped


def ready_to_compile(layers: nn.Module, decode: bool) -> bool:
    """Prepares the tensors that are new in each batch, so that one graph serves all batches.

    Tensors of rows and of tokens are marked as of any length. torch.compile specialises on size 1,
    so a single row gets a second one. `decode`: of a decode batch, whose recorded tokens have the
    same bounds as its rows. False where a Linear or a gate has to run as plain Python.
    """
    linears = [module for module in layers.modules() if isinstance(module, MultiLoRALinear)]
    gates = set()
    for module in linears:
        if type(module) is not FastMultiLoRALinear:
            return False
        gates.update(module.gate.modules())
        if module.dropout:
            gates.add(module.dropout)
    if any(getattr(gate, "sequential", False) for gate in gates):
        return False
    doubled = {}
    for gate in gates:
        for name in getattr(gate, "per_row", ()):
            y = getattr(gate, name)
            if y is None:
                continue
            if len(y) == 1:
                y = _two_rows(y, doubled)
                setattr(gate, name, y)
            mark_dynamic_tokens(y)
        for name in getattr(gate, "per_token", ()):
            mark_dynamic_tokens(getattr(gate, name))
        if type(gate) is KnownAdapterGate:
            mark_dynamic_tokens(*grouped_tokens(gate))
    for module in linears:
        if module.trace is not None:
            few = decode and len(module.trace) <= MAX_DECODE_ROWS
            mark_dynamic_tokens(module.trace, decode=few)
    return True


def _two_rows(y, doubled):
    """y (1, ...) repeated to (2, ...). The gates of many Linears may share y, then they share the
    repeated one too: `doubled` is {id of y: (y, repeated)}."""
    if id(y) not in doubled:
        with torch.inference_mode(False):  # an inference tensor would be a recompile
            doubled[id(y)] = (y, y.repeat(2, *[1] * (y.dim() - 1)))
    return doubled[id(y)][1]
