"""DR-LoRA (arXiv 2601.04823): adapters train with their gates, and ranks grow where they are used and matter.

    score_j = f_j g_j / (r_j + 1)^1.2
    f_j     = moving average of adapter j's mean weight in this Linear
    g_j     = moving average of the sum of |p dL/dp| over the numbers p of A_j and B_j

At each growth a Linear shares out a part of e (target_r - r) ranks. In order of falling score each adapter
takes a tenth of its free ranks, at least one, until the part is spent. Then g_j of those that grew is set to
0. The loss doesn't jump: new columns of B_j are zero, and the old ones are multiplied by new r_j / old r_j.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.files import InputError
from common.locks import alone
from common.options import BatchSize, Count, NotNegative, Rank, Share
from methods.protocol import TrainedGates
from methods.session import Mole
from moe_lora import Recorder, attach, meteora_gates
from parallel.processes import add_up
from pool.gate_files import parameters_of, save_gates
from pool.slots import Pool
from pool.stacks import cut_to_ranks
from tasks.folders import Batch, load_tasks, pick
from training.adapters import (
    NewAdaptersRun,
    begin,
    check_new_adapters,
    new_checkpoint,
    new_pool,
    pool_params,
    pool_to_write,
    save_adapters,
)
from training.adapters_help import Examples
from training.dropout import token_dropout
from training.gates import GateTermTraining, picked_step
from training.loop import compile_for, finished, fit, required


class DRLoRA(TrainedGates):
    """MeteoRA's top-k gates over the adapters that were trained with them."""

    pattern = "drlora"
    names = ("drlora",)
    about = "DR-LoRA: adapters and gates trained together, ranks that grow where they are used"
    paper = "2601.04823"
    made_by = "train.py drlora"
    uses_top_k = True
    gates_know_tasks = True
    new_gates = staticmethod(meteora_gates)

    @classmethod
    def default(cls, mole: Mole, k: int, k_asked: bool) -> tuple[str, str] | None:
        """drlora where the pool has its gates, unless a k is asked for: theirs is in the file."""
        file = cls("drlora").file(mole)
        found = file and file.exists() and not k_asked
        return ("drlora", f"trained with their gates, gates/{file.name}") if found else None


@dataclass
class DRLoRARun(NewAdaptersRun):
    """Options of `train.py drlora`."""

    r: Rank = 4  # rank at the start
    target_r: Rank = 8  # mean rank at the end
    max_r: Rank = 16  # largest rank
    grow_every: Count = 10  # steps from one growth of ranks to the next, after --warmup
    cooldown: Share = 0.2  # share of the steps, at the end, in which no rank grows
    top_k: Count = 2  # adapters a token uses
    beta: NotNegative = 1.0  # weight of the gate term
    gate_lr: NotNegative = 7e-3  # peak learning rate of the gates
    batch_size: BatchSize = 16  # examples a step, of all tasks in turn


def check_drlora_options(args: DRLoRARun) -> None:
    """Raises InputError unless r <= target_r <= max_r, and where no growth fits into the steps."""
    check_new_adapters(args)
    if not args.r <= args.target_r <= args.max_r:
        raise InputError(f"--target_r is {args.target_r}, expected --r {args.r} to --max_r {args.max_r}")
    if args.r < args.target_r and not growth_steps(args):
        raise InputError(f"--grow_every is {args.grow_every}: no growth fits into --steps {args.steps}")


def growth_steps(args: DRLoRARun) -> range:
    """The steps, counted from 0, after whose backward pass ranks grow."""
    first = round(args.warmup * args.steps) + args.grow_every - 1
    return range(first, args.steps - round(args.cooldown * args.steps), args.grow_every)


