"""The training loop of all trainers: optimizer, warmup and cosine, clipping, log, checkpoints.

Every step is a pure function of the seed, the step and the weights. A checkpoint holds weights,
optimizer and RNG, so a resumed run ends with the same bits as one that was never interrupted. On a
GPU, which adds in no fixed order, the two are equal up to rounding.
"""

import csv
import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator
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
from model import Llama
from pool.load import compile_blocks
from tasks.folders import Batch, Example

BLOCK = 2048  # vocabulary entries at a time, so that their logits and weights stay in the caches


@dataclass
class Run:
    """Options that all runs of gradient steps share."""

    model: str  # model folder
    steps: Count = 300  # optimizer steps
    batch_size: Count = 8  # examples a step: of each adapter (adapters), in all (gates), windows
    micro_tokens: Count = 4096  # tokens in one forward; a larger step accumulates gradients
    lr: NotNegative = 1e-3  # peak learning rate
    warmup: NotNegative = 0.05  # share of the steps in which lr rises; then a cosine to a tenth
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: evens out a matrix's directions
    weight_decay: NotNegative = 0.0  # the optimizer's weight decay
    clip: NotNegative = 1.0  # largest gradient norm, 0 = no clipping
    seed: Seed = 0  # seed for weights, dropout and data order
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    compile: bool | None = None  # torch.compile each block; default: where a long run pays for it
    save_every: Count = 50  # steps between checkpoints
    resume: bool = False  # continue a run that was killed
    tensorboard: bool = False  # also log to tensorboard, in the run's folder


def required(args, name: str) -> str:
    """The option's value. Raises InputError where it was not given."""
    if not getattr(args, name):
        raise InputError(f"--{name} is missing")
    return getattr(args, name)


def finished(checkpoint: "Checkpoint") -> None:
    """Says that there is nothing left to do."""
    print(f"{checkpoint.folder}: finished already", file=sys.stderr)


def compile_for(model: Llama, args: Run, examples: list[Example]) -> None:
    """Compiles the model's blocks if --compile says so or, by default, if that saves time.

    Compiling may take a minute and saves about 4e-12 seconds a parameter and token (SmolLM2-135M,
    LOG.md). `examples` are those of one step.
    """
    tokens = args.steps * sum(len(example.ids) for example in examples)
    parameters = sum(param.numel() for param in model.parameters())
    compile_blocks(model, args.compile, saves=tokens * parameters * 4e-12, costs=60)


def learning_rate(step: int, args: Run) -> float:
    """Linear warmup, then a cosine to a tenth of the peak."""
    warm = max(1, round(args.warmup * args.steps))
    if step < warm:
        return args.lr * (step + 1) / warm
    progress = (step - warm) / max(1, args.steps - warm)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class BlockwiseCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden states (n, h) under a frozen head W (v, h), and its gradient.

    It goes through the vocabulary block by block, as flash attention goes through keys: there are
    no (n, v) logits, and each weight of the head is read once. `linear` computes x W^T. The target
    is kept apart from the other entries: where the model is nearly certain of it, the gradient is
    a small difference, which rounding would swallow.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, W: torch.Tensor, targets: torch.Tensor, linear: Callable
    ) -> torch.Tensor:
        """hidden (n, h), W (v, h), targets (n,) -> losses (n,), float32."""
        W_target = W[targets].float()  # (n, h)
        logit = (hidden.float() * W_target).sum(-1, True)  # (n, 1), the target's
        top = logit  # the highest so far
        rest = torch.zeros_like(logit)  # sum over the other entries of p = exp(their logit - top)
        W_rest = torch.zeros_like(W_target)  # sum of their rows of W, each times its p
        for first, block in zip(range(0, len(W), BLOCK), W.split(BLOCK), strict=True):
            logits = linear(hidden, block).float()  # (n, BLOCK)
            entries = torch.arange(first, first + len(block), device=W.device)
            logits.masked_fill_(entries == targets[:, None], float("-inf"))
            highest = torch.maximum(top, logits.amax(-1, True))
            rescale = (top - highest).exp()
            p = logits.sub_(highest).exp_()
            rest = rest * rescale + p.sum(-1, True)
            W_rest = W_rest * rescale + linear(p.to(W.dtype), block.T)
            top = highest
        total = rest + (logit - top).exp()
        ctx.save_for_backward(((W_rest - rest * W_target) / total).to(hidden.dtype))
        return (total.log() + top - logit)[:, 0]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient of `hidden` alone, which forward computed with the losses."""
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None


def hidden_states(model: Llama, batch: Batch, padded: bool = False) -> torch.Tensor:
    """(n, h) of the tokens before a response's tokens, in the order of batch.predicts.

    The sequences are packed, so no padding is computed; `padded` rows are for gates that need them.
    """
    if padded:
        return model.model(batch.ids)[batch.predicts]
    hidden = model.model(batch.ids[batch.real][None], lengths=batch.lengths)  # (1, n, h)
    return hidden[0, batch.predicts[batch.real]]


def lm_losses(model: Llama, batch: Batch, padded: bool = False) -> torch.Tensor:
    """Cross-entropy of each response token: the head sees only those positions."""
    hidden = hidden_states(model, batch, padded)
    targets = batch.ids.roll(-1, 1)[batch.predicts]
    return BlockwiseCrossEntropy.apply(hidden, model.head_weight, targets, model.linear)


def clip_norm(params: list[torch.Tensor], limit: float) -> float:
    """Scales all gradients so that their joint norm is at most `limit`; returns the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(params, limit or math.inf))


