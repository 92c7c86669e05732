"""`train.py gates`: what chooses among the adapters of a pool, token by token.

The base stays frozen, and so do the adapters but with --adapters_too.

MeteoRA's gates learn from the LM loss and from the gate term, which tells each gate the task's own adapter. With `fit`
they are fitted to features instead, without a backward pass through the network: under the gate term alone each gate is
a linear classifier of its own input. The other kinds learn from the LM loss.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common.devices import DTYPES
from common.files import InputError
from common.tokenizer import Tokenizer
from methods.baselines import Prompt, SmearLinear, smear_routers
from methods.session import new_gates
from moe_lora import MeteoraGate, Mixture, attach, detach
from pool.adapters import Pool, PoolFolder, alloc_B_of, linear_shapes, read_pool, save_adapter, write_pool
from pool.gate_files import parameters_of, save_gates
from pool.load import load_base
from tasks.composites import check_composite, compose
from tasks.folders import collate, load_tasks, micro_batches, pick, some_tasks, tokenize
from training.adapters import check_pool, trained
from training.loop import Checkpoint, Run, compile_for, finished, fit, hidden_states, lm_losses, required


@dataclass
class GatesRun(Run):
    tasks: str = ""  # folder of task folders, one named like each adapter
    pool: str = ""  # pool folder with the adapters
    share: float = 1.0  # of the tasks: the others and their adapters are never seen, nor chosen
    kind: Literal["meteora", "moe", "soft", "loraflow", "smear"] = "meteora"  # moe: top-k of a softmax; soft: all of it
    top_k: int = 2  # adapters a token uses (meteora, moe)
    gate_temperature: float = 1.0  # of the softmax over the k
    lm_weight: float = 1.0  # of the language-modelling loss; without effect at top-1, where it gives gates no gradient
    beta: float = 50.0  # of the gate term (the paper's reported runs); meteora only
    fit: Literal["", "own", "routed"] = ""  # fit to features, each task through its own adapter or as the gates route
    l2: float = 1e-4  # weight penalty of the fit
    adapters_too: str = ""  # train the adapters as well, as MeteoRA's released script does, and write this pool
    adapter_lr: float = 1e-4  # their peak learning rate
    composite: float = 0.0  # share of the examples that come as composites, up to --max_length tokens of them in one
    max_length: int = 512  # longer examples are left out; at most the model's context
    batch_size: int = 16  # examples a step, of all tasks in turn
    lr: float = 7e-3  # peak learning rate
    clip: float = 0.3  # largest gradient norm, 0 = no clipping
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the saved gates and adapters


def train_gates(o):
    """Trains a kind of gate over all adapters of a pool and writes POOL/gates/KIND.safetensors.

    meteora: LM cross-entropy on the response + beta * the gate term on every token (papers: MeteoRA, training
    objective). At top-1 every weight is the constant 1, so the LM loss has no gradient and is not computed: nothing
    then needs a backward pass through the network.
    """
    known = read_pool(required(o, "pool"))
    names = some_tasks(known.adapters, o.share, o.seed)
    tasks = load_tasks(required(o, "tasks"), names)
    if o.kind in ("meteora", "moe") and not 1 <= o.top_k <= len(names):
        raise InputError(f"--top_k is {o.top_k}, expected 1 to {len(names)}, the adapters of {known.path}")
    if o.kind != "meteora" and (o.fit or o.adapters_too):
        raise InputError(f"--kind {o.kind}: --fit and --adapters_too are for meteora")
    if o.kind == "soft" and len(names) < 2:
        raise InputError(f"--kind soft needs two adapters or more, {known.path} has {len(names)}")
    if o.composite and (o.fit or o.kind == "smear"):
        raise InputError("--composite goes with neither --fit nor --kind smear: both see one task a prompt")
    check_composite(o.composite, o.batch_size)
    if o.adapters_too and o.fit:
        raise InputError("--fit trains no adapters: leave out --adapters_too")
    if o.adapters_too and Path(o.adapters_too).resolve() == known.path.resolve():
        raise InputError(f"--adapters_too is {o.adapters_too}, the pool itself: name another folder")
    model = load_base(o.model, o.dtype, o.device)
    tokenizer = Tokenizer(o.model)
    o.max_length = min(o.max_length, model.config.max_position_embeddings)
    check_pool(known, model, o, known.template)
    shapes = linear_shapes(model)
    dtype = torch.float32 if o.adapters_too else model.model.embed_tokens.weight.dtype
    pool = Pool.load(
        {name: known.adapters[name] for name in names},
        shapes,
        dtype,
        model.head_weight.device,
        alloc_B=alloc_B_of(model),
    )
    kind = f"{o.kind}_top{o.top_k}" if o.kind in ("meteora", "moe") else o.kind
    file = Path(o.adapters_too or known.path) / "gates" / f"{kind}.safetensors"
    bound = [f"{name} {pool.members[name].hash}" for name in pool.names]
    checkpoint = Checkpoint(file.parents[1] / "runs" / f"gates_{kind.removeprefix('meteora_')}", o,
                            [*bound, f"base {model.fingerprint}"])  # fmt: skip
    if checkpoint.finished:
        return finished(checkpoint)
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, o.max_length)
    if o.fit:
        gates = fit_gates(model, pool, examples, o)
    else:
        gates = fit_by_steps(model, pool, tokenizer, examples, known.template, checkpoint, o)
    if o.adapters_too:
        pool = save_pool(known, pool, shapes, o)
    for param in parameters_of(gates).values():
        param.data = param.data.to(DTYPES[o.save_dtype])
    k = o.top_k if o.kind in ("meteora", "moe") else len(pool.names)
    save_gates(file, gates, pool, k, pool.names)
    checkpoint.finish(file)


def fit_by_steps(model, pool, tokenizer, examples, template, checkpoint, o):
    """Trains gates by gradient steps; returns {module path: gate}."""
    prompt, gate_loss = None, None
    if o.kind == "smear":
        prompt = Prompt()
        gates = smear_routers(pool, prompt)
        attach(model, pool, gates, make=SmearLinear)
    else:
        gates = new_gates(o.kind, pool, o.top_k, o.gate_temperature)
        attach(model, pool, gates)
        gate_loss = GateLoss(gates) if o.kind == "meteora" else None
    params, rates = parameters_of(gates), {}
    if o.adapters_too:
        stacks = {f"{path}.{n}": stack[path] for n, stack in (("A", pool.A), ("B", pool.B)) for path in pool.A}
        params, rates = params | stacks, dict.fromkeys(stacks, o.adapter_lr / o.lr if o.lr else 0.0)

    compile_for(model, o, pick(examples, 0, o))

    def step_loss(step):
        picked = compose(pick(examples, step, o), tokenizer, template, step, o)
        return gates_step(model, pool, gate_loss, prompt, picked, o)

    fit(checkpoint, params, o, step_loss, rates=rates)
    if gate_loss:
        gate_loss.remove()
    return gates


def gates_step(model, pool, gate_loss, prompt, picked, o):
    """Forward and backward of one step; returns the losses, and MeteoRA's gates' top-1 accuracy over all tokens.
    `prompt` is SMEAR's, which needs whole rows, else None."""
    use_lm = gate_loss is None or (o.lm_weight > 0 and (o.top_k > 1 or o.adapters_too != ""))
    parts = [part for example in picked for part in example.parts]
    n = sum(len(part.ids) for part in parts if part.task)
    n_response = sum(len(part.ids) - part.n_prompt for part in parts)
    seen = {"lm_loss": 0.0, "gate_loss": 0.0, "right": 0.0}
    padded = prompt is not None
    for some in micro_batches(picked, o.micro_tokens, padded):
        batch = collate(some, model.head_weight.device)
        if padded:
            prompt.mask = batch.prompt
        if use_lm:
            lm_loss = lm_losses(model, batch, padded).sum() / n_response
        else:
            lm_loss = hidden_states(model, batch, padded).new_zeros(())
        loss = o.lm_weight * lm_loss.float()
        if gate_loss:
            labels = batch.slots(pool)[batch.real]
            mean, right = gate_loss(labels)
            gate_term = mean * (labels >= 0).sum() / n
            loss = loss + o.beta * gate_term
            seen["gate_loss"] += gate_term.item()
            seen["right"] += float(right.float().mean()) / n
        loss.backward()
        seen["lm_loss"] += lm_loss.item()
    kept = (["lm_loss"] if use_lm else []) + (["gate_loss", "right"] if gate_loss else [])
    return {key: seen[key] for key in kept}


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


