"""The training loop that base, adapters and gates share: optimizer, warmup and cosine, clipping,
logs, checkpoints.

Every step is a pure function of the seed, the step and the weights; a checkpoint holds weights,
optimizer and RNG, so a resumed run goes on bit for bit as if nothing had happened, whenever it was
killed (on a GPU, whose sums have no fixed order, up to rounding).
"""

import csv
import io
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common.files import (
    InputError,
    read_json,
    read_safetensors,
    read_text,
    warn,
    write_json,
    write_safetensors,
    write_text,
)
from common.options import Count, NotNegative, Seed
from pool.load import compile_blocks

BLOCK = 2048  # vocabulary entries at a time: their logits and weights stay in the caches


@dataclass
class Run:
    """Options that all runs of gradient steps share."""

    model: str  # model folder
    steps: Count = 300  # optimizer steps
    batch_size: Count = 8  # examples a step: of each adapter (adapters), of all tasks (gates), windows (base)
    micro_tokens: Count = 4096  # tokens in one forward; a step of more accumulates gradients
    lr: NotNegative = 1e-3  # peak learning rate
    warmup: NotNegative = (
        0.05  # share of the steps that the learning rate climbs, then a cosine down to a tenth
    )
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices, evens out the directions of a step
    weight_decay: NotNegative = 0.0  # the optimizer's
    clip: NotNegative = 1.0  # largest gradient norm, 0 = no clipping
    seed: Seed = 0  # of weights, dropout and data order
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    compile: bool | None = (
        None  # the blocks, by torch.compile; default where the run is long enough to pay for it
    )
    save_every: Count = 50  # steps between checkpoints
    resume: bool = False  # go on where a killed run stopped
    tensorboard: bool = False  # also log to tensorboard, in the run's folder


def required(args, name):
    """The option's value. Raises InputError where it was not given."""
    if not getattr(args, name):
        raise InputError(f"--{name} is missing")
    return getattr(args, name)


def finished(checkpoint):
    """Says that there is nothing left to do."""
    print(f"{checkpoint.folder}: finished already", file=sys.stderr)


def compile_for(model, args, examples):
    """Compiles the model's blocks where that is asked for or, --compile left out, where it saves
    more than the minute that it may take: about 4e-12 seconds a parameter and token (SmolLM2-135M,
    LOG.md). `examples`: those of a step."""
    tokens = args.steps * sum(len(example.ids) for example in examples)
    compile_blocks(
        model, args.compile, saves=tokens * sum(p.numel() for p in model.parameters()) * 4e-12, costs=60
    )


def learning_rate(step, args):
    """Linear warmup, then a cosine to a tenth of the peak."""
    warm = max(1, round(args.warmup * args.steps))
    if step < warm:
        return args.lr * (step + 1) / warm
    progress = (step - warm) / max(1, args.steps - warm)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class BlockwiseCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden states (n, h) under a frozen head W (v, h), and its gradient, a block
    of the vocabulary at a time, as flash attention does: no (n, v) logits, and each weight of the
    head is read once. `linear` computes x W^T. Target and rest are kept apart: of a token that is
    nearly certain the gradient is a small difference, which rounding would swallow."""

    @staticmethod
    def forward(ctx, hidden, W, targets, linear):
        """hidden (n, h), W (v, h), targets (n,) -> losses (n,), float32."""
        own = W[targets].float()  # (n, h)
        logit = (hidden.float() * own).sum(-1, True)  # (n, 1), the target's
        top = logit
        rest = torch.zeros_like(logit)
        pull = torch.zeros_like(own)
        for first, block in zip(range(0, len(W), BLOCK), W.split(BLOCK), strict=True):
            logits = linear(hidden, block).float()  # (n, BLOCK)
            words = torch.arange(first, first + len(block), device=W.device)
            logits.masked_fill_(words == targets[:, None], float("-inf"))
            highest = torch.maximum(top, logits.amax(-1, True))
            kept = (top - highest).exp()
            p = logits.sub_(highest).exp_()
            rest = rest * kept + p.sum(-1, True)
            top = highest
            pull = pull * kept + linear(p.to(W.dtype), block.T)  # the other words' weights, each by its p
        total = rest + (logit - top).exp()
        ctx.save_for_backward(((pull - rest * own) / total).to(hidden.dtype))
        return (total.log() + top - logit)[:, 0]

    @staticmethod
    def backward(ctx, grad):
        """The gradient of `hidden` alone, computed with the losses."""
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None


def hidden_states(model, batch, padded=False):
    """(n, h) of the tokens before a response's, in the order of batch.predicts. Blocks compute real
    tokens alone, but for what needs rows that are `padded` to one length."""
    if padded:
        return model.model(batch.ids)[batch.predicts]
    return model.model(batch.ids[batch.real][None], lengths=batch.lengths)[0, batch.predicts[batch.real]]


def lm_losses(model, batch, padded=False):
    """Cross-entropy of each response token: the head sees only those positions."""
    hidden = hidden_states(model, batch, padded)
    targets = batch.ids.roll(-1, 1)[batch.predicts]
    return BlockwiseCrossEntropy.apply(hidden, model.head_weight, targets, model.linear)


def clip_norm(params, limit):
    """Scales all gradients so that their joint norm is at most `limit`; returns the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(params, limit or math.inf))


