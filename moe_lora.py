"""The gated multi-LoRA Linear, the protocol of gates, MeteoRA's gate, fixed mixtures, attach and
detach, the recorder.

    y = W x + sum over the k chosen adapters of  weight_j * scale_j * B_j A_j x                     (MeteoRA, section 3)

Everything in this project is a way to choose the k adapters and their weights, so there is one
Linear, one operation (kernels.py), and one small protocol for whatever chooses:

    gate(x: (n, i), sample: (n,) int64, ax: callable) -> Mixture(idx: (n, k) int64, weight: (n, k) float32)

`sample` is the row of the batch that each token belongs to (in training, which of the packed
sequences). `ax()` is A x of all adapters (n, e, r), computed at its first call; `ax(idx)` is that
of k adapters a token, (n, k, r). A choice that a token doesn't need weighs 0; its idx is any valid
slot. To try a gate of your own, write an nn.Module with that forward and attach it. Four
attributes, where it has them, tell fast/ what it can't see:

    per_row      names of its tensors whose first axis is the batch's rows, set anew for each batch
    per_token    names of those whose first axis is the batch's tokens
    sequential   True where it carries something from one Linear to another, or to a later step: it is run as it stands
    linear_in    a function (x, weight, dtype) -> x W^T in that dtype, replaced by a faster one

The pool (pool/adapters.py) holds the adapters in e = pool.capacity slots: pool.A, pool.B and
pool.scale are {module path: tensor}, pool.slot(name) is an adapter's place in them.

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
    scale      alpha / r           what an adapter's B A is multiplied with       (e,)
    G          W_gate              MeteoRA's gate                                 (e, i)
    weight     w_j                 a token's weights of its k adapters            (n, k)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kernels import compute_ax, lora_mix


class Mixture(NamedTuple):
    """What a gate answers: for each token the k adapters that it uses, and their weights."""

    idx: torch.Tensor  # (n, k) int64, slots of the pool
    weight: torch.Tensor  # (n, k) float32


class MultiLoRALinear(nn.Module):
    """A Linear and the pool's adapters for it: Tensor -> Tensor, mixed as its gate says. A, B and
    scale are the pool's own tensors; token_rows, the model's, knows each token's row."""

    def __init__(self, base, A, B, scale, gate, token_rows=None, backend="auto", dropout=0.0):
        super().__init__()
        self.base = base
        self.A, self.B, self.scale = A, B, scale
        self.gate = gate
        self.token_rows = token_rows
        self.backend = backend
        self.dropout = dropout
        self.trace = None  # (max_n, e), set by a Recorder

    def forward(self, x):
        """x (n, i) when the model calls it, (b, t, i) when it is called alone -> (n, o) or (b, t,
        o)."""
        y = self.base(x)
        sample = self.rows_of(x)  # (n,)
        x = x.reshape(-1, x.shape[-1])  # (n, i)
        ax = AX(x, self.A)
        mixture = self.gate(x, sample, ax)
        self.record(mixture)
        if self.dropout and self.training:  # LoRA dropout: base and gate have seen x without it
            x = F.dropout(x, self.dropout)
            ax = None  # it was computed from x without dropout
        return y + lora_mix(x, self.A, self.B, self.scale, *mixture, self.backend, ax).view(y.shape)

    def rows_of(self, x):
        """The row of the batch that each token belongs to: (n,) int64."""
        if self.token_rows is not None and x.dim() == 2:
            return self.token_rows.sample
        return torch.arange(len(x), device=x.device).repeat_interleave(x[0].numel() // x.shape[-1])

    def record(self, mixture):
        """Writes the mixture's weights down for a Recorder, where there is one."""
        if self.trace is not None:
            self.trace[: len(mixture.idx)].zero_().scatter_add_(1, mixture.idx, mixture.weight.detach())


class AX:
    """A x, computed at the first call: () -> (n, e, r) of all adapters, (idx (n, k)) -> (n, k, r)
    of a token's k."""

    def __init__(self, x, A):
        self.x, self.A = x, A
        self.value = None

    def __call__(self, idx=None):
        if self.value is None:
            self.value = compute_ax(self.x, self.A)
        if idx is None:
            return self.value
        return self.value.gather(1, idx[..., None].expand(-1, -1, self.value.shape[-1]))


# Gates --------------------------------------------------------------------------------------------------------------


class MeteoraGate(nn.Module):
    """MeteoRA's gate: the k largest of the logits G x, then a softmax over these k. With k = 1 the
    weight is 1.

    known        (e,) bool, the slots that G was trained for; the others are never chosen. None: all. Where fewer than k
                 are known, a token's remaining choices weigh 0
    full         softmax over all e first, then keep k of them as they are, as in a mixture of experts
    keep_logits  keep the last forward's logits (n, e) in `logits`, for a loss on them
    """

    def __init__(self, G, k, temperature=1.0, known=None, full=False):
        super().__init__()
        self.weight = nn.Parameter(G)  # G (e, i); gate files say weight
        self.k = k
        self.temperature = temperature
        self.full = full
        self.register_buffer("known", None if known is None or known.all() else known, persistent=False)
        self.keep_logits = False
        self.logits = None

    def forward(self, x, sample, ax):
        """x (n, i) -> Mixture of k adapters a token."""
        logits = F.linear(x.float(), self.weight.float())  # (n, e)
        if self.known is not None:
            logits = logits.masked_fill(~self.known, float("-inf"))
        if self.keep_logits:
            self.logits = logits
        top, idx = logits.topk(min(self.k, logits.shape[-1]), dim=-1)  # (n, k), the largest first
        if self.full:
            return Mixture(idx, (logits / self.temperature).softmax(-1).gather(-1, idx))
        if (
            self.k == 1
        ):  # a softmax over one is 1, its gradient 0: the LM loss can't train G, a loss on logits can
            return Mixture(idx, torch.ones_like(top))
        return Mixture(
            idx, ((top - top[:, :1]) / self.temperature).softmax(-1)
        )  # no overflow at a low temperature


class SampleGate(nn.Module):
    """The same mixture for every token of a row: for example one adapter, several of equal weight,
    none (weight 0).

    set() gives the mixtures of the current batch. Rows where `routed` is True ask `inner`, another
    gate, instead: so one batch serves requests with a fixed adapter beside requests that choose per
    token. Where `inner` is None one SampleGate can serve all Linears.
    """

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner
        self.set(None, None)

    def set(self, idx, weight, routed=None, each_token=False):
        """idx (b, k) int64, weight (b, k) float32, routed (b,) bool or None. With `each_token` idx
        and weight are (n, k), a mixture for each token of the next forward."""
        self.idx, self.weight = idx, weight
        self.routed = routed
        self.each_token = each_token
        self.per_row = () if each_token else ("idx", "weight", "routed")
        self.per_token = ("idx", "weight") if each_token else ()
        self.some_routed = routed is not None and bool(routed.any())  # read once, for all Linears
        self.all_routed = routed is not None and bool(routed.all())

    def forward(self, x, sample, ax):
        """x (n, i), sample (n,) -> Mixture, fixed or the inner gate's."""
        if self.all_routed:
            return self.inner(x, sample, ax)
        if self.some_routed:
            return self.select(self.inner(x, sample, ax), sample)
        return self.fixed(sample)

    def fixed(self, sample):
        """The Mixture that the batch was set to."""
        if self.each_token:
            return Mixture(self.idx, self.weight)
        return Mixture(self.idx[sample], self.weight[sample])

    def select(self, chosen, sample):
        """`chosen`, the inner gate's Mixture, for the routed rows, the fixed one for the others."""
        fixed = self.fixed(sample)
        k = max(fixed.idx.shape[1], chosen.idx.shape[1])
        routed = self.routed[sample, None]  # (n, 1)
        pairs = zip(chosen, fixed, strict=True)
        return Mixture(*(torch.where(routed, pad_to(c, k), pad_to(f, k)) for c, f in pairs))


def pad_to(y, k):
    """y (n, at most k) -> (n, k), zeros behind."""
    return F.pad(y, (0, k - y.shape[1]))


class KnownAdapterGate(nn.Module):
    """In training each token's one adapter is known in advance: set() before each forward."""

    per_token = ("idx", "weight")

    def set(self, slots, weight):
        """slots (n,) int64, weight (n,) float32."""
        self.idx, self.weight = slots[:, None], weight[:, None]

    def forward(self, x, sample, ax):
        """The Mixture it was set to, k = 1."""
        return Mixture(self.idx, self.weight)


def fixed_rows(pool, choices, device=None):
    """[{adapter name: weight}], one a row ({}: no adapter) -> idx (b, k), weight (b, k) for
    SampleGate; what a shorter row lacks is slot 0 at weight 0."""
    k = max([1, *map(len, choices)])
    idx = torch.zeros(len(choices), k, dtype=torch.int64)
    weight = torch.zeros(len(choices), k)
    for row, choice in enumerate(choices):
        for column, (name, value) in enumerate(choice.items()):
            idx[row, column] = pool.slot(name)
            weight[row, column] = value
    return idx.to(device), weight.to(device)


def set_gates(gates, idx, weight, routed=None, each_token=False):
    """SampleGate.set for all gates of a batch."""
    for gate in gates:
        gate.set(idx, weight, routed, each_token)


def meteora_gates(pool, k, temperature=1.0, known=None, full=False):
    """{module path: MeteoraGate} with G zero; where fewer than k slots are known, k is their
    number."""
    k = min(k, int(known.sum())) if known is not None else k
    zeros = {path: torch.zeros(pool.capacity, A.shape[2], device=A.device) for path, A in pool.A.items()}
    return {path: MeteoraGate(G, k, temperature, known, full) for path, G in zeros.items()}


# Attach and detach --------------------------------------------------------------------------------------------------


def attach(model, pool, gates, backend="auto", dropout=0.0, make=None):
    """Replaces each Linear of a Llama that the pool has adapters for by a MultiLoRALinear, in
    place.

    gates: {module path: gate}, or one gate for all. `make`: the class to build, by default
    model.gated_linear where fast/ has set one. Returns {module path: MultiLoRALinear}. Raises
    ValueError where adapters are attached already.
    """
    if attached(model):
        raise ValueError("adapters are attached already: detach(model) first")
    make = make or getattr(model, "gated_linear", MultiLoRALinear)
    linears = {}
    for path in pool.A:
        gate = gates[path] if isinstance(gates, dict) else gates
        base = model.get_submodule(path)
        stacks = pool.A[path], pool.B[path], pool.scale[path]
        linears[path] = make(base, *stacks, gate, model.model.token_rows, backend, dropout)
        swap(model, path, linears[path])
    return linears


def swap(model, path, module):
    """Sets the model's submodule at `path` to `module`, in the model's train or eval mode."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))


def attached(model):
    """{module path: MultiLoRALinear}, in module order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MultiLoRALinear)}


def detach(model):
    """Puts the model's own Linears back, untouched: whatever wraps one keeps it as `base`."""
    for path, module in list(model.named_modules()):
        if isinstance(getattr(module, "base", None), nn.Linear):
            swap(model, path, module.base)


class Recorder:
    """Records which adapters each token used: `with Recorder(model, max_n) as recorder:`, run the
    model on at most max_n tokens, then recorder.read(n)."""

    def __init__(self, model, max_n):
        self.linears = list(attached(model).values())
        self.traces = [torch.zeros(max_n, len(linear.A), device=linear.A.device) for linear in self.linears]

    def __enter__(self):
        for linear, trace in zip(self.linears, self.traces, strict=True):
            linear.trace = trace
        return self

    def __exit__(self, *_):
        for linear in self.linears:
            linear.trace = None

    def read(self, n):
        """The weights, without scale, of the last forward's n tokens in the m gated Linears: (m, n,
        e)."""
        return torch.stack(self.traces)[:, :n] if self.traces else torch.zeros(0, n, 0)