def save_pool(known, pool, shapes, o):
    """Writes the trained adapters as a pool of their own; returns it as loaded, for the gates to be bound to."""
    folder = Path(o.adapters_too)
    paths = {name: folder / "adapters" / name for name in pool.names}
    for name, path in paths.items():
        save_adapter(trained(pool, name, o), path)
    write_pool(PoolFolder(folder, paths, known.fingerprint, known.template))
    return Pool.load(paths, shapes)


# Fitting to features ------------------------------------------------------------------------------------------------


class FittingGate(nn.Module):
    """In place of a MeteoraGate during one forward pass: fits it to the input that just arrives, then chooses, so that
    the gates behind it learn from what it makes them see.

    Where `own` the choice is the task's own adapter. Else each half of the examples is routed by a gate fitted to the
    other half: on examples that it was fitted to a gate is nearly always right, and the gates behind it would learn to
    rely on that.
    """

    def __init__(self, gate, shared, own):
        super().__init__()
        self.gate, self.shared, self.own = gate, shared, own

    def forward(self, x, sample, ax):
        s = self.shared
        half = s["half"][sample]
        if s.get("x") != (x.data_ptr(), x.shape):  # q, k and v get the same tensor, and so do gate and up
            parts = [s["keep"]] + ([] if self.own else [s["keep"] & (half == which) for which in (1, 0)])
            e = self.gate.weight.shape[0]
            s["G"] = [logistic(x[part].float(), s["labels"][part], e, s["l2"]) for part in parts]
            s |= {"x": (x.data_ptr(), x.shape), "held": x, "count": s["count"] + 1}
        self.gate.weight.data = s["G"][0].clone()
        if self.own:
            return Mixture(s["labels"][:, None], torch.ones_like(x[:, :1], dtype=torch.float32))
        a, b = (MeteoraGate(G, self.gate.k, self.gate.temperature)(x, sample, ax) for G in s["G"][1:])
        return Mixture(*(torch.where(half[:, None] == 0, u, v) for u, v in zip(a, b, strict=True)))


