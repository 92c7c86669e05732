"""`train.py gates`: trains gates, which choose among a pool's adapters token by token.

The kinds of gates are in methods/. The base stays frozen, and so do the adapters unless
--adapters_too. Every kind learns from the LM loss; MeteoRA's also from its gate term, which tells
each gate the task's own adapter.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from common.devices import DTYPES
from common.files import InputError
from common.locks import alone
from common.options import Above0, BatchSize, Count, NotNegative, Share, ShareAbove0
from common.tokenizer import Tokenizer
from model import Llama
from parallel.processes import share_of
from pool.adapters import adapter_files, save_adapter
from pool.folder import PoolFolder, write_pool
from pool.gate_files import parameters_of, save_gates
from pool.slots import Pool
from tasks.composites import check_composite, compose
from tasks.folders import Batch, Example, collate, load_tasks, micro_batches, pick, some_tasks, tokenize
from training.adapters import pool_params, trained
from training.adapters_help import check_adapters_help
from training.checkpoint import Checkpoint
from training.dropout import seed_dropout
from training.inputs import PoolOptions, bound_to, data_of, keep_template, load_with_pool, named_pool
from training.loop import Run, compile_for, finished, fit, required
from training.losses import GateLoss, hidden_states, lm_losses


@dataclass
class GatesRun(PoolOptions, Run):
    """Options of `train.py gates`."""

    share: ShareAbove0 = 1.0  # share of the tasks; the others and their adapters are never seen, nor chosen
    kind: str = "meteora"  # kind of gate; each is a file of methods/
    top_k: Count = 2  # adapters a token uses (kinds whose methods end in _topK)
    gate_temperature: Above0 = 1.0  # temperature of the softmax over the k
    lm_weight: NotNegative = 1.0  # weight of the LM loss, which gives top-1 gates no gradient
    adapters_too: str = ""  # also train the adapters, as MeteoRA's script does, and write this pool
    adapter_lr: NotNegative = 1e-4  # peak learning rate of the adapters
    composite: Share = 0.0  # share of examples that are put into composites (up to --max_length)
    max_length: Count = 512  # longer examples are left out; at most the model's context
    batch_size: BatchSize = 16  # examples a step, of all tasks in turn
    lr: NotNegative = 7e-3  # peak learning rate
    clip: NotNegative = 0.3  # largest gradient norm, 0 = no clipping
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the saved gates and adapters


@dataclass
class GateTermRun(GatesRun):
    """Options of the kinds of gates that learn from the gate term too."""

    beta: NotNegative = 50.0  # weight of the gate term (the paper's reported runs)


def train_gates(args: GatesRun, kinds: dict[str, type]) -> None:
    """Trains a kind of gate over the adapters of a pool; writes POOL/gates/NAME.safetensors.

    `kinds` {--kind: class of methods/}, each a protocol.Trained.
    """
    kind = kinds[args.kind]
    known = named_pool(args)
    names = some_tasks(known.adapters, args.share, args.seed)
    tasks = load_tasks(required(args, "tasks"), names, known.adapters)
    kind.check_run(args, names)
    check_composite(args.composite, args.batch_size)
    if args.adapters_too and Path(args.adapters_too).resolve() == known.path.resolve():
        found = f"{args.adapters_too}, the pool itself"
        raise InputError(f"--adapters_too is {found}: name another folder")
    run = Path(args.adapters_too or known.path) / "runs" / kind.run_folder(args)
    with alone(run):
        _train_gates(kind, known, names, tasks, run, args)


def _train_gates(kind, known, names, tasks, run, args):
    dtype = torch.float32 if args.adapters_too else None
    more = kind.more_adapters(known, args)
    model, tokenizer, pool = load_with_pool(args, known, names, dtype, more)
    folder = Path(args.adapters_too or known.path)
    file = folder / "gates" / f"{kind.run_name(args)}.safetensors"
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, args.max_length)
    checkpoint = Checkpoint(run, args, bound_to(model, pool) | data_of(tasks, examples))
    if checkpoint.finished:
        return finished(checkpoint)
    if not checkpoint.file.exists():
        check_adapters_help(model, tokenizer, pool, examples, known.template, args.seed)
    torch.manual_seed(args.seed)  # for gates that start at random
    gates = kind.fit(model, pool, examples, args)
    if gates is None:
        training = kind.training(model, pool, args)
        train_by_steps(training, tokenizer, examples, known.template, checkpoint)
        gates = training.gates
    files = [file]
    if args.adapters_too:
        pool = save_pool(known, pool, more, args)
        files += [folder / "pool.json"]
        for path in saved_folders(folder, pool.names, more).values():
            files += adapter_files(path)
    else:
        keep_template(known, model)
    for param in parameters_of(gates, pool.capacity).values():
        param.data = param.data.to(DTYPES[args.save_dtype])
    k = args.top_k if kind.uses_top_k else len(pool.names)
    save_gates(file, gates, pool, k, pool.names, model.fingerprint(), kind.kept(args))
    checkpoint.finish(file, files)


class GatesTraining:
    """What a run trains, and by which loss: here the LM loss alone. Other losses are derived classes."""

    padded = False  # True: examples stay whole rows of a batch, they are not packed

    def __init__(self, model: Llama, pool: Pool, gates: dict[str, nn.Module], args: GatesRun):
        self.model = model
        self.pool = pool
        self.gates = gates
        self.args = args

    @property
    def lm_weight(self) -> float:
        """The weight of the LM loss."""
        return self.args.lm_weight

    @property
    def adapters_train(self) -> bool:
        """Whether the pool's adapters train with the gates."""
        return bool(self.args.adapters_too)

    def loss(self, batch: Batch, n: int, n_response: int) -> tuple[torch.Tensor, dict[str, float]]:
        """(loss of `batch`, a part of a step's examples; {name: value to log}).

        Both are shares of the step's means, over its `n` tokens or its `n_response` response tokens, so
        the parts add up.
        """
        lm_loss = lm_losses(self.model, batch, self.padded).sum() / n_response
        return self.lm_weight * lm_loss.float(), {"lm_loss": lm_loss.item()}

    def finish(self) -> None:
        """Called once after the last step."""


