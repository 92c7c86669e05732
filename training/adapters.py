"""`train.py adapters`: a LoRA for each task, all in one run; or, to compare, one for all tasks.

The base stays frozen and in its dtype; the adapters are float32. A batch mixes the tasks: every
example, or every question and answer of a composite, runs through its own adapter.
"""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from common.devices import DTYPES, check_memory
from common.fields import Number, read_field
from common.files import InputError, read_json, warn
from common.hub import base_name
from common.locks import alone
from common.options import Above0, Count, Rank, Share, Whole
from common.template import TEMPLATE, TemplateOptions, asked_template
from common.tokenizer import Tokenizer
from model import Llama
from moe_lora import KnownAdapterGate, attach, detach
from parallel.processes import share_of
from pool.adapters import Adapter, adapter_files, linear_shapes, peft_config, save_adapter
from pool.folder import PoolFolder, is_pool, read_pool, write_pool
from pool.load import compile_blocks
from pool.slots import Pool, alloc_B_of, pool_bytes
from tasks.composites import check_composite, compose
from tasks.folders import Example, PackedExample, Task, collate, draw, load_tasks, micro_batches, tokenize
from training.adapters_help import Examples, first_examples, own_losses
from training.checkpoint import Checkpoint
from training.dropout import seed_dropout, token_dropout
from training.inputs import data_of, load_frozen
from training.loop import Run, compile_for, finished, fit, required
from training.losses import lm_losses

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class NewAdaptersRun(TemplateOptions, Run):
    """Options of every run that trains new adapters."""

    tasks: str = ""  # folder of task folders, or a file of {adapter, prompt, response} lines
    pool: str = ""  # pool folder to write or add to
    only: list[str] = field(default_factory=list)  # train this task alone; repeatable; default all
    r: Rank = 8  # rank
    alpha: Above0 = 16.0  # scale is alpha / r
    dropout: Annotated[float, Number(float, 0, 0.98)] = 0.1  # LoRA dropout
    target: list[str] = field(default_factory=lambda: list(LINEARS))  # Linears to adapt; repeatable
    max_length: Count = 512  # longer examples are left out; at most the model's context
    samples: Whole = 20  # prompts kept beside each adapter for retrieval
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the saved adapters


@dataclass
class AdaptersRun(NewAdaptersRun):
    """Options of `train.py adapters`."""

    joint: str = ""  # train one adapter instead: on all data as it is, or evenly on all tasks
    name: str = ""  # what the joint adapter is called, default lora_f or lora_b
    composite: Share = 0.0  # share of examples that are put into composites (up to --max_length)
    late_start: Share = 0.0  # share of examples whose adapter starts at a random token, as with gates


def train_adapters(args: AdaptersRun, sampling: dict[str, Callable] | None = None) -> None:
    """Trains a LoRA for each task in one run.

    Every step holds `batch_size` examples of each task. Each example uses its own adapter, and an
    adapter gets the gradient and the clipping that it would get alone.

    With `joint` one adapter learns all tasks from as many examples a step, and is written to
    POOL/baselines/NAME. `sampling` {joint: function of {task: examples} and the adapter's name}
    says how they are drawn (methods/joint.py).
    """
    tasks = load_tasks(required(args, "tasks"), args.only)
    check_composite(args.composite, args.batch_size * len(tasks))
    folder = Path(required(args, "pool"))
    run = folder / "runs" / (args.name or args.joint or "adapters")
    with alone(run):
        _train_adapters(tasks, folder, run, args, sampling)


def _train_adapters(tasks, folder, run, args, sampling):
    known = pool_to_write(folder)
    model, tokenizer, examples = begin(tasks, known, args)
    checkpoint = new_checkpoint(run, model, tasks, examples, args)
    if checkpoint.finished:
        return finished(checkpoint)
    name = args.name or args.joint
    learners = list(tasks.values())
    if args.joint:
        rows = [row for task in learners for row in task.train]
        learners = [Task(name, "", rows, [])]
        examples = sampling[args.joint](examples, name)
    pool = new_pool(model, learners, args)
    gate = KnownAdapterGate()
    attach(model, pool, gate, dropout=token_dropout(pool, args.dropout))
    model.train()
    count = args.batch_size * len(tasks) // len(examples)

    def pick(step):
        picked = []
        for task, some in examples.items():
            picked += draw(some, task, step, count, args.seed)
        return picked

    def step_loss(step):
        picked = compose(pick(step), tokenizer, known.template, step, args)
        if args.joint:
            picked = [relabel(example, name) for example in picked]
        return adapters_step(model, pool, gate, picked, args, step)

    compile_for(model, args, pick(0))
    fit(checkpoint, pool_params(pool), args, step_loss, clip_each)
    if args.joint:
        written = folder / "baselines" / name
        save_adapter(trained(pool, name, args), written)
        files = adapter_files(written)
    else:
        written = f"{known.path / 'adapters'}/{{{','.join(tasks)}}}"
        files = save_adapters(pool, tasks, model, known, args)
    learnt = examples
    if args.joint:
        learnt = {name: [relabel(example, name) for some in examples.values() for example in some]}
    warn_of_unlearnt(model, pool, learnt, args)
    checkpoint.finish(written, files)