def fit_gates(model, pool, examples, o):
    """Fits each gate by logistic regression to its own inputs: one forward pass over steps * batch_size examples, all
    at once, and a small convex problem a Linear, no backward pass. own: every sequence runs through its own adapter, so
    that no gate depends on another. routed: the gates choose, each from when the pass has fitted it."""
    begin, gates = time.perf_counter(), new_gates("meteora", pool, o.top_k, o.gate_temperature)
    device = model.head_weight.device
    batch = collate([example for step in range(o.steps) for example in pick(examples, step, o)], device)
    labels = batch.slots(pool).clamp(min=0).flatten()
    half = torch.arange(len(batch.tasks), device=device) // len(examples) % 2  # every second round of the tasks
    shared = {"keep": batch.real.flatten(), "labels": labels, "half": half, "l2": o.l2, "count": 0}
    attach(model, pool, {path: FittingGate(gate, shared, o.fit == "own") for path, gate in gates.items()})
    with torch.no_grad():
        model.model(batch.ids)
    detach(model)
    print(f"fitted {shared['count']} classifiers for {len(gates)} gates on {int(batch.real.sum()):,} tokens in "
          f"{time.perf_counter() - begin:.1f} s", file=sys.stderr)  # fmt: skip
    return gates


@torch.enable_grad()
def logistic(x, labels, e, l2, steps=50):
    """Multinomial logistic regression without bias, by L-BFGS: x (n, i) float32, labels (n,) -> G (e, i).

    The inputs are whitened, the penalty acts on the weights of the whitened ones, and G is mapped back: few directions
    hold most of a residual stream's variance, and without that L-BFGS, as AdamW, stops far from the optimum (LOG.md).
    """
    whiten = whitening(x)
    G, x = torch.zeros(e, x.shape[1], device=x.device, requires_grad=True), x @ whiten
    optimizer = torch.optim.LBFGS([G], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ G.T, labels) + l2 / 2 * G.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return G.detach() @ whiten.T


def whitening(x):
    """(i, i): x @ whitening(x) has nearly unit second moments, directions without variance stay small."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return vectors * (values.clamp(min=0) + 1e-3 * values.mean()).rsqrt()
