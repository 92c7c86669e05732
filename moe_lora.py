"""The gated multi-LoRA Linear, MeteoRA's gate, fixed mixtures, attach and detach, the routing recorder, the gate loss.

    y = W x + sum over the k chosen adapters of  weight_j * scale_j * B_j A_j x

Everything in this project is a way to choose the k adapters and their weights, so there is one Linear, one kernel
operation and one small protocol for whatever chooses:

    gate(x: (n, i), sample: (n,) int64, ax: callable -> (n, e, r)) -> Mixture(idx: (n, k) int64, weight: (n, k) float32)

`sample` is the row of the batch that a token belongs to, `ax` gives A x of all adapters, computed once and shared with
the dense kernel. Unused slots weigh 0. To try a gate of your own, write an nn.Module with that forward and attach it.

Letters, here and everywhere: b batch, t positions, n tokens (b*t, flattened), e adapter slots in the pool, k adapters
a token uses, r rank, i/o in/out features of a Linear, v vocabulary, m gated Linears. W base weight (o, i), A (e, r, i),
B (e, o, r), G gate weight (e, i), scale (e,).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from compiled import at_most, of_any_length
from files import InputError, read_safetensors, warn, write_safetensors
from kernels import compute_ax, lora_mix, top_k_mixture
from model import linear


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
        ax = once(lambda: compute_ax(x, self.A)[0])
        return self.add(y, x, ax, self.gate(x, sample, ax))

    def add(self, y, x, ax, mixture):
        """y and what the chosen adapters make of x."""
        idx, weight = mixture
        if self.trace is not None:
            self.trace[: len(x)].zero_().scatter_add_(1, idx, weight.detach())
        if self.dropout and self.training:  # LoRA dropout sees only what the adapters see
            x, ax = dropout(x, self.dropout), None
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
            ax = once(lambda j=j: every_ax()[j])
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
    k are known, the rest of a token's slots weigh 0. With `keep_logits` `logits` (n, e) are the last forward's.
    """

    def __init__(self, G, k, temperature=1.0, known=None):
        super().__init__()
        self.weight, self.k, self.temperature = nn.Parameter(G), k, temperature  # G (e, i)
        self.register_buffer("known", None if known is None or known.all() else known, persistent=False)
        self.keep_logits, self.logits = False, None

    def forward(self, x, sample, ax):
        return self.together([self], x)[0]

    @staticmethod
    def together(gates, x):
        """[Mixture] of gates of one input: one product, one choice."""
        first = gates[0]
        if at_most(x.shape[0], 1):  # joined by the compiler, without a copy of the weights
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
        # the constant 1 by itself, so that nothing upstream waits for a gradient that is zero
        weight = weight if first.k > 1 else torch.ones_like(weight)
        return [Mixture(*both) for both in zip(idx.unbind(1), weight.unbind(1), strict=True)]


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


def set_gates(gates, idx, weight, routed=None, each_token=False, compiled=None):
    """SampleGate.set for all gates of a batch. For compiled blocks, which have graphs of their own for a size of 1, one
    row is given as two."""
    if compiled:
        rows = [y if y is None or len(y) > 1 else y.repeat(2, *[1] * (y.dim() - 1)) for y in (idx, weight, routed)]
        of_any_length(*(y for y in rows if y is not None))
        idx, weight, routed = rows
    for gate in gates:
        gate.set(idx, weight, routed, each_token)


def fixed_rows(pool, choices, device=None):
    """[{adapter name: weight}] one for each sample ({} is the base) -> idx (b, k), weight (b, k) for SampleGate."""
    k = max([1, *map(len, choices)])
    idx, weight = torch.zeros(len(choices), k, dtype=torch.int64), torch.zeros(len(choices), k)
    for row, choice in enumerate(choices):
        for column, (name, value) in enumerate(choice.items()):
            idx[row, column], weight[row, column] = pool.slot(name), value
    return idx.to(device), weight.to(device)


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


# Gate files ---------------------------------------------------------------------------------------------------------


