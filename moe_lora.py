"""The gated multi-LoRA Linear, MeteoRA's gate, RAMoLE's router, fixed mixtures, attach and detach, recorder, gate loss.

    y = W x + sum over the k chosen adapters of  weight_j * scale_j * B_j A_j x

Everything in this project is a way to choose the k adapters and their weights, so there is one Linear, one kernel
operation and one small protocol for whatever chooses:

    gate(x: (n, i), sample: (n,) int64, ax: callable -> (n, e, r)) -> Mixture(idx: (n, k) int64, weight: (n, k) float32)

`sample` is the row of the batch that a token belongs to, `ax()` gives A x of all adapters, computed once and shared
with the dense kernel, `ax(idx)` that of k adapters a token, (n, k, r). Unused slots weigh 0. To try a gate of your own,
write an nn.Module with that forward and attach it. Only where adapters are trained each token's one adapter is known in
advance: there the gate gives a kernels.Own.

Letters, here and everywhere: b batch, t positions, n tokens (b*t, flattened), e adapter slots in the pool, k adapters
a token uses, r rank, i/o in/out features of a Linear, v vocabulary, m gated Linears. W base weight (o, i), A (e, r, i),
B (e, o, r), G gate weight (e, i), scale (e,).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fast.compiled import FEW, at_most, of_any_length
from fast.matmul import linear
from kernels import Own, accumulate, ax_of, choose, compute_ax, lora_mix, lora_own, one_hot, top_k_mixture


class Mixture(NamedTuple):
    idx: torch.Tensor  # (n, k) int64
    weight: torch.Tensor  # (n, k) float32


class MultiLoRALinear(nn.Module):
    """A Linear and the pool's adapters for it: Tensor -> Tensor, mixed as its gate says."""

    def __init__(self, base, A, B, scale, gate, spelling="auto", dropout=0.0, rows=None):
        super().__init__()
        self.base, self.A, self.B, self.scale, self.rows = base, A, B, scale, rows  # A, B, scale belong to the pool
        self.gate, self.spelling, self.dropout = gate, spelling, dropout
        self.trace = None  # (n max, e), a Recorder's, while someone is looking

    def forward(self, x):
        y = self.base(x)  # (n, o); a Linear by itself takes (b, t, i) as well
        inside = self.rows and y.dim() == 2
        x, sample = x.reshape(-1, x.shape[-1]), self.rows.sample if inside else rows_of(y)
        ax = AX(x, self.A, lambda: compute_ax(x, self.A)[0])
        return self.add(y, x, ax, self.gate(x, sample, ax))

    def add(self, y, x, ax, mixture):
        """y and what the chosen adapters make of x."""
        own = isinstance(mixture, Own)
        idx, weight = mixture.of_each_token() if own else mixture
        if self.trace is not None:
            self.trace[: len(x)].zero_().scatter_add_(1, idx, weight.detach())
        if self.dropout and self.training:  # LoRA dropout sees only what the adapters see
            x, ax = dropout(x, self.dropout), None
        if own and self.spelling == "auto":
            return y + lora_own(x, self.A, self.B, self.scale, mixture).view(y.shape)
        return y + lora_mix(x, self.A, self.B, self.scale, idx, weight, self.spelling, ax).view(y.shape)

    @staticmethod
    def together(linears, x):
        """Linears of one input x (n, i) in a compiled block -> [(n, o), ...]: their A x is one product, and so are
        their gates' logits where these are MeteoRA's."""
        if any(type(module) is not MultiLoRALinear for module in linears):
            return [module(x) for module in linears]
        sample, inner = linears[0].rows.sample, [getattr(module.gate, "inner", module.gate) for module in linears]
        every_ax = once(lambda: compute_ax(x, *(module.A for module in linears)))
        shared = all(type(gate) is MeteoraGate for gate in inner)
        mixtures, ys = MeteoraGate.together(inner, x) if shared else [], []
        for j, module in enumerate(linears):
            ax = AX(x, module.A, lambda j=j: every_ax()[j])
            chosen = mixtures[j : j + 1]
            if not chosen or module.gate is not inner[j]:
                chosen = [module.gate(x, sample, ax, *chosen)]
            ys.append(module.add(module.base(x), x, ax, *chosen))
        return ys