def share_out(scores: list[float], ranks: list[int], budget: int, max_r: int) -> list[int]:
    """Scores (e) and ranks (e) of a Linear -> its ranks, at most `max_r`, after `budget` more are shared."""
    ranks = list(ranks)
    order = sorted(range(len(ranks)), key=lambda j: -scores[j])
    while budget:
        for j in order:
            free = max_r - ranks[j]
            more = min(max(1, free // 10), free, budget)
            ranks[j] += more
            budget -= more
    return ranks


class DRLoRATraining(GateTermTraining):
    """Trains adapters and gates by MeteoRA's loss. The stacks have max_r ranks, and A is random in all of
    them. Beyond an adapter's rank B is zero and its gradient is cleared, so A gets no gradient either."""

    lm_weight = 1.0
    adapters_train = True

    def __init__(self, model, pool: Pool, examples: Examples, args: DRLoRARun):
        super().__init__(model.train(), pool, meteora_gates(pool, args.top_k), args)
        attach(model, pool, self.gates, dropout=token_dropout(pool, args.dropout))
        self.examples = examples
        longest = max(len(example.ids) for some in examples.values() for example in some)
        self.recorder = Recorder(model, max(longest, min(args.micro_tokens, longest * args.batch_size)))
        zeros = torch.zeros(3, len(pool.A), pool.capacity, device=model.head_weight.device)
        self.used, self.f, self.g = zeros  # each (m, e)
        self.ranks = torch.full_like(self.used, args.r, dtype=torch.int64)

    def step(self, step: int) -> dict[str, float]:
        """Forward and backward of one step -> the values to log."""
        self.used.zero_()
        self.set_scale()  # anew, as a checkpoint may have set the ranks
        with self.recorder:
            return picked_step(self, self.examples, step)

    def set_scale(self) -> None:
        """Sets the pool's scale to alpha / rank."""
        for scale, ranks in zip(self.pool.scale.values(), self.ranks, strict=True):
            scale.copy_(self.args.alpha / ranks)

    def loss(self, batch: Batch, n: int, n_response: int) -> tuple[torch.Tensor, dict[str, float]]:
        """See GatesTraining; adds to `used` this part's share of the step's mean weights (m, e)."""
        found = super().loss(batch, n, n_response)
        self.used += self.recorder.read(sum(batch.lengths)).sum(1) / n
        return found

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Updates f and g, grows ranks if `step` is one for it, and keeps B zero beyond the ranks."""
        sums = []
        for A, B in zip(self.pool.A.values(), self.pool.B.values(), strict=True):
            sums.append((A * A.grad).abs().sum((1, 2)) + (B * B.grad).abs().sum((1, 2)))
        add_up([self.used])
        self.f.lerp_(self.used, 0.1)
        self.g.lerp_(torch.stack(sums), 0.1)
        if step in (steps := growth_steps(self.args)):
            self.grow(steps.index(step), len(steps))
        active = torch.arange(self.args.max_r, device=self.ranks.device) < self.ranks[..., None, None]
        for B, columns in zip(self.pool.B.values(), active, strict=True):
            B.grad.mul_(columns)  # (e, 1, r)

    def grow(self, event: int, events: int) -> None:
        """Growth `event`, from 0, of `events`. Where B is multiplied by a factor, its gradient is divided
        by it. AdamW's moments stay: for some steps they mix gradients of both scales."""
        total = self.pool.capacity * (self.args.target_r - self.args.r)
        budget = total * (event + 1) // events - total * event // events
        scores = self.f * self.g / (self.ranks + 1) ** 1.2  # (m, e)
        rows = zip(scores.tolist(), self.ranks.tolist(), strict=True)
        new = [share_out(*row, budget, self.args.max_r) for row in rows]
        factors = torch.tensor(new, device=self.ranks.device) / self.ranks
        for B, factor in zip(self.pool.B.values(), factors[..., None, None], strict=True):
            B.mul_(factor)
            B.grad.div_(factor)
        self.g[factors > 1] = 0
        self.ranks.copy_(torch.tensor(new))


def train_drlora(args: DRLoRARun) -> None:
    """Writes POOL/adapters/NAME and POOL/gates/drlora.safetensors. Raises InputError where POOL has others."""
    tasks = load_tasks(required(args, "tasks"), args.only)
    folder = Path(required(args, "pool"))
    run = folder / "runs" / "drlora"
    if args.top_k > len(tasks):
        raise InputError(f"--top_k is {args.top_k}, expected 1 to {len(tasks)}, the tasks of {args.tasks}")
    known = pool_to_write(folder, run)
    with alone(run):
        model, _, examples = begin(tasks, known, args)
        checkpoint = new_checkpoint(run, model, tasks, examples, args)
        if checkpoint.finished:
            return finished(checkpoint)
        pool = new_pool(model, list(tasks.values()), replace(args, r=args.max_r))
        training = DRLoRATraining(model, pool, examples, args)
        checkpoint.kept = {"ranks": training.ranks, "f": training.f, "g": training.g}
        gates = parameters_of(training.gates, pool.capacity)
        params = pool_params(pool) | gates
        rates = dict.fromkeys(gates, args.gate_lr / args.lr if args.lr else 0.0)
        compile_for(model, args, pick(examples, 0, args))
        fit(checkpoint, params, args, training.step, rates=rates, after_backward=training.after_backward)
        training.set_scale()
        adapters = cut_to_ranks(pool, training.ranks)
        files = save_adapters(Pool.of(adapters, pool.shapes), tasks, model, known, args)
        saved = Pool.load({name: folder / "adapters" / name for name in tasks}, pool.shapes)
        file = folder / "gates" / "drlora.safetensors"
        save_gates(file, training.gates, saved, args.top_k, saved.names, model.fingerprint())
        checkpoint.finish(f"{file}, and the adapters in {folder / 'adapters'}", [*files, file])