def parameters_of(gates):
    """{module path: gate} -> {'PATH.gate.NAME': parameter}, every first axis the pool's slots."""
    return {f"{path}.gate.{n}": p for path, gate in gates.items() for n, p in gate.named_parameters(recurse=False)}


def save_gates(file, gates, pool, k, names):
    """gates {module path: gate} -> a file of their parameters, rows in the order of `names`, bound to name and hash."""
    slots = [pool.slot(name) for name in names]
    hashes = [pool.members[name].hash for name in names]
    tensors = {key: param[slots] for key, param in parameters_of(gates).items()}
    write_safetensors(file, tensors, {"names": "\n".join(names), "hashes": "\n".join(hashes), "k": str(k)})


class GateFile:
    """A gate file, its rows joined to a pool's slots by name and hash: `k`, and `known` (e,) bool, slots with a row.

    A row whose adapter is missing or has changed is an InputError that lists them all; an adapter without a row is
    never chosen, with one warning.
    """

    def __init__(self, file, pool):
        self.file = file
        self.tensors, metadata = read_safetensors(file)
        if not {"names", "hashes", "k"} <= metadata.keys() or not metadata["k"].isdigit():
            raise InputError(f"{file}: metadata lacks names, hashes or k: not a gate file of this project")
        names, hashes = metadata["names"].split("\n"), metadata["hashes"].split("\n")
        wrong = []
        for name, digest in zip(names, hashes, strict=False):
            if name not in pool.members:
                wrong.append(f"{name} (missing from the pool)")
            elif pool.members[name].hash != digest:
                wrong.append(f"{name} (trained with {digest[:12]}, the pool's is {pool.members[name].hash[:12]})")
        if wrong or len(names) != len(hashes):
            raise InputError(f"{file}: made for other adapters: {', '.join(wrong)}; train the gates again")
        if strangers := [n for n in pool.names if n not in names]:
            warn(f"{file} has no row for {', '.join(strangers)}: never chosen by these gates")
        self.slots = torch.tensor([pool.slot(name) for name in names])
        self.k, device = int(metadata["k"]), next(iter(pool.A.values())).device
        self.known = torch.zeros(pool.capacity, dtype=torch.bool, device=device)
        self.known[self.slots] = True

    def fill(self, gates, dtype=torch.float32):
        """Gives {module path: gate} the file's rows, in `dtype`. Raises InputError where a tensor is missing or of the
        wrong shape."""
        for key, param in parameters_of(gates).items():
            want = (len(self.slots), *param.shape[1:])
            if key not in self.tensors or tuple(self.tensors[key].shape) != want:
                found = tuple(self.tensors[key].shape) if key in self.tensors else "nothing"
                raise InputError(f"{self.file}: {key}: expected {want}, found {found}")
            param.data = torch.zeros(param.shape, dtype=dtype, device=param.device)
            param.data[self.slots] = self.tensors[key].to(param.device, dtype)
            param.requires_grad_(False)
        return gates


def load_gates(file, pool, temperature=1.0, dtype=torch.float32, k=None):
    """A file of MeteoRA's gates -> {module path: MeteoraGate}; see GateFile."""
    rows = GateFile(file, pool)
    return rows.fill(meteora_gates(pool, k or rows.k, temperature, rows.known), dtype)


def meteora_gates(pool, k, temperature=1.0, known=None):
    """{module path: MeteoraGate} with G zero; where fewer than k slots are known, k is their number."""
    k = min(k, int(known.sum())) if known is not None else k
    zeros = {path: torch.zeros(pool.capacity, A.shape[2], device=A.device) for path, A in pool.A.items()}
    return {path: MeteoraGate(G, k, temperature, known) for path, G in zeros.items()}


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
        """labels (n,) int64 (slot, or -100 for padding) of the last forward's tokens -> the loss, and for each gate in
        module order how many labelled tokens have their label as top-1: (m,)."""
        logits = torch.stack([gate.logits for gate in self.gates])  # (m, n, e)
        total = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), ignore_index=-100)
        return total, (logits.argmax(-1) == labels).sum(-1)

    def remove(self):
        for gate in self.gates:
            gate.keep_logits, gate.logits = False, None