NOT_THE_RUN = ("resume", "save_every", "tensorboard", "device")  # options that may differ where a run goes on


class Checkpoint:
    """RUN/checkpoint.safetensors: step, trained tensors, optimizer's state, RNG; config.json and
    log.csv beside it.

    A finished run leaves config.json with "finished": true and no checkpoint.
    """

    def __init__(self, folder, options, names=()):
        """`names`: the tasks, base and adapters of the run; with the options they say which run it
        is."""
        self.folder = Path(folder)
        self.file = Path(folder) / "checkpoint.safetensors"
        self.config = {k: v for k, v in asdict(options).items() if k not in NOT_THE_RUN}
        self.config["names"] = list(names)
        known = self.folder / "config.json"
        self.step = 0
        self.finished = False
        self.rows = []
        if (
            known.exists()
        ):  # without a checkpoint, of a run that never came that far, there is nothing to lose
            known = read_json(known)
            if known.get("finished") or self.file.exists():
                self._check_known(known, options.resume)

    def _check_known(self, known, resume):
        """A run is here already: go on with it, or refuse to overwrite it."""
        finished = known.pop("finished", False)
        if finished:  # killed before finish() could
            self.file.unlink(missing_ok=True)
        if not resume and not finished:
            raise InputError(
                f"{self.folder}: an unfinished run is here: go on with --resume, or remove the folder"
            )
        if not resume:
            return warn(f"{self.folder}: a finished run is here: training again replaces what it wrote")
        differ = [f"{k} was {known.get(k)!r}, now {v!r}" for k, v in self.config.items() if known.get(k) != v]
        if differ:
            raise InputError(
                f"{self.folder / 'config.json'}: can't resume with other options: {'; '.join(differ)}"
            )
        self.finished = finished

    def write_config(self, finished):
        """Writes RUN/config.json."""
        write_json(self.folder / "config.json", self.config | {"finished": finished})

    def load(self, params, optimizers):
        """Restores the run's state into `params` {name: tensor} and `optimizers`, where there is
        one to restore."""
        if not self.file.exists():
            return
        tensors, metadata = read_safetensors(self.file)
        self.step = int(metadata["step"])
        for name, param in params.items():
            param.data.copy_(tensors[f"param.{name}"])
        for name, param, state in states(params, optimizers):
            parts = (key.partition(".") for key in tensors)
            kinds = [kind for kind, _, rest in parts if rest == name and kind != "param"]
            places = {kind: "cpu" if kind == "step" else param.device for kind in kinds}  # as torch has them
            state[param] = {
                kind: tensors[f"{kind}.{name}"].to(place, copy=True) for kind, place in places.items()
            }
        torch.set_rng_state(tensors["rng"].clone())
        if "cuda_rng" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda_rng"].clone())
        if (self.folder / "log.csv").exists():
            rows = list(csv.reader(io.StringIO(read_text(self.folder / "log.csv"))))
            self.rows = [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= self.step]

    def save(self, step, params, optimizers):
        """Writes RUN/checkpoint.safetensors after `step` steps."""
        tensors = {"rng": torch.get_rng_state()} | {
            f"param.{name}": param.data for name, param in params.items()
        }
        if torch.cuda.is_initialized():
            tensors["cuda_rng"] = torch.cuda.get_rng_state()
        for name, param, state in states(params, optimizers):
            tensors |= {f"{kind}.{name}": value for kind, value in state[param].items()}
        write_safetensors(self.file, tensors, {"step": str(step)})

    def finish(self, written):
        """Marks the run as finished and says what it wrote."""
        self.write_config(finished=True)
        self.file.unlink(missing_ok=True)
        print(f"wrote {written}", file=sys.stderr)