class GateTermTraining(GatesTraining):
    """MeteoRA's loss: the LM loss and beta times the gate term."""

    def __init__(self, model, pool: Pool, gates: dict[str, nn.Module], args):
        super().__init__(model, pool, gates, args)
        self.gate_loss = GateLoss(gates)

    def loss(self, batch: Batch, n: int, n_response: int) -> tuple[torch.Tensor, dict[str, float]]:
        """See GatesTraining; "right" is the gates' top-1 accuracy over all tokens."""
        args = self.args
        if self.lm_weight > 0 and (args.top_k > 1 or self.adapters_train):
            loss, shown = super().loss(batch, n, n_response)
        else:  # with k = 1 the LM loss has no gradient but for the adapters
            loss = hidden_states(self.model, batch).new_zeros((), dtype=torch.float32)
            shown = {}
        labels = batch.slots(self.pool)[batch.real]
        mean, right = self.gate_loss(labels)
        gate_term = mean * (labels >= 0).sum() / n  # this part's share of the step's mean
        shown |= {"gate_loss": gate_term.item(), "right": float(right.float().mean()) / n}
        return loss + args.beta * gate_term, shown

    def finish(self) -> None:
        """The gates stop keeping their logits."""
        self.gate_loss.remove()


def train_by_steps(
    training: GatesTraining,
    tokenizer: Tokenizer,
    examples: dict[str, list[Example]],
    template: str,
    checkpoint: Checkpoint,
) -> None:
    """Trains the gates by gradient steps."""
    args = training.args
    params = parameters_of(training.gates, training.pool.capacity)
    rates = {}
    if args.adapters_too:
        stacks = pool_params(training.pool)
        rates = dict.fromkeys(stacks, args.adapter_lr / args.lr if args.lr else 0.0)
        params |= stacks
    compile_for(training.model, args, pick(examples, 0, args))

    def step_loss(step):
        picked = compose(pick(examples, step, args), tokenizer, template, step, args)
        return gates_step(training, picked, step)

    fit(checkpoint, params, args, step_loss, rates=rates)
    training.finish()


def picked_step(training: GatesTraining, examples: dict[str, list[Example]], step: int) -> dict[str, float]:
    """gates_step with the examples of that step, of all tasks in turn."""
    return gates_step(training, pick(examples, step, training.args), step)


def gates_step(training: GatesTraining, picked: list[Example], step: int) -> dict[str, float]:
    """Forward and backward of one step -> the values to log."""
    args = training.args
    parts = [part for example in picked for part in example.parts]
    n = sum(len(part.ids) for part in parts if part.task)
    n_response = sum(len(part.ids) - part.n_prompt for part in parts)
    shown = {}
    for some in micro_batches(share_of(picked), args.micro_tokens, training.padded):
        batch = collate(some, training.model.head_weight.device, f"{args.seed}/{step}")
        seed_dropout(training.model, batch)
        loss, values = training.loss(batch, n, n_response)
        loss.backward()
        for name, value in values.items():
            shown[name] = shown.get(name, 0.0) + value
    return shown


def save_pool(known: PoolFolder, pool: Pool, more: Iterable[str], args: GatesRun) -> Pool:
    """Writes the trained adapters as a new pool, those of `more` to its baselines/. Returns all of them,
    loaded anew, as gates are bound to the hashes of the files."""
    folder = Path(args.adapters_too)
    paths = saved_folders(folder, pool.names, more)
    for name, path in paths.items():
        save_adapter(trained(pool, name, args), path)
    write_pool(PoolFolder(folder, paths, known.fingerprint, known.template))
    return Pool.load(paths, pool.shapes)


def saved_folders(folder: Path, names: list[str], more: Iterable[str]) -> dict[str, Path]:
    """{adapter: its folder} in a new pool: POOL/baselines/NAME for those of `more`, which belong to no
    task, else POOL/adapters/NAME."""
    return {name: folder / ("baselines" if name in more else "adapters") / name for name in names}
