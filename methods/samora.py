"""SAMoRA (arXiv 2604.19048): a few experts for all tasks. They share one A; each has its own B and a key.

    h = A x,   g = softmax over j of  cos(h, c_j) / 0.8
    y = W x + sigmoid(e_t . w) * sum over j of  g_j B_j (S h)
    loss = LM + sum over Linears of  orthogonality * (mse(A A^T, I) + mean over j of mse(B_j^T B_j, I))
                                   + matching * mean over j of KL(softmax(n(b_j)) || softmax(n(c_j)))

c_j (r,) is the key of expert j, S (r, r) diagonal, e_t (8,) the vector of task t, w (8,) that of a Linear.
b_j is the mean of B_j's rows, n(v) = v / max(|v|, 1e-3). An unknown task has the mean e_t. Saved: A and B_j S.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import InputError
from common.locks import alone
from common.options import Above0, BatchSize, Count, NotNegative, Share, nearest
from common.tensors import read_metadata
from methods.protocol import Gated
from methods.session import Mole
from model import Llama
from moe_lora import AX, Mixture, attach
from pool.folder import PoolFolder, read_pool
from pool.gate_files import GateFile, save_gates
from pool.slots import Pool, alloc_B_of
from tasks.folders import Batch, Task, load_tasks
from training.adapters import LINEARS, NewAdaptersRun, begin, new_checkpoint, new_pool, save_adapters
from training.dropout import token_dropout
from training.gates import GatesTraining, picked_step
from training.loop import finished, fit, required
from training.losses import lm_losses


class SamoraGate(nn.Module):
    """weight_j = sigmoid(e_t . w) * softmax over j of cos(A x, c_j) / 0.8, for all e experts."""

    def __init__(self, keys: Tensor, n_tasks: int):
        super().__init__()
        self.keys = nn.Parameter(keys)  # c (e, r)
        self.of_task = nn.Parameter(keys.new_zeros(len(keys), n_tasks))  # e_t . w, the same for all experts
        self.logit = None  # e_t . w: (e,), or (n, 1) in training

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """ax() (n, e, r) -> Mixture of all e experts."""
        cosine = F.cosine_similarity(ax().float(), self.keys.float(), dim=-1)  # (n, e)
        idx = torch.arange(len(self.keys), device=x.device).expand_as(cosine)
        return Mixture(idx, self.logit.float().sigmoid() * (cosine / 0.8).softmax(-1))


class Samora(Gated):
    """The experts of POOL/baselines/samora, a pool folder of its own."""

    pattern = "samora(?:_known|:(.+))?"  # samora_known: eval.py tells it each task
    names = ("samora", "samora:TASK")
    about = "SAMoRA: a few experts for all tasks, with one A; samora:TASK is told the task"
    paper = "2604.19048"
    made_by = "train.py samora"
    has_task_adapter = True
    has_temperature = False
    key = ()

    def __init__(self, name: str, top_k=2, task: str | None = None):
        super().__init__(name, top_k)
        self.key = (name, None)  # its adapters aren't the pool's: it has a batch to itself
        self.task = task
        self.per_task = "samora:{}" if name == "samora_known" else ""
        self.answers_composites = not self.per_task

    def file(self, mole: Mole) -> Path:
        """POOL/baselines/samora/gates/samora.safetensors. Raises InputError where it isn't there."""
        file = mole.folder and mole.folder.path / "baselines" / "samora" / "gates" / "samora.safetensors"
        self.need(file, self.made_by)
        return file

    def check(self, mole: Mole) -> None:
        """Raises InputError where the file isn't there, or wasn't trained on the task."""
        known = read_metadata(self.file(mole)).get("tasks", "").split("\n")
        if self.task not in (None, *known):
            hint = nearest(self.task, known) or ", only on " + ", ".join(known)
            raise InputError(f"method {self.name}: not trained on {self.task!r}{hint}")

    def in_memory(self, mole: Mole, found: list, exclude: tuple) -> list[str]:
        """No names, as the experts aren't adapters of mole.pool."""
        return []

    def pool_of(self, mole: Mole) -> Pool:
        """A pool of the experts that the file names."""
        file = self.file(mole)
        names = read_metadata(file).get("names", "").split("\n")
        folders = {name: file.parents[1] / "adapters" / name for name in names}
        return Pool.load(folders, mole.shapes, mole.dtype, mole.device, alloc_B=alloc_B_of(mole.model))

    def gates(self, mole: Mole, pool: Pool, temperature: float, exclude: tuple) -> dict[str, nn.Module]:
        """The file's gates. Raises InputError for those of another base or of other experts."""
        rows = GateFile(self.file(mole), pool, mole.model.fingerprint(), (), self.made_by)
        tasks = rows.metadata.get("tasks", "").split("\n")
        gates = {path: SamoraGate(A.new_zeros(A.shape[:2]), len(tasks)) for path, A in pool.A.items()}
        for gate in rows.fill(gates, mole.dtype).values():
            gate.logit = gate.of_task[:, tasks.index(self.task)] if self.task else gate.of_task.mean(1)
        return gates


