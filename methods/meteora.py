"""MeteoRA (arXiv 2405.13053): a gate in each Linear picks k of many adapters for each token.

    y = W x + sum over j in top-k(G x) of  w_j scale_j B_j A_j x,   w = softmax of the k logits / T
    loss = lm_weight * LM cross-entropy of the response + beta * mean cross-entropy of every gate's
           e logits against the task's own adapter, over all tokens of prompt and response

The first line is moe_lora.py's Linear with its MeteoraGate; the second is GateTermTraining
(training/gates.py).

With k = 1 every weight is the constant 1, so that the LM loss has no gradient: the gate term alone
trains G, and each gate is a linear classifier of its own input. fit_gates() fits it as one, without
a backward pass through the network.
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import InputError
from common.options import NotNegative
from methods.protocol import TopKGates
from methods.session import Mole
from moe_lora import AX, MeteoraGate, Mixture, attach, detach, meteora_gates
from parallel.processes import one_process
from pool.slots import Pool
from tasks.folders import collate, pick
from training.gates import GateTermRun, GateTermTraining


@dataclass
class MeteoraRun(GateTermRun):
    """Options of `train.py gates --kind meteora`."""

    fit: Literal["", "own", "routed"] = ""  # fit to features, with a task's own adapter or routed
    l2: NotNegative = 1e-4  # weight penalty of the fit


class Meteora(TopKGates):
    """MeteoRA's gates, top-k."""

    pattern = r"meteora(?:_top([1-9][0-9]{0,5}))?"
    names = ("meteora", "meteora_top1", "meteora_top2")
    about = "MeteoRA's gates, k adapters a token (meteora: --top_k of them)"
    paper = "2405.13053"
    kind = "meteora"
    Run = MeteoraRun
    Training = GateTermTraining
    trains_adapters = True
    gates_know_tasks = True
    new_gates = staticmethod(meteora_gates)

    @property
    def made_by(self) -> str:
        """The command for this k."""
        return f"train.py gates --top_k {self.top_k}"

    @property
    def has_temperature(self) -> bool:
        """Of one weight there is no softmax."""
        return self.top_k > 1

    @classmethod
    def default(cls, mole: Mole, k: int, k_asked: bool) -> tuple[str, str] | None:
        """The pool's gates of top-k; where it has none, its gates of another k."""
        if not mole.folder:
            return None
        others = sorted((mole.folder.path / "gates").glob("meteora_top[1-9].safetensors"))
        for file in (cls.parse("meteora", k).file(mole), *others):
            if file.exists():
                same = k_asked or file.stem == f"meteora_top{k}"
                found = file.stem.removeprefix("meteora_top")
                return "meteora" if same else file.stem, f"top-{found} gates from gates/{file.name}"
        return None

    @classmethod
    def run_folder(cls, args) -> str:
        """gates_topK."""
        return f"gates_top{args.top_k}"

    @classmethod
    def check_run(cls, args, names: list[str]) -> None:
        """Raises InputError for a k beyond the pool, and for options that exclude each other."""
        super().check_run(args, names)
        if args.composite and args.fit:
            raise InputError(
                "--composite goes with neither --fit nor --kind smear: both see one task a prompt"
            )
        if args.fit:
            one_process("--fit")
        if args.adapters_too and args.fit:
            raise InputError("--fit trains no adapters: leave out --adapters_too")

    @classmethod
    def fit(cls, model, pool: Pool, examples: list, args) -> dict[str, MeteoraGate] | None:
        """fit_gates() with --fit, else None."""
        return fit_gates(model, pool, examples, args) if args.fit else None


# Fitting to features ------------------------------------------------------------------------------