def once(function):
    """`function`, computed at its first call."""
    kept = []

    def call():
        if not kept:
            kept.append(function())
        return kept[0]

    return call


class AX:
    """A x of all adapters (n, e, r), computed at the first call; of adapters idx (n, k), (n, k, r), where that reads
    less by themselves."""

    def __init__(self, x, A, every):
        self.x, self.A, self.every = x, A, once(every)

    def __call__(self, idx=None):
        if idx is None:
            return self.every()
        if choose(self.x, self.A, idx.shape[1]) == "bmm":
            return ax_of(self.x, self.A, idx)
        return self.every().gather(1, idx[..., None].expand(-1, -1, self.A.shape[1]))


def rows_of(y):
    """Which row of y (b, ..., o) each of its tokens belongs to: (n,) int64."""
    return torch.arange(y.shape[0], device=y.device).repeat_interleave(y[0].numel() // y.shape[-1])


def dropout(x, p):
    """F.dropout with p rounded to 1/256: a mask from random bytes costs a quarter of torch's on a CPU, where drawing
    it takes as long as the adapters' products."""
    cut = round(256 * p)
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,), device=x.device)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= cut
    return x * keep * (256 / (256 - cut))


# Gates --------------------------------------------------------------------------------------------------------------


class MeteoraGate(nn.Module):
    """MeteoRA's gate: the top-k logits of G x, softmax over those k at a temperature. k = 1 has weight 1.

    `known` (e,) bool marks the slots that G was trained for, None is all; the others are never chosen. Where fewer than
    k are known, the rest of a token's slots weigh 0. With `keep_logits` `logits` (n, e) are the last forward's. With
    `full` the k keep their weights of a softmax over all, as in a mixture of experts: k = 1 learns from the LM loss.
    """

    def __init__(self, G, k, temperature=1.0, known=None, full=False):
        super().__init__()
        self.weight, self.k, self.temperature, self.full = nn.Parameter(G), k, temperature, full  # G (e, i)
        self.register_buffer("known", None if known is None or known.all() else known, persistent=False)
        self.keep_logits, self.logits = False, None

    def forward(self, x, sample, ax):
        return self.together([self], x)[0]

    @staticmethod
    def together(gates, x):
        """[Mixture] of gates of one input: one product, one choice."""
        first = gates[0]
        if at_most(x.shape[0], FEW):  # joined by the compiler, without a copy of the weights
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
        if first.full:
            weight = (logits / first.temperature).softmax(-1).gather(-1, idx)
            return [Mixture(*both) for both in zip(idx.unbind(1), weight.unbind(1), strict=True)]
        # the constant 1 by itself, so that nothing upstream waits for a gradient that is zero
        weight = weight if first.k > 1 else torch.ones_like(weight)
        return [Mixture(*both) for both in zip(idx.unbind(1), weight.unbind(1), strict=True)]


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
        inner = torch.einsum("oq,eor->eqr", self.B.to(accumulate(B)), B.to(accumulate(B)))
        return inner * scale[:, None, None].to(inner.dtype) if self.scaled else inner

    def forward(self, x, sample, ax):
        inner = self._inner() if self.inner is None else self.inner
        idx, bias = self.idx[sample], self.bias[sample]  # (n, k)
        q = linear(x, self.A, dtype=inner.dtype)  # (n, r_q)
        a = ax(idx)[..., : inner.shape[-1]]  # (n, k, r); ranks that came after bind() are another adapter's
        if self.inner is None:  # training
            inner = (one_hot(idx, len(inner), inner.dtype) @ inner.flatten(1)).unflatten(-1, inner.shape[1:])
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


class LogoProbe(nn.Module):
    """LoGo's look at one Linear: no token uses an adapter, and `score` (e,) is what each would make of the last token,
    ||s B A x|| or, with logo_entropy, 1 / entropy of softmax(s B A x)."""

    def __init__(self, B, scale, method="logo"):
        super().__init__()
        self.B, self.scale, self.method, self.score = B, scale, method, None

    def forward(self, x, sample, ax):
        a = ax(torch.arange(len(self.B), device=x.device)[None].expand(len(x), -1))[-1]  # (e, r)
        v = torch.einsum("er,eor->eo", a.float(), self.B.float()) * self.scale[:, None]
        entropy = -(v.softmax(-1) * v.log_softmax(-1)).sum(-1)
        self.score = v.norm(dim=-1) if self.method == "logo" else 1 / entropy.clamp(min=1e-6)
        nothing = torch.zeros(len(x), 1, device=x.device)
        return Mixture(nothing.long(), nothing)