def pool_to_write(folder: Path, run: Path | None = None) -> PoolFolder:
    """The pool `folder`, which may be new. Raises InputError where a new pool.json would leave out
    adapters. With `run`, the folder of a run, also where the pool has an adapter whose task wasn't among
    that run's: other parts may be bound to it."""
    known = read_pool(folder) if is_pool(folder) else PoolFolder(folder, {})
    if any(path != folder / "adapters" / name for name, path in known.adapters.items()):
        found = "holds PEFT folders outside of adapters/, which the new pool.json would leave out"
        raise InputError(f"{folder}: {found}: name another --pool")
    if run:
        file = run / "config.json"
        earlier = read_field(file, read_json(file), "bound", {str: str}, {}) if file.exists() else {}
        others = [name for name in known.adapters if f"data of {name}" not in earlier]
        if others:
            found = f"has adapter {others[0]}, to which other parts may be bound"
            raise InputError(f"{folder}: {found}: name a new --pool")
    return known


def begin(
    tasks: dict[str, Task], known: PoolFolder, args: NewAdaptersRun
) -> tuple[Llama, Tokenizer, Examples]:
    """What a run that trains new adapters begins with: (the frozen base, its tokenizer, {task: its
    tokenized examples}). Settles the template of the pool `known`. Raises InputError."""
    model, tokenizer = load_frozen(args, known, TEMPLATE)
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, args.max_length)
    return model, tokenizer, examples


def new_checkpoint(run: Path, model: Llama, tasks: dict[str, Task], examples: Examples, args) -> Checkpoint:
    """The Checkpoint of a run that trains new adapters, bound to the base and the data. Raises InputError."""
    return Checkpoint(run, args, {"base": model.fingerprint(), **data_of(tasks, examples)})


def new_pool(model: Llama, learners: list[Task], args: NewAdaptersRun) -> Pool:
    """A float32 pool with a new_adapter() for each of `learners`. Raises InputError where the machine has
    too little memory to train them."""
    targets = target_shapes(model, args)
    device = model.head_weight.device
    size = 4 * pool_bytes(targets, len(learners), args.r, torch.float32)  # gradients, AdamW's two moments
    check_memory(f"{len(learners)} adapters of rank {args.r} and what trains them", size, device)
    adapters = [new_adapter(task, targets, args) for task in learners]
    return Pool.of(adapters, targets, device=device, alloc_B=alloc_B_of(model))


def warn_of_unlearnt(model: Llama, pool: Pool, examples: Examples, args: AdaptersRun) -> None:
    """Warns of each adapter whose loss on its own examples is not below that at the start, when B
    was zero: the base's."""
    detach(model)
    compile_blocks(model, False, 0, 0)  # they would be compiled anew, for a second's work
    losses = own_losses(model, pool, first_examples(examples, args.seed))
    for name, (own, base) in losses.items():
        if not own < base:
            found = f"loss {own:.2f} on its own examples after training, {base:.2f} before"
            warn(f"adapter {name} learnt nothing: {found}: change --lr (now {args.lr}) or --steps")


def check_adapter_options(args: AdaptersRun) -> None:
    """Raises InputError for options that give a traceback, or a pool that nothing can read."""
    check_new_adapters(args)
    if args.name and not args.joint:
        raise InputError("--name is the joint adapter's: it goes with --joint")
    if args.name and not re.fullmatch(rf"{args.joint}[\w-]*", args.name):
        expected = f"{args.joint} and letters, digits, - or _: it becomes a folder"
        raise InputError(f"--name is {args.name!r}, expected {expected}")
    if args.joint and args.late_start:
        raise InputError("--late_start is for adapters that gates choose among: leave it out with --joint")


def check_new_adapters(args: NewAdaptersRun) -> None:
    """The same for the options of NewAdaptersRun."""
    for target in args.target:
        if not target.endswith(LINEARS):
            raise InputError(f"--target {target}: no such Linear, expected some of {', '.join(LINEARS)}")
    if args.optimizer == "muon":
        raise InputError("--optimizer muon is for gates and bases: adapters are trained by adamw")
    asked_template(args)