def states(params, optimizers):
    """(name, parameter, the state of the optimizer that it belongs to), for each parameter."""
    names = {param: name for name, param in params.items()}
    for optimizer in optimizers:
        yield from (
            (names[p], p, optimizer.state) for group in optimizer.param_groups for p in group["params"]
        )


def make_optimizers(params, args, rates):
    """AdamW for all, or Muon for the matrices and AdamW for the rest; {name: factor} `rates` of the
    learning rate.

    Muon gives all singular vectors of a step the same length. It is scaled to the length of AdamW's
    steps, so that one learning rate serves both.
    """
    muon = {}  # {rate: parameters}
    adamw = {}
    for name, param in params.items():
        matrix = param.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))
        groups = muon if args.optimizer == "muon" and matrix else adamw
        groups.setdefault(rates.get(name, 1.0), []).append(param)
    muon, adamw = (
        [{"params": some, "rate": rate} for rate, some in groups.items()] for groups in (muon, adamw)
    )
    made = (
        [torch.optim.Muon(muon, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")]
        if muon
        else []
    )
    return made + (
        [torch.optim.AdamW(adamw, betas=(0.9, 0.95), weight_decay=args.weight_decay)] if adamw else []
    )


def fit(checkpoint, params, args, step_loss, clip=clip_norm, rates=None):
    """Trains `params` {name: float32 tensor}: step_loss(step) runs the backward passes and returns
    what to log.

    Writes log.csv (step, learning rate, gradient norm, and what step_loss returns) and checkpoints
    as it goes. `rates` {name: factor} gives some params another learning rate.
    """
    checkpoint.write_config(finished=False)
    torch.manual_seed(args.seed)
    for param in params.values():
        param.requires_grad_(True)
    optimizers = make_optimizers(params, args, rates or {})
    checkpoint.load(params, optimizers)
    board = _tensorboard(checkpoint.folder) if args.tensorboard else None
    rows = checkpoint.rows
    header = None
    bar = tqdm(
        range(checkpoint.step, args.steps),
        initial=checkpoint.step,
        total=args.steps,
        file=sys.stderr,
        mininterval=1,
    )
    try:
        for step in bar:
            for param in params.values():
                param.grad = None
            logged = step_loss(step)
            norm = clip(list(params.values()), args.clip)
            if not math.isfinite(norm):
                raise InputError(
                    f"step {step + 1}: the gradient is not finite: lower --lr (now {args.lr}), or use float32"
                )
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * learning_rate(step, args)
                optimizer.step()
            logged = {"step": step + 1, "lr": learning_rate(step, args), "norm": norm, **logged}
            header = list(logged)
            rows.append([f"{value:.6g}" for value in logged.values()])
            bar.set_postfix(
                {name: f"{value:.3g}" for name, value in logged.items() if name not in ("step", "lr")}
            )
            if board:
                for name, value in logged.items():
                    board.add_scalar(name, value, step + 1)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                # The log first: rows beyond the checkpoint are dropped on resuming, missing ones
                # would stay missing.
                write_text(
                    checkpoint.folder / "log.csv", "".join(",".join(row) + "\n" for row in [header, *rows])
                )
                checkpoint.save(step + 1, params, optimizers)
    except KeyboardInterrupt:
        bar.close()
        where = "the last checkpoint" if checkpoint.file.exists() else "the start: there is no checkpoint yet"
        warn(f"stopped; --resume goes on from {where}")
        raise
    for param in params.values():
        param.requires_grad_(False)


def _tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs a package that is not here: pip install tensorboard") from None
    return SummaryWriter(folder)
