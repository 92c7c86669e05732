"""`train.py adapters`: a LoRA for each task, all in one run; or one adapter over all tasks, to
compare with.

The base stays in its dtype and frozen, the adapters are float32. A batch mixes the tasks and every
sample, or every question and answer of a composite, runs through its own adapter.
"""

import hashlib
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from common.devices import DTYPES
from common.files import InputError
from common.options import Count, Whole
from common.tokenizer import Tokenizer
from moe_lora import KnownAdapterGate, attach
from pool.adapters import TEMPLATE, Adapter, linear_shapes, peft_config, save_adapter
from pool.folder import PoolFolder, check_pool, is_pool, read_pool, write_pool
from pool.load import load_base
from pool.slots import Pool, alloc_B_of
from tasks.composites import check_composite, compose
from tasks.folders import PackedExample, Task, collate, draw, load_tasks, micro_batches, tokenize
from training.loop import Checkpoint, Run, compile_for, finished, fit, lm_losses, required

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class AdaptersRun(Run):
    """Options of `train.py adapters`."""

    tasks: str = ""  # folder of task folders
    pool: str = ""  # pool folder to write or add to
    only: list[str] = field(default_factory=list)  # train this task alone; repeatable; default all
    joint: str = ""  # one adapter instead: of all data as it is, or evenly of all tasks
    name: str = ""  # what the joint adapter is called, default lora_f or lora_b
    r: Count = 8  # rank
    alpha: float = 16.0  # scale is alpha / r
    dropout: float = 0.1  # LoRA dropout
    composite: float = (
        0.0  # share of the examples that come as composites, up to --max_length tokens of them in one
    )
    late: float = (
        0.0  # share of the examples (questions) whose adapter starts at a random token, as behind gates
    )
    target: list[str] = field(default_factory=lambda: list(LINEARS))  # Linears to adapt; repeatable
    template: str = TEMPLATE  # how a prompt is wrapped, {prompt} in it; kept in pool.json
    max_length: int = 512  # longer examples are left out; at most the model's context
    samples: Whole = 20  # prompts kept beside each adapter for retrieval
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the saved adapters


def train_adapters(args, sampling=None):
    """Trains a LoRA for each task in one run: every step holds `batch_size` examples of each task,
    each sample uses its own adapter, and each adapter gets the gradient and the clipping that it
    would get alone. In composites it also learns from the answers behind its tokens.

    With `joint` one adapter learns all tasks from as many examples a step, drawn as `sampling`
    says, {joint: function of {task: examples} and the adapter's name} (methods/joint.py). It goes
    to POOL/baselines/NAME.
    """
    tasks = load_tasks(required(args, "tasks"), args.only)
    check_composite(args.composite, args.batch_size * len(tasks))
    folder = Path(required(args, "pool"))
    if is_pool(folder) and not (folder / "pool.json").exists():
        raise InputError(
            f"{folder}: holds PEFT folders and no pool.json, which would leave them out: name another --pool"
        )
    model = load_base(args.model, args.dtype, args.device)
    tokenizer = Tokenizer(args.model)
    args.max_length = min(args.max_length, model.config.max_position_embeddings)
    name = args.name or args.joint
    checkpoint = Checkpoint(
        folder / "runs" / (name or "adapters"), args, [*tasks, f"base {model.fingerprint}"]
    )
    if checkpoint.finished:
        return finished(checkpoint)
    known = (
        read_pool(folder)
        if (folder / "pool.json").exists()
        else PoolFolder(folder, {}, template=args.template)
    )
    check_pool(known, model, args, args.template)
    shapes = linear_shapes(model)
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, args.template, args.max_length)
    targets = {path: shape for path, shape in shapes.items() if path.endswith(tuple(args.target))}
    if unknown := [t for t in args.target if not any(path.endswith(f".{t}") for path in shapes)]:
        raise InputError(f"--target {unknown[0]}: no such Linear, expected some of {', '.join(LINEARS)}")
    learners = list(tasks.values())
    if args.joint:
        learners = [Task(name, "", [row for task in learners for row in task.train], [])]
        examples = sampling[args.joint](examples, name)
    pool = Pool.of(
        [new_adapter(task, targets, args) for task in learners],
        targets,
        device=model.head_weight.device,
        alloc_B=alloc_B_of(model),
    )
    gate = KnownAdapterGate()
    attach(model, pool, gate, dropout=args.dropout)
    model.train()
    params = {
        f"{path}.{part}": stack[path] for part, stack in (("A", pool.A), ("B", pool.B)) for path in pool.A
    }
    count = args.batch_size * len(tasks) // len(examples)

    def pick(step):
        return [x for task, some in examples.items() for x in draw(some, task, step, count, args.seed)]

    def step_loss(step):
        picked = pick(step)
        picked = compose(picked, tokenizer, args.template, step, args)
        if args.joint:
            picked = [
                PackedExample([replace(part, task=name) for part in example.parts]) for example in picked
            ]
        return adapters_step(model, pool, gate, picked, args)

    compile_for(model, args, pick(0))
    fit(checkpoint, params, args, step_loss, clip_each)
    if args.joint:
        written = folder / "baselines" / name
        save_adapter(trained(pool, name, args), written)
    else:
        written = f"{known.path / 'adapters'}/{{{','.join(tasks)}}}"
        save_adapters(pool, tasks, model, known, args)
    checkpoint.finish(written)