class FittingGate(nn.Module):
    """In place of a MeteoraGate during one forward pass: fits it to the input that just arrives,
    then chooses, so that later gates are fitted to what this choice makes them see.

    With `own` the choice is the task's own adapter. Else each half of the examples is routed by a
    gate fitted to the other half: on the examples that it was fitted to a gate is nearly always
    right, and later gates would learn to rely on that.
    """

    def __init__(self, gate: MeteoraGate, shared: dict, own: bool):
        super().__init__()
        self.gate = gate
        self.shared = shared
        self.own = own

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of the adapters that the next gates shall see."""
        s = self.shared
        half = s["half"][sample]
        keep = s["keep"]
        if s.get("x") != (x.data_ptr(), x.shape):  # q, k and v get one tensor, and so do gate and up
            parts = [keep] if self.own else [keep, keep & (half == 1), keep & (half == 0)]
            e = self.gate.weight.shape[0]
            s["G"] = [logistic(x[part].float(), s["labels"][part], e, s["l2"]) for part in parts]
            s |= {"x": (x.data_ptr(), x.shape), "held": x, "count": s["count"] + 1}
        self.gate.weight.data = s["G"][0].clone()
        if self.own:
            return Mixture(s["labels"][:, None], torch.ones_like(x[:, :1], dtype=torch.float32))
        first = half[:, None] == 0
        a = MeteoraGate(s["G"][1], self.gate.k, self.gate.temperature)(x, sample, ax)
        b = MeteoraGate(s["G"][2], self.gate.k, self.gate.temperature)(x, sample, ax)
        idx = torch.where(first, a.idx, b.idx)
        return Mixture(idx, torch.where(first, a.weight, b.weight))


def fit_gates(model, pool: Pool, examples: list, args) -> dict[str, MeteoraGate]:
    """Fits each gate by logistic regression to its own inputs: one forward pass over steps *
    batch_size examples, all at once, and a small convex problem a Linear, no backward pass. own:
    every sequence runs through its own adapter, so that no gate depends on another. routed: the
    gates choose, each from when the pass has fitted it."""
    begin = time.perf_counter()
    gates = meteora_gates(pool, args.top_k, args.gate_temperature)
    device = model.head_weight.device
    picked = []
    for step in range(args.steps):
        picked += pick(examples, step, args)
    batch = collate(picked, device)
    labels = batch.slots(pool).clamp(min=0).flatten()
    rounds = torch.arange(len(batch.tasks), device=device) // len(examples)  # of all tasks
    shared = {"keep": batch.real.flatten(), "labels": labels, "half": rounds % 2}
    shared |= {"l2": args.l2, "count": 0}
    fitting = {path: FittingGate(gate, shared, args.fit == "own") for path, gate in gates.items()}
    attach(model, pool, fitting)
    with torch.no_grad():
        model.model(batch.ids)
    detach(model)
    n = int(batch.real.sum())
    print(f"fitted {shared['count']} classifiers for {len(gates)} gates on {n:,} tokens in "
          f"{time.perf_counter() - begin:.1f} s", file=sys.stderr)  # fmt: skip
    return gates


@torch.enable_grad()
def logistic(x: Tensor, labels: Tensor, e: int, l2: float, steps=50) -> Tensor:
    """Multinomial logistic regression without bias, by L-BFGS: x (n, i) float32, labels (n,) -> G
    (e, i).

    The inputs are whitened, the penalty acts on the weights of the whitened ones, and G is mapped
    back: few directions hold most of a residual stream's variance, and without that L-BFGS, as
    AdamW, stops far from the optimum (LOG.md).
    """
    whiten = whitening(x)
    G = torch.zeros(e, x.shape[1], device=x.device, requires_grad=True)
    x = x @ whiten
    optimizer = torch.optim.LBFGS([G], max_iter=steps, line_search_fn="strong_wolfe", history_size=10)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ G.T, labels) + l2 / 2 * G.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return G.detach() @ whiten.T


def whitening(x: Tensor) -> Tensor:
    """(i, i): x @ whitening(x) has nearly unit second moments; where x has none they stay small."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return vectors * (values.clamp(min=0) + 1e-3 * values.mean()).rsqrt()
