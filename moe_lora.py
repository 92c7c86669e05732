"""The gated multi-LoRA Linear, the protocol of gates, and MeteoRA's gate.

    y = W x + sum over the k chosen adapters of  weight_j * scale_j * B_j A_j x   (MeteoRA, sec. 3)

Most methods only choose the k adapters and their weights, so they share one Linear, one operation
(kernels.py), and one small protocol for whatever chooses:

    gate(x (n, i), sample (n,) int64, ax) -> Mixture(idx (n, k) int64, weight (n, k) float32)

`sample` is each token's row of the batch (in training, the index of its example). `ax()` returns
A x of all adapters (n, e, r), computed at the first call; `ax(idx)` returns it for k adapters per
token, (n, k, r). If a token needs fewer than k adapters, its spare entries have weight 0 and any
valid idx. To try a gate of your own, write an nn.Module with that forward and attach it. fast/
reads three optional attributes and sets the fourth:

    per_row      names of the gate's tensors with an entry for each row of the batch
    per_token    names of the gate's tensors with an entry for each token of the next forward
    sequential   True for a gate that keeps state from one Linear to another, or between steps
    linear_in    a function (x, M, dtype) -> x M^T in that dtype; fast/ sets a faster one

The pool (pool/slots.py) has e = pool.capacity slots for adapters. pool.A, pool.B and pool.scale
are {module path: tensor}; pool.slot(name) is an adapter's index in these tensors.

Letters, here and everywhere (shapes as in PyTorch's Linear, out features first):

    letter     papers' symbol      what it is                                     shape
    b, t, n                        batch, positions, tokens (b*t, flattened)
    e          N                   adapter slots in the pool
    k          k                   adapters that a token uses
    r          r                   rank
    i, o       h_in, h_out         in and out features of a Linear
    v, m                           vocabulary; gated Linears of the model
    W          W_0                 the base's weight                              (o, i)
    A          A_j                 the adapters' first factors                    (e, r, i)
    B          B_j                 the adapters' second factors                   (e, o, r)
    scale      alpha / r           the factor of each adapter's B A               (e,)
    G          W_gate              MeteoRA's gate                                 (e, i)
    weight     w_j                 the weights of each token's k adapters         (n, k)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import compute_ax, lora_mix


class Mixture(NamedTuple):
    """What a gate returns: for each token the k adapters that it uses, and their weights."""

    idx: Tensor  # (n, k) int64, slots of the pool
    weight: Tensor  # (n, k) float32


class MultiLoRALinear(nn.Module):
    """A Linear plus the pool's adapters for it, weighted by `gate`: Tensor -> Tensor. A, B, scale
    are the pool's tensors. The model sets token_rows.sample, each token's row of the batch."""

    def __init__(self, base, A, B, scale, gate, token_rows=None, backend="auto", dropout=None):
        super().__init__()
        self.base = base
        self.A, self.B, self.scale = A, B, scale
        self.gate = gate
        self.token_rows = token_rows
        self.backend = backend
        self.dropout = dropout
        self.trace = None  # (max_n, e), set by a Recorder

    def forward(self, x: Tensor) -> Tensor:
        """x (n, i) from the model, or (b, t, i) if called directly -> (n, o) or (b, t, o)."""
        y = self.base(x)
        sample = self.batch_row_of_token(x)  # (n,)
        x = x.reshape(-1, x.shape[-1])  # (n, i)
        ax = AX(x, self.A)
        mixture = self.gate(x, sample, ax)
        self.record(mixture)
        if self.dropout and self.training:  # LoRA dropout: base and gate use x without it
            x = self.dropout(x)
            ax = None  # it was computed from x without dropout
        return y + lora_mix(x, self.A, self.B, self.scale, *mixture, self.backend, ax).view(y.shape)

    def batch_row_of_token(self, x: Tensor) -> Tensor:
        """Each token's row of the batch: (n,) int64."""
        if self.token_rows is not None and x.dim() == 2:
            return self.token_rows.sample
        return torch.arange(len(x), device=x.device).repeat_interleave(x[0].numel() // x.shape[-1])

    def record(self, mixture: Mixture) -> None:
        """Writes the mixture's weights into the tensor that a Recorder has set, if any."""
        if self.trace is not None:
            trace = self.trace[: len(mixture.idx)].zero_()
            trace.scatter_add_(1, mixture.idx, mixture.weight.detach())


class AX:
    """A x, computed at the first call. ax() -> (n, e, r), of all; ax(idx (n, k)) -> (n, k, r)."""

    def __init__(self, x: Tensor, A: Tensor):
        self.x, self.A = x, A
        self.value = None

    def __call__(self, idx: Tensor | None = None) -> Tensor:
        if self.value is None:
            self.value = compute_ax(self.x, self.A)
        if idx is None:
            return self.value
        return self.value.gather(1, idx[..., None].expand(-1, -1, self.value.shape[-1]))


# Gates --------------------------------------------------------------------------------------------


class MeteoraGate(nn.Module):
    """MeteoRA's gate: the k largest of the logits G x, then a softmax over these k.

    `known` (e,) bool is True for the slots that G was trained for; None means all. No other slot is
    chosen: with fewer than k known slots the remaining choices get weight 0. With `keep_logits`,
    `logits` keeps the last forward's logits (n, e), for a loss on them.
    """

    def __init__(self, G: Tensor, k: int, temperature=1.0, known: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(G)  # G (e, i); gate files say weight
        self.k = k
        self.temperature = temperature
        known = None if known is None or known.all() else known
        self.register_buffer("known", known, persistent=False)
        self.keep_logits = False
        self.logits = None

    def forward(self, x: Tensor, sample: Tensor, ax: "AX") -> Mixture:
        """x (n, i) -> Mixture of k adapters per token."""
        logits = F.linear(x.float(), self.weight.float())  # (n, e)
        if self.known is not None:
            logits = logits.masked_fill(~self.known, float("-inf"))
        if self.keep_logits:
            self.logits = logits
        top, idx = logits.topk(min(self.k, logits.shape[-1]), dim=-1)  # (n, k), the largest first
        if self.k == 1:  # the softmax of one logit is always 1: only a loss on logits trains G
            return Mixture(idx, torch.ones_like(top))
        relative = top - top[:, :1]  # the largest is 0: no overflow at a low temperature
        return Mixture(idx, (relative / self.temperature).softmax(-1))


class SampleGate(nn.Module):
    """Gives all tokens of a batch row the same mixture: one adapter, several with any weights, or
    none (weight 0). set() sets the mixtures of the current batch.

    For rows where `routed` is True the gate `inner` chooses instead, token by token. So one batch
    can have both kinds of rows. Without `inner`, one SampleGate can serve all Linears.
    """

    def __init__(self, inner: nn.Module | None = None):
        super().__init__()
        self.inner = inner
        self.set(None, None)

    def set(self, idx, weight, routed: Tensor | None = None, each_token=False) -> None:
        """idx (b, k) int64, weight (b, k) float32, routed (b,) bool or None. With `each_token` idx
        and weight are (n, k), a mixture for each token of the next forward."""
        self.idx, self.weight = idx, weight
        self.routed = routed
        self.each_token = each_token
        self.per_row = () if each_token else ("idx", "weight", "routed")
        self.per_token = ("idx", "weight") if each_token else ()
        self.some_routed = routed is not None and bool(routed.any())  # read once per batch
        self.all_routed = routed is not None and bool(routed.all())

    def forward(self, x: Tensor, sample: Tensor, ax: "AX") -> Mixture:
        """x (n, i), sample (n,) -> Mixture, fixed or the inner gate's."""
        if self.all_routed:
            return self.inner(x, sample, ax)
        if self.some_routed:
            return self.select(self.inner(x, sample, ax), sample)
        return self.fixed(sample)

    def fixed(self, sample: Tensor) -> Mixture:
        """The Mixture that set() gave, for each token."""
        if self.each_token:
            return Mixture(self.idx, self.weight)
        return Mixture(self.idx[sample], self.weight[sample])

    def select(self, chosen: Mixture, sample: Tensor) -> Mixture:
        """The inner gate's Mixture `chosen` for routed rows, the fixed Mixture for the others."""
        fixed = self.fixed(sample)
        k = max(fixed.idx.shape[1], chosen.idx.shape[1])
        routed = self.routed[sample, None]  # (n, 1)
        pairs = zip(chosen, fixed, strict=True)
        return Mixture(*(torch.where(routed, pad_to(c, k), pad_to(f, k)) for c, f in pairs))


def pad_to(y: Tensor, k: int) -> Tensor:
    """Pads y (n, up to k) with zeros at the end -> (n, k)."""
    return F.pad(y, (0, k - y.shape[1]))


class KnownAdapterGate(nn.Module):
    """For training: gives each token one adapter known in advance. set() it before each forward."""

    per_token = ("idx", "weight")

    def set(self, slots: Tensor, weight: Tensor) -> None:
        """slots (n,) int64, weight (n,) float32."""
        self.idx, self.weight = slots[:, None], weight[:, None]

    def forward(self, x: Tensor, sample: Tensor, ax: "AX") -> Mixture:
        """The Mixture it was set to, k = 1."""
        return Mixture(self.idx, self.weight)


def fixed_rows(pool, choices: list[dict[str, float]], device=None) -> tuple[Tensor, Tensor]:
    """[{adapter name: weight}], one dict per row ({}: no adapter) -> idx (b, k), weight (b, k) for
    SampleGate. Shorter rows are padded with slot 0 at weight 0."""
    k = max([1, *map(len, choices)])
    idx = torch.zeros(len(choices), k, dtype=torch.int64)
    weight = torch.zeros(len(choices), k)
    for row, choice in enumerate(choices):
        for column, (name, value) in enumerate(choice.items()):
            idx[row, column] = pool.slot(name)
            weight[row, column] = value
    return idx.to(device), weight.to(device)


def set_gates(gates, idx, weight, routed: Tensor | None = None, each_token=False) -> None:
    """Calls SampleGate.set for each of the gates."""
    for gate in gates:
        gate.set(idx, weight, routed, each_token)


def meteora_gates(pool, k: int, temperature=1.0, known=None, make=MeteoraGate) -> dict[str, nn.Module]:
    """{module path: gate} with G zero. k is capped at the number of known slots."""
    k = min(k, int(known.sum())) if known is not None else k
    gates = {}
    for path, A in pool.A.items():
        gates[path] = make(A.new_zeros(pool.capacity, A.shape[2]).float(), k, temperature, known)
    return gates


# Attach and detach --------------------------------------------------------------------------------


def attach(model, pool, gates, backend="auto", dropout=None, make=None) -> dict[str, nn.Module]:
    """Wraps, in place, each Linear of a Llama that the pool has adapters for in a MultiLoRALinear.

    gates: {module path: gate}, or one for all. dropout: {module path: x (n, i) -> x}. make: the class,
    by default model.gated_linear, which fast/ sets. Raises ValueError if there are wrapped Linears.
    """
    if attached(model):
        raise ValueError("adapters are attached already: detach(model) first")
    make = make or getattr(model, "gated_linear", MultiLoRALinear)
    linears = {}
    for path in pool.A:
        gate = gates[path] if isinstance(gates, dict) else gates
        base = model.get_submodule(path)
        stacks = pool.A[path], pool.B[path], pool.scale[path]
        linears[path] = make(base, *stacks, gate, model.model.token_rows, backend, (dropout or {}).get(path))
        swap(model, path, linears[path])
    return linears


def swap(model, path: str, module: nn.Module) -> None:
    """Sets the model's submodule at `path` to `module`, in the model's train or eval mode."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))


def attached(model) -> dict[str, MultiLoRALinear]:
    """{module path: MultiLoRALinear}, in module order."""
    modules = model.named_modules()
    return {path: module for path, module in modules if isinstance(module, MultiLoRALinear)}


def detach(model) -> None:
    """Puts the original Linears back, unchanged: each wrapped Linear has kept its own as `base`."""
    for path, module in list(model.named_modules()):
        if isinstance(getattr(module, "base", None), nn.Linear):
            swap(model, path, module.base)


class Recorder:
    """Records weights: `with Recorder(model, max_n) as r:` run n <= max_n tokens, then r.read(n)."""

    def __init__(self, model, max_n: int):
        self.linears = list(attached(model).values())
        self.traces = [linear.scale.new_zeros(max_n, len(linear.A)) for linear in self.linears]

    def __enter__(self):
        for linear, trace in zip(self.linears, self.traces, strict=True):
            linear.trace = trace
        return self

    def __exit__(self, *_):
        for linear in self.linears:
            linear.trace = None

    def read(self, n: int) -> Tensor:
        """Weights (without scale) of the last forward's n tokens in m gated Linears: (m, n, e)."""
        return torch.stack(self.traces)[:, :n] if self.traces else torch.zeros(0, n, 0)
