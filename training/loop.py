"""The training loop of all trainers: optimizer, warmup and cosine, clipping, log, checkpoints.

Every step is a pure function of the seed, the step, the data and the weights. A checkpoint holds
weights, optimizer and RNG, so a resumed run ends with the same bits as one that was never
interrupted. On a GPU, which adds in no fixed order, the two are equal up to rounding. What a run
was given (options, base, adapters, data) is in its config.json: other input is not resumed.
"""

import contextlib
import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from common.files import MARK, InputError, read_json, read_text, say, warn, write_json, write_text
from common.options import Count, NotNegative, Seed
from common.progress import progress
from common.signals import Terminated
from common.tensors import read_metadata, read_safetensors, write_safetensors
from model import Llama
from pool.load import compile_blocks
from tasks.folders import Example


@dataclass
class Run:
    """Options that all runs of gradient steps share."""

    model: str  # folder or hub name ORG/NAME[@REVISION]
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


NOT_THE_RUN = ("resume", "save_every", "tensorboard", "device")  # may differ on resuming
Params = dict[str, torch.Tensor]  # {name: trained tensor}
Optimizers = list[torch.optim.Optimizer]


class Checkpoint:
    """RUN/checkpoint.safetensors: step, trained tensors, optimizer state, RNG.

    config.json and log.csv lie beside it. A finished run leaves config.json with "finished": true
    and "wrote", the files that it made, and no checkpoint.
    """

    def __init__(self, folder: Path | str, args: Run, bound: dict[str, str] | None = None):
        """`bound` {what: hash} of base, adapters and data: with the options they say which run it is.

        Raises InputError where an unfinished run or, on resuming, one of other input is here.
        """
        self.folder = Path(folder)
        self.file = self.folder / "checkpoint.safetensors"
        self.config = {k: v for k, v in asdict(args).items() if k not in NOT_THE_RUN}
        self.config["bound"] = bound or {}
        self.step = 0
        self.finished = False
        self.rows = []
        if self.file.exists() and not MARK.items() <= read_metadata(self.file).items():
            raise InputError(f"{self.file}: not a checkpoint that train.py made: move it elsewhere")
        file = self.folder / "config.json"
        if file.exists():
            known = read_json(file)
            if known.get("finished") or self.file.exists():  # else there is nothing to lose
                self._check_known(known, args.resume)

    def _check_known(self, known, resume):
        """A run is here already: resume it, or refuse to overwrite it."""
        finished = known.pop("finished", False)
        wrote = known.pop("wrote", [])
        if finished:  # killed before finish() could remove it
            self.file.unlink(missing_ok=True)
        if not resume and not finished:
            message = "an unfinished run is here: go on with --resume, or remove the folder"
            raise InputError(f"{self.folder}: {message}")
        if not resume:
            return warn(f"{self.folder}: a finished run is here: training again replaces what it wrote")
        if differ := differences(known, self.config):
            file = self.folder / "config.json"
            found = "; ".join(differ)
            raise InputError(f"{file}: can't resume with other options or data: {found}")
        gone = [name for name in wrote if not (self.folder / name).exists()]
        if gone:
            file = os.path.normpath(self.folder / gone[0])
            warn(f"{file}: a finished run wrote it, and it is gone: training again")
        self.finished = finished and not gone

    def write_config(self, finished: bool = False, wrote: Iterable[Path] = ()) -> None:
        """Writes RUN/config.json."""
        files = sorted(os.path.relpath(file, self.folder) for file in wrote)
        write_json(self.folder / "config.json", self.config | {"finished": finished, "wrote": files})

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
        write_safetensors(self.file, tensors, MARK | {"step": str(step)})

    def finish(self, written: Path | str, files: Iterable[Path]) -> None:
        """Marks the run as finished with `files`, and says that it wrote them, as `written`."""
        self.write_config(finished=True, wrote=files)
        self.file.unlink(missing_ok=True)
        say(f"wrote {written}")


def differences(was: dict, now: dict) -> list[str]:
    """What differs between two runs' options, and between the hashes of what they are bound to."""
    found = []
    for name in sorted((was.keys() | now.keys()) - {"bound"}):
        if was.get(name) != now.get(name):
            found.append(f"{name} was {was.get(name)!r}, now {now.get(name)!r}")
    was = was.get("bound", {})
    now = now["bound"]
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            how = "is new" if name not in was else "is gone" if name not in now else "has changed"
            found.append(f"{name} {how}")
    return found


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
    checkpoint.write_config()
    torch.manual_seed(args.seed)
    for param in params.values():
        param.requires_grad_(True)
    optimizers = make_optimizers(params, args, rates or {})
    checkpoint.load(params, optimizers)
    board = _tensorboard(checkpoint.folder) if args.tensorboard else None
    bar = progress(checkpoint.folder.name, args.steps, checkpoint.step)
    with _say_how_to_resume(checkpoint), bar:
        for step in range(checkpoint.step, args.steps):
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
            shown = [f"{name} {value:.3g}" for name, value in {**losses, "norm": norm}.items()]
            bar.set_postfix_str(", ".join(shown), refresh=False)
            for name, value in logged.items() if board else ():
                board.add_scalar(name, value, step + 1)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                # The log first: rows beyond the checkpoint are dropped on resuming, missing ones
                # would stay missing.
                lines = map(",".join, [list(logged), *checkpoint.rows])
                write_text(checkpoint.folder / "log.csv", "\n".join(lines) + "\n")
                checkpoint.save(step + 1, params, optimizers)
            bar.update()
    for param in params.values():
        param.requires_grad_(False)


@contextlib.contextmanager
def _say_how_to_resume(checkpoint):
    """On Ctrl-C and SIGTERM, where --resume goes on."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
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