NOT_THE_RUN = ("resume", "save_every", "tensorboard", "device")  # may differ on resuming
Params = dict[str, torch.Tensor]  # {name: trained tensor}
Optimizers = list[torch.optim.Optimizer]


class Checkpoint:
    """RUN/checkpoint.safetensors: step, trained tensors, optimizer state, RNG.

    config.json and log.csv lie beside it. A finished run leaves config.json with "finished": true
    and no checkpoint.
    """

    def __init__(self, folder: Path | str, args: Run, names: Iterable[str] = ()):
        """`names`: tasks, base and adapters; with the options they say which run it is."""
        self.folder = Path(folder)
        self.file = self.folder / "checkpoint.safetensors"
        self.config = {k: v for k, v in asdict(args).items() if k not in NOT_THE_RUN}
        self.config["names"] = list(names)
        self.step = 0
        self.finished = False
        self.rows = []
        file = self.folder / "config.json"
        if file.exists():
            known = read_json(file)
            if known.get("finished") or self.file.exists():  # else there is nothing to lose
                self._check_known(known, args.resume)

    def _check_known(self, known, resume):
        """A run is here already: resume it, or refuse to overwrite it."""
        finished = known.pop("finished", False)
        if finished:  # killed before finish() could remove it
            self.file.unlink(missing_ok=True)
        if not resume and not finished:
            message = "an unfinished run is here: go on with --resume, or remove the folder"
            raise InputError(f"{self.folder}: {message}")
        if not resume:
            return warn(f"{self.folder}: a finished run is here: training again replaces what it wrote")
        differ = []
        for name, value in self.config.items():
            if known.get(name) != value:
                differ.append(f"{name} was {known.get(name)!r}, now {value!r}")
        if differ:
            file = self.folder / "config.json"
            raise InputError(f"{file}: can't resume with other options: {'; '.join(differ)}")
        self.finished = finished

    def write_config(self, finished: bool) -> None:
        """Writes RUN/config.json."""
        write_json(self.folder / "config.json", self.config | {"finished": finished})

    def load(self, params: Params, optimizers: Optimizers) -> None:
        """Restores the run's state, if there is one, into `params` and `optimizers`."""
        if not self.file.exists():
            return
        tensors, metadata = read_safetensors(self.file)
        self.step = int(metadata["step"])
        by_param = {}  # {name of a parameter: {"param" or a part of its optimizer state: tensor}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            by_param.setdefault(name, {})[kind] = tensor
        for name, param in params.items():
            param.data.copy_(by_param[name].pop("param"))
        for name, param, state in states(params, optimizers):
            state[param] = {}
            for kind, tensor in by_param[name].items():
                place = "cpu" if kind == "step" else param.device  # where torch has them
                state[param][kind] = tensor.to(place, copy=True)
        torch.set_rng_state(tensors["rng"].clone())
        if "cuda_rng" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda_rng"].clone())
        if (self.folder / "log.csv").exists():
            rows = list(csv.reader(io.StringIO(read_text(self.folder / "log.csv"))))
            for row in rows[1:]:
                if row and row[0].isdigit() and int(row[0]) <= self.step:
                    self.rows.append(row)

    def save(self, step: int, params: Params, optimizers: Optimizers) -> None:
        """Writes RUN/checkpoint.safetensors after `step` steps."""
        tensors = {"rng": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            tensors["cuda_rng"] = torch.cuda.get_rng_state()
        for name, param in params.items():
            tensors[f"param.{name}"] = param.data
        for name, param, state in states(params, optimizers):
            for kind, value in state[param].items():
                tensors[f"{kind}.{name}"] = value
        write_safetensors(self.file, tensors, {"step": str(step)})

    def finish(self, written: Path | str) -> None:
        """Marks the run as finished and says what it wrote."""
        self.write_config(finished=True)
        self.file.unlink(missing_ok=True)
        print(f"wrote {written}", file=sys.stderr)


def states(params: Params, optimizers: Optimizers) -> Iterator[tuple]:
    """(name, parameter, state of its optimizer) of each parameter."""
    names = {param: name for name, param in params.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                yield names[param], param, optimizer.state


def make_optimizers(params: Params, args: Run, rates: dict[str, float]) -> Optimizers:
    """AdamW for all, or Muon for the matrices and AdamW for the rest.

    `rates` {name: factor} multiply the learning rate. Muon gives all singular vectors of a step the
    same length. It is scaled to the length of AdamW's steps, so that one learning rate serves both.
    """
    muon = {}  # {rate: group of parameters}
    adamw = {}
    for name, param in params.items():
        matrix = param.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))
        groups = muon if args.optimizer == "muon" and matrix else adamw
        rate = rates.get(name, 1.0)
        groups.setdefault(rate, {"params": [], "rate": rate})["params"].append(param)
    optimizers = []
    if muon:
        shared = {"weight_decay": args.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(list(muon.values()), **shared))
    if adamw:
        shared = {"weight_decay": args.weight_decay, "betas": (0.9, 0.95)}
        optimizers.append(torch.optim.AdamW(list(adamw.values()), **shared))
    return optimizers


