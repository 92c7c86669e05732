"""The training loop of all trainers: optimizer, warmup and cosine, clipping, log, checkpoints.

Every step is a pure function of the seed, the step, the data and the weights. A checkpoint holds
weights, optimizer and RNG, so a resumed run ends with the same bits as one that was never
interrupted. On a GPU, which adds in no fixed order, the two are equal up to rounding. What a run
was given (options, base, adapters, data) is in its config.json: other input is not resumed.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from common.files import InputError, say, warn, write_text
from common.options import BatchSize, Count, NotNegative, Seed, Share
from common.processes import rank
from common.progress import progress
from common.signals import Terminated
from model import Llama
from parallel.processes import ProcessDied, add_gradients, add_values, check_same, leave
from pool.load import compile_blocks
from tasks.folders import Example
from training.checkpoint import Checkpoint, Optimizers, Params


@dataclass
class Run:
    """Options that all runs of gradient steps share."""

    model: str  # folder or hub name ORG/NAME[@REVISION]
    steps: Count = 300  # optimizer steps
    batch_size: BatchSize = 8  # examples a step: of each adapter (adapters), in all (gates), windows
    micro_tokens: Count = 4096  # tokens in one forward; a larger step accumulates gradients
    lr: NotNegative = 1e-3  # peak learning rate
    warmup: Share = 0.05  # share of the steps in which lr rises; then a cosine to a tenth
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
    show_all: bool = False  # under torchrun: also show what processes other than the first print


def required(args, name: str) -> str:
    """The option's value. Raises InputError where it was not given."""
    if not getattr(args, name):
        raise InputError(f"--{name} is missing")
    return getattr(args, name)


def finished(checkpoint: Checkpoint) -> None:
    """Says that there is nothing left to do."""
    say(f"{checkpoint.folder}: finished already")


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


def clip_norm(params: list[torch.Tensor], limit: float) -> float:
    """Scales all gradients so that their joint norm is at most `limit`; returns the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(params, limit or math.inf))


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
    after_backward: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains `params`, float32: step_loss(step) runs the backward passes and returns what to log.
    after_backward(step) sees the gradients before they are clipped, and may change the params.

    Writes checkpoints and log.csv (step, learning rate, gradient norm, and what step_loss returns).
    `rates` {name: factor} gives some params another learning rate. Under torchrun gradients and what
    is logged are summed over the processes, and all but the first end here.
    """
    _check_one_run(checkpoint)
    first = rank() == 0
    if first:
        checkpoint.write_config()
    torch.manual_seed(args.seed)
    for param in params.values():
        param.requires_grad_(True)
    optimizers = make_optimizers(params, args, rates or {})
    checkpoint.load(params, optimizers)
    check_same({"the step of the checkpoint": checkpoint.step})
    board = _tensorboard(checkpoint.folder) if args.tensorboard and first else None
    bar = progress(checkpoint.folder.name, args.steps, checkpoint.step)
    with _say_how_to_resume(checkpoint), bar:
        for step in range(checkpoint.step, args.steps):
            for param in params.values():
                param.grad = None
            losses = add_values(step_loss(step))
            add_gradients(params.values())
            after_backward(step)
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
            shown = [f"{name} {value:.3g}" for name, value in {**losses, "norm": norm}.items()]
            bar.set_postfix_str(", ".join(shown), refresh=False)
            for name, value in logged.items() if board else ():
                board.add_scalar(name, value, step + 1)
            if first and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
                # The log first: rows beyond the checkpoint are dropped on resuming, missing ones
                # would stay missing.
                lines = map(",".join, [list(logged), *checkpoint.rows])
                write_text(checkpoint.folder / "log.csv", "\n".join(lines) + "\n")
                checkpoint.save(step + 1, params, optimizers)
            bar.update()
    for param in params.values():
        param.requires_grad_(False)
    leave()


def _check_one_run(checkpoint):
    """Raises InputError where processes have other options, base, adapters, data or torch than the first."""
    options = {name: value for name, value in checkpoint.config.items() if name != "bound"}
    check_same({**options, **checkpoint.config["bound"], "torch": torch.__version__})


@contextlib.contextmanager
def _say_how_to_resume(checkpoint):
    """On Ctrl-C, SIGTERM and the death of another process, where --resume goes on."""
    try:
        yield
    except (KeyboardInterrupt, Terminated, ProcessDied):
        none_yet = "the start: there is no checkpoint yet"
        where = "the last checkpoint" if checkpoint.file.exists() else none_yet
        warn(f"stopped; --resume goes on from {where}")
        raise


def _tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        message = "--tensorboard needs a package that is not here: pip install tensorboard"
        raise InputError(message) from None
    return SummaryWriter(folder)