def target_shapes(model: Llama, args: NewAdaptersRun) -> dict[str, tuple[int, int]]:
    """{module path: (o, i)} of --target's Linears. Raises InputError for one that isn't there."""
    shapes = linear_shapes(model)
    for target in args.target:
        if not any(path.endswith(f".{target}") for path in shapes):
            expected = ", ".join(LINEARS)
            raise InputError(f"--target {target}: no such Linear, expected some of {expected}")
    return {path: shape for path, shape in shapes.items() if path.endswith(tuple(args.target))}


def new_adapter(task: Task, targets: dict[str, tuple[int, int]], args: NewAdaptersRun) -> Adapter:
    """B zero, A uniform within 1/sqrt(i) as PEFT starts it.

    The seed depends on the task's name, so that the order of tasks changes nothing.
    """
    seed = int.from_bytes(hashlib.sha256(f"{args.seed}/{task.name}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    A = {}
    B = {}
    for path, (o, i) in targets.items():
        A[path] = (torch.rand(args.r, i, generator=generator) * 2 - 1) / math.sqrt(i)
        B[path] = torch.zeros(o, args.r)
    alpha = int(args.alpha) if args.alpha == int(args.alpha) else args.alpha
    config = peft_config(args.r, alpha, args.dropout, args.target, base_name(args.model))
    count = min(args.samples, len(task.train))
    rows = random.Random(f"{args.seed}/{task.name}").sample(task.train, count)
    samples = [row["prompt"] for row in rows]
    return Adapter(task.name, A, B, dict.fromkeys(A, alpha / args.r), config, samples)


def pool_params(pool: Pool) -> dict[str, torch.Tensor]:
    """{module path and A or B: stack}: what an optimizer trains of a pool."""
    params = {}
    for part, stacks in (("A", pool.A), ("B", pool.B)):
        for path, stack in stacks.items():
            params[f"{path}.{part}"] = stack
    return params


def relabel(example: Example | PackedExample, name: str) -> PackedExample:
    """The example with task `name` for all its parts, so that this one adapter learns them."""
    return PackedExample([replace(part, task=name) for part in example.parts])


def adapters_step(
    model: Llama, pool: Pool, gate: KnownAdapterGate, picked: list[Example], args: AdaptersRun, step: int
) -> dict[str, float]:
    """Forward and backward of one step.

    The loss is the sum over adapters of the mean over an adapter's response tokens.
    """
    tokens = Counter()  # {task: response tokens}
    for example in picked:
        for part in example.parts:
            tokens[part.task] += len(part.ids) - part.n_prompt
    total = 0.0
    device = model.head_weight.device
    for some in micro_batches(share_of(picked), args.micro_tokens):
        batch = collate(some, device, f"{args.seed}/{step}")
        seed_dropout(model, batch)
        slots = batch.slots(pool)
        on = slots >= 0  # (b, t)
        if args.late_start:  # gates can't tell the task from a prompt's first words
            last = torch.tensor([max(0, part.n_prompt - 1) for part in batch.parts], device=device)
            u = batch.random_of_parts("late start").to(device)
            starts = last * (u / args.late_start - 1 / args.late_start + 1)
            on = on & (batch.at >= starts[batch.part])
        gate.set(slots.clamp(min=0)[batch.real], on[batch.real].float())
        shares = torch.tensor([1 / max(1, tokens[task]) for task in batch.tasks], device=device)
        share = shares[batch.part].roll(-1, 1)[batch.predicts]
        loss = (lm_losses(model, batch) * share).sum()
        loss.backward()
        total += loss.item()
    return {"loss": total / sum(map(bool, tokens.values()))}


def clip_each(stacks: list[torch.Tensor], limit: float) -> float:
    """Clips each adapter's gradient by its own norm; stacks are (e, ., .).

    Returns the largest norm before.
    """
    norms = torch.stack([s.grad.pow(2).sum((1, 2)) for s in stacks]).sum(0).sqrt()  # (e,)
    if limit:
        factor = (limit / (norms + 1e-6)).clamp(max=1.0)
        for stack in stacks:
            stack.grad.mul_(factor[:, None, None])
    return float(norms.max())


def save_adapters(
    pool: Pool, names: Iterable[str], model: Llama, known: PoolFolder, args: NewAdaptersRun
) -> list[Path]:
    """Writes the adapters, then a pool.json that names them beside those that were there.

    Returns the files.
    """
    adapters = dict(known.adapters)
    files = [known.path / "pool.json"]
    for name in names:
        adapters[name] = known.path / "adapters" / name
        save_adapter(trained(pool, name, args), adapters[name])
        files += adapter_files(adapters[name])
    write_pool(PoolFolder(known.path, adapters, model.fingerprint(), known.template))
    return files


def trained(pool: Pool, name: str, args) -> Adapter:
    """The pool's adapter `name` in the dtype it is saved in."""
    adapter = pool.adapter(name)
    for part in (adapter.A, adapter.B):
        for path, value in part.items():
            part[path] = value.to(DTYPES[args.save_dtype])
    return adapter
