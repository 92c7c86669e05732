"""`train.py gates`: trains what chooses among the adapters of a pool, token by token. The kinds are
in methods/.

The base stays frozen, and so do the adapters but with --adapters_too. Every kind learns from the LM
loss; MeteoRA's also from its gate term, which tells each gate the task's own adapter.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.devices import DTYPES
from common.files import InputError
from common.options import Above0, Count, NotNegative
from common.tokenizer import Tokenizer
from pool.adapters import linear_shapes, save_adapter
from pool.folder import PoolFolder, check_pool, read_pool, write_pool
from pool.gate_files import parameters_of, save_gates
from pool.load import load_base
from pool.slots import Pool, alloc_B_of
from tasks.composites import check_composite, compose
from tasks.folders import collate, load_tasks, micro_batches, pick, some_tasks, tokenize
from training.adapters import trained
from training.loop import Checkpoint, Run, compile_for, finished, fit, hidden_states, lm_losses, required


@dataclass
class GatesRun(Run):
    """Options of `train.py gates`."""

    tasks: str = ""  # folder of task folders, one named like each adapter
    pool: str = ""  # pool folder with the adapters
    share: float = 1.0  # of the tasks: the others and their adapters are never seen, nor chosen
    kind: str = "meteora"  # of gate: a file of methods/ each
    top_k: int = 2  # adapters a token uses (meteora, moe)
    gate_temperature: Above0 = 1.0  # of the softmax over the k
    lm_weight: NotNegative = 1.0  # of the LM loss; without effect at top-1, where it gives gates no gradient
    beta: NotNegative = 50.0  # of the gate term (the paper's reported runs); meteora only
    fit: Literal["", "own", "routed"] = (
        ""  # fit to features, each task through its own adapter or as the gates route
    )
    l2: NotNegative = 1e-4  # weight penalty of the fit
    adapters_too: str = (
        ""  # train the adapters as well, as MeteoRA's released script does, and write this pool
    )
    adapter_lr: NotNegative = 1e-4  # their peak learning rate
    composite: float = (
        0.0  # share of the examples that come as composites, up to --max_length tokens of them in one
    )
    max_length: int = 512  # longer examples are left out; at most the model's context
    batch_size: Count = 16  # examples a step, of all tasks in turn
    lr: NotNegative = 7e-3  # peak learning rate
    clip: NotNegative = 0.3  # largest gradient norm, 0 = no clipping
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the saved gates and adapters


def train_gates(args, kinds):
    """Trains a kind of gate over all adapters of a pool and writes POOL/gates/NAME.safetensors.
    `kinds` {--kind: class of methods/}, each a protocol.Trained; one that --fit goes with has
    fit()."""
    kind = kinds[args.kind]
    known = read_pool(required(args, "pool"))
    names = some_tasks(known.adapters, args.share, args.seed)
    tasks = load_tasks(required(args, "tasks"), names)
    kind.check_run(args, names)
    check_composite(args.composite, args.batch_size)
    if args.adapters_too and Path(args.adapters_too).resolve() == known.path.resolve():
        raise InputError(f"--adapters_too is {args.adapters_too}, the pool itself: name another folder")
    model = load_base(args.model, args.dtype, args.device)
    tokenizer = Tokenizer(args.model)
    args.max_length = min(args.max_length, model.config.max_position_embeddings)
    check_pool(known, model, args, known.template)
    dtype = torch.float32 if args.adapters_too else model.head_weight.dtype
    folders = {name: known.adapters[name] for name in names}
    shapes = linear_shapes(model)
    pool = Pool.load(folders, shapes, dtype, model.head_weight.device, alloc_B=alloc_B_of(model))
    folder = Path(args.adapters_too or known.path)
    file = folder / "gates" / f"{kind.run_name(args)}.safetensors"
    run = folder / "runs" / kind.run_folder(args)
    bound = [f"{name} {pool.members[name].hash}" for name in pool.names]
    checkpoint = Checkpoint(run, args, [*bound, f"base {model.fingerprint}"])
    if checkpoint.finished:
        return finished(checkpoint)
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, args.max_length)
    if args.fit:
        gates = kind.fit(model, pool, examples, args)
    else:
        gates = train_by_steps(kind, model, pool, tokenizer, examples, known.template, checkpoint, args)
    if args.adapters_too:
        pool = save_pool(known, pool, shapes, args)
    for param in parameters_of(gates).values():
        param.data = param.data.to(DTYPES[args.save_dtype])
    save_gates(file, gates, pool, kind.kept_k(args, pool.names), pool.names, model.fingerprint)
    checkpoint.finish(file)


def train_by_steps(kind, model, pool, tokenizer, examples, template, checkpoint, args):
    """Trains gates by gradient steps; returns {module path: gate}."""
    gates, gate_loss, prompt = kind.attach_for_training(model, pool, args)
    params = parameters_of(gates)
    rates = {}
    if args.adapters_too:
        stacks = {
            f"{path}.{n}": stack[path] for n, stack in (("A", pool.A), ("B", pool.B)) for path in pool.A
        }
        rates = dict.fromkeys(stacks, args.adapter_lr / args.lr if args.lr else 0.0)
        params |= stacks
    compile_for(model, args, pick(examples, 0, args))

    def step_loss(step):
        picked = compose(pick(examples, step, args), tokenizer, template, step, args)
        return gates_step(model, pool, gate_loss, prompt, picked, args)

    fit(checkpoint, params, args, step_loss, rates=rates)
    if gate_loss:
        gate_loss.remove()
    return gates


def gates_step(model, pool, gate_loss, prompt, picked, args):
    """Forward and backward of one step; returns the losses, and MeteoRA's gates' top-1 accuracy
    over all tokens. `prompt` is SMEAR's, which needs whole rows, else None."""
    use_lm = gate_loss is None or (args.lm_weight > 0 and (args.top_k > 1 or args.adapters_too != ""))
    parts = [part for example in picked for part in example.parts]
    n = sum(len(part.ids) for part in parts if part.task)
    n_response = sum(len(part.ids) - part.n_prompt for part in parts)
    seen = {"lm_loss": 0.0, "gate_loss": 0.0, "right": 0.0}
    padded = prompt is not None
    for some in micro_batches(picked, args.micro_tokens, padded):
        batch = collate(some, model.head_weight.device)
        if padded:
            prompt.mask = batch.prompt
        if use_lm:
            lm_loss = lm_losses(model, batch, padded).sum() / n_response
        else:
            lm_loss = hidden_states(model, batch, padded).new_zeros(())
        loss = args.lm_weight * lm_loss.float()
        if gate_loss:
            labels = batch.slots(pool)[batch.real]
            mean, right = gate_loss(labels)
            gate_term = mean * (labels >= 0).sum() / n
            loss = loss + args.beta * gate_term
            seen["gate_loss"] += gate_term.item()
            seen["right"] += float(right.float().mean()) / n
        loss.backward()
        seen["lm_loss"] += lm_loss.item()
    kept = (["lm_loss"] if use_lm else []) + (["gate_loss", "right"] if gate_loss else [])
    return {key: seen[key] for key in kept}


def save_pool(known, pool, shapes, args):
    """Writes the trained adapters as a pool of their own; returns it as loaded, for the gates to be
    bound to."""
    folder = Path(args.adapters_too)
    paths = {name: folder / "adapters" / name for name in pool.names}
    for name, path in paths.items():
        save_adapter(trained(pool, name, args), path)
    write_pool(PoolFolder(folder, paths, known.fingerprint, known.template))
    return Pool.load(paths, shapes)