class SampleGate(nn.Module):
    """The same mixture for every token of a sample: one named adapter, uniform, the base alone (weight 0).

    idx (b, k) int64 and weight (b, k) float32 belong to the current batch; rows where routed (b,) is True ask `inner`,
    another gate, instead. So one batch serves requests with a fixed adapter beside requests that choose per token.
    Where `inner` is None one SampleGate can serve all Linears. With `each_token` idx and weight are (b*t, k), and the
    mixture is fixed for each token of the next forward.
    """

    def __init__(self, inner=None):
        super().__init__()
        self.inner, self.idx, self.weight, self.routed, self.each_token = inner, None, None, None, False
        self.some = self.every = False  # routed.any(), routed.all(), read once for all Linears

    def set(self, idx, weight, routed=None, each_token=False):
        self.idx, self.weight, self.routed, self.each_token = idx, weight, routed, each_token
        self.some, self.every = routed is not None and bool(routed.any()), routed is not None and bool(routed.all())

    def forward(self, x, sample, ax, chosen=None):
        """`chosen` is the inner gate's Mixture where that is known already."""
        if self.every:
            return chosen or self.inner(x, sample, ax)
        fixed = Mixture(self.idx, self.weight)
        if not self.each_token:
            fixed = Mixture(self.idx[sample], self.weight[sample])
        if self.inner is None or not (torch.compiler.is_compiling() or self.some):  # compiled: one graph for both
            return fixed
        chosen = chosen or self.inner(x, sample, ax)
        k = max(fixed.idx.shape[1], chosen.idx.shape[1])
        fixed, chosen = (Mixture(*(F.pad(y, (0, k - y.shape[1])) for y in m)) for m in (fixed, chosen))
        routed = self.routed[sample, None]  # (n, 1)
        return Mixture(*(torch.where(routed, c, f) for c, f in zip(chosen, fixed, strict=True)))


class OwnGate(nn.Module):
    """Sends each token to one adapter that is known in advance, in training: set() for each forward."""

    def __init__(self):
        super().__init__()
        self.own = None

    def set(self, slots, weight, compiled=None):
        """slots (n,) int64, weight (n,) float32; see set_gates for `compiled`."""
        self.own = Own.of(slots, weight)
        if compiled:
            of_any_length(*self.own)

    def forward(self, x, sample, ax):
        return self.own


def set_gates(gates, idx, weight, routed=None, each_token=False, compiled=None):
    """SampleGate.set for all gates of a batch. For compiled blocks, which have graphs of their own for a size of 1, one
    row is given as two."""
    if compiled and not each_token:
        rows = [y if y is None or len(y) > 1 else y.repeat(2, *[1] * (y.dim() - 1)) for y in (idx, weight, routed)]
        of_any_length(*(y for y in rows if y is not None))
        idx, weight, routed = rows
    if compiled and each_token:
        of_any_length(idx, weight)
    for gate in gates:
        gate.set(idx, weight, routed, each_token)


def set_candidates(routers, idx, bias, compiled=None):
    """Gives RouterLoRAs the candidates of a batch; see set_gates for `compiled`."""
    if compiled:
        idx, bias = (y if len(y) > 1 else y.repeat(2, 1) for y in (idx, bias))
        of_any_length(idx, bias)
    for router in routers:
        router.idx, router.bias = idx, bias


def candidate_rows(pool, retrieved, k, prior=0.0, device=None):
    """[[(adapter name, score), ...]] one for each sample, k at most -> idx (b, k), bias (b, k) for RouterLoRA."""
    idx, bias = torch.zeros(len(retrieved), k, dtype=torch.int64), torch.full((len(retrieved), k), float("-inf"))
    for row, pairs in enumerate(retrieved):
        for column, (name, score) in enumerate(pairs):
            idx[row, column], bias[row, column] = pool.slot(name), score / prior if prior else 0.0
    return idx.to(device), bias.to(device)