@dataclass
class SamoraRun(NewAdaptersRun):
    """Options of `train.py samora`."""

    target: list[str] = field(default_factory=lambda: list(LINEARS[:4]))  # Linears to adapt; repeatable
    alpha: Above0 = 8.0  # scale is alpha / r, which is 1 as released
    experts: Count = 3  # number of experts, which all tasks share
    orthogonality: NotNegative = 1e-3  # weight of the loss that makes A A^T and B_j^T B_j the identity
    matching: NotNegative = 1e-2  # weight of the loss that makes keys like their experts
    unknown: Share = 0.5  # share of examples that are trained as if their task were unknown
    w_start: NotNegative = 0.0  # standard deviation of w at the start; with 0 all tasks start alike
    batch_size: BatchSize = 16  # examples a step, of all tasks in turn
    lr: NotNegative = 2e-4  # peak learning rate


class SamoraTraining(GatesTraining):
    """The experts' loss. `params` {name: tensor}: what is trained, with one A (1, r, i) a Linear."""

    def __init__(self, model: Llama, pool: Pool, tasks: list[str], args: SamoraRun):
        super().__init__(model.train(), pool, {}, args)
        generator = torch.Generator().manual_seed(args.seed)
        self.tasks = tasks
        self.params = {"e_t": torch.randn(len(tasks), 8, generator=generator).to(model.head_weight.device)}
        for path, A in pool.A.items():
            w = torch.randn(8, 1, generator=generator).to(A.device) * args.w_start
            keys = torch.randn(args.experts, args.r, generator=generator)
            gate = self.gates[path] = SamoraGate(keys.to(A.device), len(tasks))
            new = (A[:1].clone(), pool.B[path], A.new_ones(args.r), w, gate.keys)
            self.params |= zip([f"{path}.{letter}" for letter in "ABSwc"], new, strict=True)
        self.linears = attach(model, pool, self.gates, dropout=token_dropout(pool, args.dropout))

    def loss(self, batch: Batch, n: int, n_response: int) -> tuple[Tensor, dict[str, float]]:
        """See GatesTraining; `unknown` of the examples get the mean of e_t."""
        vectors = torch.cat([self.params["e_t"], self.params["e_t"].mean(0, True)])  # (tasks + 1, 8)
        row = torch.tensor([self.tasks.index(task) for task in batch.tasks])
        row[batch.random_of_parts("unknown") < self.args.unknown] = -1  # the mean
        e_t = vectors[row][batch.part[batch.real]]  # (n, 8)
        penalties = 0
        for path, linear in self.linears.items():
            A, B, S, w, c = (self.params[f"{path}.{name}"] for name in "ABSwc")
            linear.A = A.expand(len(B), -1, -1)
            linear.B = B * S
            linear.gate.logit = e_t @ w  # (n, 1)
            penalties = penalties + penalties_of(A, B, c) * batch.real.sum() / n
        lm_loss = lm_losses(self.model, batch).sum() / n_response
        loss = lm_loss + self.args.orthogonality * penalties[0] + self.args.matching * penalties[1]
        logged = {"lm_loss": lm_loss, "orthogonality": penalties[0], "matching": penalties[1]}
        return loss, {name: value.item() for name, value in logged.items()}

    def finish(self) -> Pool:
        """The pool with the trained A and B S; the gates get e_t . w of each task."""
        for path, gate in self.gates.items():
            A, B, S, w, _ = (self.params[f"{path}.{name}"] for name in "ABSwc")
            self.pool.A[path].copy_(A.expand(len(B), -1, -1))
            B.mul_(S)  # in place: B is the pool's tensor
            gate.of_task.data = (self.params["e_t"] @ w).T.expand(len(B), -1)  # (e, tasks)
        return self.pool


def penalties_of(A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    """A (1, r, i), B (e, o, r), c (e, r) -> (2,): the orthogonality and the matching of one Linear."""
    gram = torch.cat([A @ A.mT, B.mT @ B])  # (1 + e, r, r)
    errors = (gram - torch.eye(c.shape[1], device=c.device)).square().mean((1, 2))
    b, c = (F.normalize(v, dim=-1, eps=1e-3).log_softmax(-1) for v in (B.mean(1), c))  # (e, r)
    matching = F.kl_div(c, b, reduction="batchmean", log_target=True)  # KL(b || c)
    return torch.stack([errors[0] + errors[1:].mean(), matching])


def train_samora(args: SamoraRun) -> None:
    """Trains the experts and writes POOL/baselines/samora. Raises InputError where POOL is no pool."""
    if args.compile:
        raise InputError("--compile: SAMoRA trains uncompiled: leave it out")
    tasks = load_tasks(required(args, "tasks"), args.only)
    known = read_pool(required(args, "pool"))
    run = known.path / "runs" / "samora"
    with alone(run):
        model, _, examples = begin(tasks, known, args)
        checkpoint = new_checkpoint(run, model, tasks, examples, args)
        if checkpoint.finished:
            return finished(checkpoint)
        rows = [row for task in tasks.values() for row in task.train]
        learners = [Task(f"expert_{j + 1}", "", rows, []) for j in range(args.experts)]
        training = SamoraTraining(model, new_pool(model, learners, args), list(tasks), args)
        fit(checkpoint, training.params, args, lambda step: picked_step(training, examples, step))
        home = PoolFolder(known.path / "baselines" / "samora", {}, template=known.template)
        pool = training.finish()
        files = save_adapters(pool, pool.names, model, home, args)
        pool = Pool.load({name: home.path / "adapters" / name for name in pool.names}, pool.shapes)
        file = home.path / "gates" / "samora.safetensors"
        about = {"tasks": "\n".join(tasks)}
        save_gates(file, training.gates, pool, args.experts, pool.names, model.fingerprint(), about)
        checkpoint.finish(home.path, [*files, file])