def check_adapter_options(args):
    """Raises InputError for what would end in a traceback, or in a pool that nothing can read."""
    if args.name and not args.joint:
        raise InputError("--name is the joint adapter's: it goes with --joint")
    if args.name and not re.fullmatch(rf"{args.joint}[\w-]*", args.name):
        raise InputError(
            f"--name is {args.name!r}, expected {args.joint} and letters, digits, - or _: it becomes a folder"
        )
    if args.joint and args.late:
        raise InputError("--late is for adapters that gates choose among: leave it out with --joint")
    if not 0 <= args.dropout < 0.99:
        raise InputError(f"--dropout is {args.dropout}, expected 0 or more and less than 0.99")
    if args.optimizer == "muon":
        raise InputError("--optimizer muon is for gates and bases: adapters are trained by adamw")
    if not 0 <= args.late <= 1:
        raise InputError(f"--late is {args.late}, expected 0 to 1")
    if not math.isfinite(args.alpha) or args.alpha <= 0:
        raise InputError(f"--alpha is {args.alpha}, expected a number above 0")
    if "{prompt}" not in args.template:
        raise InputError(f"--template is {args.template!r}, expected a text that holds {{prompt}}")


def new_adapter(task, targets, args):
    """B zero, A uniform within 1/sqrt(i) as PEFT starts it, seeded by the name: the order of tasks
    changes nothing."""
    seed = int.from_bytes(hashlib.sha256(f"{args.seed}/{task.name}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    A = {
        p: (torch.rand(args.r, i, generator=generator) * 2 - 1) / math.sqrt(i)
        for p, (_, i) in targets.items()
    }
    B = {p: torch.zeros(out, args.r) for p, (out, _) in targets.items()}
    alpha = int(args.alpha) if args.alpha == int(args.alpha) else args.alpha
    config = peft_config(args.r, alpha, args.dropout, args.target, Path(args.model).resolve().name)
    samples = random.Random(f"{args.seed}/{task.name}").sample(task.train, min(args.samples, len(task.train)))
    return Adapter(
        task.name, A, B, dict.fromkeys(A, alpha / args.r), config, [row["prompt"] for row in samples]
    )


def adapters_step(model, pool, gate, picked, args):
    """Forward and backward of one step; the loss is the sum over adapters of the mean over its
    response tokens."""
    tokens = Counter()
    for part in (part for example in picked for part in example.parts):
        tokens[part.task] += len(part.ids) - part.n_prompt
    total = 0.0
    device = model.head_weight.device
    for some in micro_batches(picked, args.micro_tokens):
        batch = collate(some, device)
        slots = batch.slots(pool)
        on = slots >= 0  # (b, t)
        if args.late:  # gates can't know the task from a prompt's first words
            last = torch.tensor([max(0, part.n_prompt - 1) for part in batch.parts], device=device)
            starts = last * (torch.rand(len(last)).to(device) / args.late - 1 / args.late + 1)
            on = on & (batch.at >= starts[batch.part])
        gate.set(slots.clamp(min=0)[batch.real], on[batch.real].float())
        share = torch.tensor([1 / max(1, tokens[task]) for task in batch.tasks], device=device)[batch.part]
        loss = (lm_losses(model, batch) * share.roll(-1, 1)[batch.predicts]).sum()
        loss.backward()
        total += loss.item()
    return {"loss": total / sum(map(bool, tokens.values()))}


def clip_each(stacks, limit):
    """Clips each adapter's gradient by its own norm; stacks are (e, ., .). Returns the largest norm
    before."""
    norms = torch.stack([s.grad.pow(2).sum((1, 2)) for s in stacks]).sum(0).sqrt()  # (e,)
    if limit:
        factor = (limit / (norms + 1e-6)).clamp(max=1.0)
        for stack in stacks:
            stack.grad.mul_(factor[:, None, None])
    return float(norms.max())


def save_adapters(pool, tasks, model, known, args):
    """Writes the adapters, then pool.json that names them beside those that were there."""
    for name in tasks:
        save_adapter(trained(pool, name, args), known.path / "adapters" / name)
    adapters = known.adapters | {name: known.path / "adapters" / name for name in tasks}
    write_pool(PoolFolder(known.path, adapters, model.fingerprint, args.template))


def trained(pool, name, args):
    """The pool's adapter `name` in the dtype it is saved in."""
    adapter = pool.adapter(name)
    for part in (adapter.A, adapter.B):
        part.update({path: y.to(DTYPES[args.save_dtype]) for path, y in part.items()})
    return adapter