def fixed_rows(pool, choices, device=None):
    """[{adapter name: weight}] one for each sample ({} is the base) -> idx (b, k), weight (b, k) for SampleGate."""
    k = max([1, *map(len, choices)])
    idx, weight = torch.zeros(len(choices), k, dtype=torch.int64), torch.zeros(len(choices), k)
    for row, choice in enumerate(choices):
        for column, (name, value) in enumerate(choice.items()):
            idx[row, column], weight[row, column] = pool.slot(name), value
    return idx.to(device), weight.to(device)


def meteora_gates(pool, k, temperature=1.0, known=None, full=False):
    """{module path: MeteoraGate} with G zero; where fewer than k slots are known, k is their number."""
    k = min(k, int(known.sum())) if known is not None else k
    zeros = {path: torch.zeros(pool.capacity, A.shape[2], device=A.device) for path, A in pool.A.items()}
    return {path: MeteoraGate(G, k, temperature, known, full) for path, G in zeros.items()}


# Attach and detach --------------------------------------------------------------------------------------------------


def attach(model, pool, gates, spelling="auto", dropout=0.0, make=MultiLoRALinear):
    """Puts the pool into the model: each Linear it covers becomes a MultiLoRALinear, in place.

    gates: one gate for all, or {module path: gate}. `make` may be a subclass. Returns {module path: MultiLoRALinear}.
    Raises ValueError where adapters are attached already.
    """
    if attached(model):
        raise ValueError("adapters are attached already: detach(model) first")
    linears = {}
    for path in pool.A:
        gate = gates[path] if isinstance(gates, (dict, nn.ModuleDict)) else gates
        base, stacks = model.get_submodule(path), (pool.A[path], pool.B[path], pool.scale[path])
        linears[path] = make(base, *stacks, gate, spelling, dropout, model.model.rows)
        swap(model, path, linears[path])
    return linears


def swap(model, path, module):
    """Puts `module` where the model has another."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))


def attached(model):
    """{module path: MultiLoRALinear}, in module order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, MultiLoRALinear)}


def detach(model):
    """Gives the model its own Linears back, untouched: whatever stands in for one keeps it as `base`."""
    for path, module in list(model.named_modules()):
        if isinstance(getattr(module, "base", None), nn.Linear):
            swap(model, path, module.base)


# Looking and training -----------------------------------------------------------------------------------------------


class Recorder:
    """Routing of the last forward, for whoever looks: with Recorder(model, n) as seen: ...; seen.read(n) -> (m, n, e).

    A tensor (n max, e) for each Linear, which the Linear holds, so that a compiled block needs no index and no list;
    taken from the Linears on leaving.
    """

    def __init__(self, model, n):
        self.linears = attached(model)
        first = next(iter(self.linears.values()), None)
        e, device = (first.A.shape[0], first.A.device) if first is not None else (0, None)
        self.trace = [torch.zeros(n, e, device=device) for _ in self.linears]
        if model.model.compiled_step:  # compiled
            of_any_length(*self.trace)

    def __enter__(self):
        for module, view in zip(self.linears.values(), self.trace, strict=True):
            module.trace = view
        return self

    def __exit__(self, *_):
        for module in self.linears.values():
            module.trace = None

    def read(self, n):
        """Weights (m, n, e) of the last forward's n tokens."""
        return torch.stack(self.trace)[:, :n] if self.trace else torch.zeros(0, n, 0)


class GateLoss:
    """The gate term of MeteoRA's loss: one mean cross-entropy over every gate's full e logits against the task's own
    adapter, over all labelled tokens (papers: beta * this is added to the LM loss).

    Gates keep the logits of their last forward until remove().
    """

    def __init__(self, gates):
        self.gates = list(gates.values())
        for gate in self.gates:
            gate.keep_logits = True

    def __call__(self, labels):
        """labels (n,) int64 (slot, or -100 for none) of the last forward's tokens -> the loss, and for each gate in
        module order how many labelled tokens have their label as top-1: (m,)."""
        logits = torch.stack([gate.logits for gate in self.gates])  # (m, n, e)
        total = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), ignore_index=-100)
        return total, (logits.argmax(-1) == labels).sum(-1)

    def remove(self):
        for gate in self.gates:
            gate.keep_logits, gate.logits = False, None