def fit(
    checkpoint: Checkpoint,
    params: Params,
    args: Run,
    step_loss: Callable[[int], dict[str, float]],
    clip: Callable[[list[torch.Tensor], float], float] = clip_norm,
    rates: dict[str, float] | None = None,
) -> None:
    """Trains `params`, float32: step_loss(step) runs the backward passes and returns what to log.

    Writes checkpoints and log.csv (step, learning rate, gradient norm, and what step_loss returns).
    `rates` {name: factor} gives some params another learning rate.
    """
    checkpoint.write_config(finished=False)
    torch.manual_seed(args.seed)
    for param in params.values():
        param.requires_grad_(True)
    optimizers = make_optimizers(params, args, rates or {})
    checkpoint.load(params, optimizers)
    board = _tensorboard(checkpoint.folder) if args.tensorboard else None
    steps = range(checkpoint.step, args.steps)
    bar = tqdm(steps, initial=checkpoint.step, total=args.steps, file=sys.stderr, mininterval=1)
    try:
        for step in bar:
            for param in params.values():
                param.grad = None
            losses = step_loss(step)
            norm = clip(list(params.values()), args.clip)
            if not math.isfinite(norm):
                advice = f"lower --lr (now {args.lr}), or use float32"
                raise InputError(f"step {step + 1}: the gradient is not finite: {advice}")
            lr = learning_rate(step, args)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * lr
                optimizer.step()
            logged = {"step": step + 1, "lr": lr, "norm": norm, **losses}
            checkpoint.rows.append([f"{value:.6g}" for value in logged.values()])
            bar.set_postfix({"norm": norm, **losses})
            for name, value in logged.items() if board else ():
                board.add_scalar(name, value, step + 1)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                # The log first: rows beyond the checkpoint are dropped on resuming, missing ones
                # would stay missing.
                lines = map(",".join, [list(logged), *checkpoint.rows])
                write_text(checkpoint.folder / "log.csv", "\n".join(lines) + "\n")
                checkpoint.save(step + 1, params, optimizers)
    except KeyboardInterrupt:
        bar.close()
        none_yet = "the start: there is no checkpoint yet"
        where = "the last checkpoint" if checkpoint.file.exists() else none_yet
        warn(f"stopped; --resume goes on from {where}")
        raise
    for param in params.values():
        param.requires_grad_(False)


def _tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        message = "--tensorboard needs a package that is not here: pip install tensorboard"
        raise InputError(message) from None
    return SummaryWriter(folder)
