"""moe_lora.py's gated Linear at speed: shared matmuls for Linears of one input, grouped tokens,
cheap dropout."""

import torch

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
    """MultiLoRALinear, with what fast/ knows of its gate."""

    def __init__(self, base, A, B, scale, gate, *others, **options):
        super().__init__(base, A, B, scale, gate, *others, **options)
        for part in gate.modules():
            if hasattr(part, "linear_in"):
                part.linear_in = linear_in

    def forward(self, x):
        """x (n, i) or (b, t, i) -> (n, o) or (b, t, o)."""
        y = self.base(x)
        sample = self.rows_of(x)
        x = x.reshape(-1, x.shape[-1])
        ax = FastAX(x, self.A, lambda: compute_ax(x, self.A)[0])
        return self.add(y, x, ax, mixture_of(self.gate, x, sample, ax))

    def add(self, y, x, ax, mixture):
        """y + what the chosen adapters make of x."""
        self.record(mixture)
        if self.dropout and self.training:
            x = dropout(x, self.dropout)
            ax = None
        if type(self.gate) is KnownAdapterGate and self.backend == "auto":
            return y + mix_grouped(x, self.A, self.B, self.scale, grouped_tokens(self.gate)).view(y.shape)
        return y + lora_mix(x, self.A, self.B, self.scale, *mixture, self.backend, ax).view(y.shape)


def linear_in(x, weight, dtype):
    """kernels.linear_in."""
    return linear(x, weight, dtype=dtype)


def forward_together(linears, x):
    """[linear(x), ...]. In a compiled block gated Linears of one input x (n, i) share one matmul
    for A x, and one for their gates' logits where these are MeteoRA's."""
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


def once(function):
    """`function`, computed at its first call."""
    kept = []

    def call():
        if not kept:
            kept.append(function())
        return kept[0]

    return call


class FastAX:
    """moe_lora.AX; of the adapters idx it reads these alone where that is less."""

    def __init__(self, x, A, compute):
        self.x = x
        self.A = A
        self.every = once(compute)

    def __call__(self, idx=None):
        if idx is None:
            return self.every()
        if pick_backend(self.x, self.A, idx.shape[1]) == "bmm":
            return gathered_ax(self.x, self.A, idx)
        return self.every().gather(1, idx[..., None].expand(-1, -1, self.A.shape[1]))


def mixture_of(gate, x, sample, ax, chosen=None):
    """gate(x, sample, ax); `chosen` is the inner gate's Mixture of a SampleGate where that is known
    already."""
    if type(gate) is MeteoraGate:
        return meteora_mixtures([gate], x)[0]
    if type(gate) is not SampleGate:
        return gate(x, sample, ax)
    if gate.inner is None or not (
        torch.compiler.is_compiling() or gate.some_routed
    ):  # compiled: no guard on routed rows
        return gate.fixed(sample)
    chosen = chosen or mixture_of(gate.inner, x, sample, ax)
    if gate.all_routed:
        return chosen
    return gate.select(chosen, sample)  # compiled also where no row is routed: one graph for both


def meteora_mixtures(gates, x):
    """[Mixture] of MeteoraGates of one input x (n, i): one matmul, one choice."""
    first = gates[0]
    if statically_at_most(x.shape[0], MAX_DECODE_ROWS):  # fused, without a copy of the weights
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


def grouped_tokens(gate):
    """The GroupedTokens of what a KnownAdapterGate was set to, computed once for all its Linears."""
    if not torch.compiler.is_compiling() and getattr(gate, "grouped_from", None) is not gate.idx:
        gate.grouped = GroupedTokens.of(gate.idx[:, 0], gate.weight[:, 0])
        gate.grouped_from = gate.idx
    return gate.grouped


def dropout(x, p):
    """F.dropout with p rounded to 1/256: a mask from random bytes costs a quarter of torch's on a
    CPU, where drawing it takes as long as the adapters' matmuls."""
    cut = round(256 * p)
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,), device=x.device)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= cut
    return x * keep * (256 / (256 - cut))


def ready_to_compile(layers):
    """Prepares what gated Linears read anew in each batch, so that compiled blocks have one graph
    for all batches: tensors of rows and tokens are marked as of any length, those of a single row,
    on which torch.compile would specialise, get a second one. False where a Linear or a gate has to
    run as plain Python."""
    linears = [module for module in layers.modules() if isinstance(module, MultiLoRALinear)]
    gates = {part for linear in linears for part in linear.gate.modules()}
    if any(type(linear) is not FastMultiLoRALinear for linear in linears):
        return False
    if any(getattr(gate, "sequential", False) for gate in gates):
        return False
    doubled = {}  # one tensor, shared by the gates of all Linears, stays one
    for gate in gates:
        for name in getattr(gate, "per_row", ()):
            y = getattr(gate, name)
            if y is not None and len(y) == 1:
                if id(y) not in doubled:
                    with torch.inference_mode(
                        False
                    ):  # of the sort of a tensor with more rows, or it is a graph of its own
                        doubled[id(y)] = (y, y.repeat(2, *[1] * (y.dim() - 1)))
                y = doubled[id(y)][1]
                setattr(gate, name, y)
            if y is not None:
                mark_dynamic_tokens(y)
        mark_dynamic_tokens(*(getattr(gate, name) for name in getattr(gate, "per_token", ())))
        if type(gate) is KnownAdapterGate:
            mark_dynamic_tokens(*grouped_tokens(gate))
    mark_dynamic_tokens(*(linear.trace for linear in linears if linear.trace is not None))
    return True
