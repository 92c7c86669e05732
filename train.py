"""Trains what the pool needs: base, adapters, gates. Task folders in, a pool folder out.

    python train.py base --text FILE --model DIR                        a small Llama from nothing, with its tokenizer
    python train.py adapters --model DIR --tasks DIR --pool DIR         a LoRA for each task, all in one run
    python train.py gates --model DIR --tasks DIR --pool DIR --top_k 2  MeteoRA's gates over the pool

The base stays in its dtype and frozen (but in `base`), what trains is float32. `--resume` goes on bit for bit where a
killed run stopped. A run's options, log and checkpoint: MODEL/runs/base, POOL/runs/adapters, POOL/runs/gates_topK.
"""

import hashlib
import io
import json
import math
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from adapters import (
    TEMPLATE,
    Adapter,
    Pool,
    PoolFolder,
    is_pool,
    linear_shapes,
    load_adapter,
    peft_config,
    read_pool,
    save_adapter,
    write_pool,
)
from config import parse_command
from files import InputError, read_text, run_script, warn, write_bytes, write_json, write_safetensors
from loop import Checkpoint, Run, fit
from model import DTYPES, Llama, LlamaConfig, load_llama
from moe_lora import GateLoss, MeteoraGate, SampleGate, attach, fixed_rows, save_gates
from tasks import collate, draw, encode_all, load_tasks, micro_batches
from tokenizer import Tokenizer, check_ids

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class BaseRun(Run):
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic, auto = float32; saved in bfloat16
    text: str = ""  # UTF-8 text to train on, a document a line
    vocab_size: int = 2048  # sentencepiece pieces
    hidden_size: int = 256  # width
    intermediate_size: int = 512  # width of the MLP
    num_hidden_layers: int = 6  # blocks
    num_attention_heads: int = 8  # query heads
    num_key_value_heads: int = 4  # key and value heads
    max_position_embeddings: int = 1024  # context
    block_size: int = 256  # tokens in a training window
    symbol: list[str] = field(default_factory=lambda: ["[INST]", "[/INST]", "\n"])  # whole tokens; repeatable
    steps: int = 1200  # optimizer steps
    batch_size: int = 32  # windows a step
    micro_tokens: int = 4096  # tokens in one forward; a step of more accumulates gradients
    lr: float = 2e-3  # peak learning rate
    weight_decay: float = 0.1  # AdamW's
    save_every: int = 200  # steps between checkpoints
    compile: bool = True  # torch.compile each block: 1.4 times the speed, 20 s of warm-up


@dataclass
class AdaptersRun(Run):
    tasks: str = ""  # folder of task folders
    pool: str = ""  # pool folder to write or add to
    only: list[str] = field(default_factory=list)  # train this task alone; repeatable; default all
    r: int = 8  # rank
    alpha: float = 16.0  # scale is alpha / r
    dropout: float = 0.1  # LoRA dropout
    target: list[str] = field(default_factory=lambda: list(LINEARS))  # Linears to adapt; repeatable
    template: str = TEMPLATE  # how a prompt is wrapped, {prompt} in it; kept in pool.json
    max_length: int = 512  # longer examples are left out
    samples: int = 20  # prompts kept beside each adapter for retrieval
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the saved adapters


@dataclass
class GatesRun(Run):
    tasks: str = ""  # folder of task folders, one named like each adapter
    pool: str = ""  # pool folder with the adapters
    top_k: int = 2  # adapters a token uses
    gate_temperature: float = 1.0  # of the softmax over the k
    lm_weight: float = 1.0  # of the language-modelling loss; without effect at top-1, where it gives gates no gradient
    beta: float = 50.0  # of the gate term (the paper's reported runs)
    max_length: int = 512  # longer examples are left out
    batch_size: int = 16  # examples a step, of all tasks in turn
    lr: float = 7e-3  # peak learning rate
    clip: float = 0.3  # largest gradient norm, 0 = no clipping
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the saved gates


BASE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "max_position_embeddings", "vocab_size", "block_size")  # fmt: skip


# base ---------------------------------------------------------------------------------------------------------------


def train_tokenizer(text, o, folder):
    """A sentencepiece BPE model with byte fallback, digits apart, and the template's marks as whole tokens."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.split("\n")), model_writer=model, model_type="bpe", vocab_size=o.vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            user_defined_symbols=o.symbol, character_coverage=1.0, num_threads=1, minloglevel=2,
            input_sentence_size=200_000, shuffle_input_sentence=False,
        )  # fmt: skip
    except RuntimeError as error:
        raise InputError(f"--vocab_size {o.vocab_size}: {' '.join(str(error).split())}") from None
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"})
    write_bytes(folder / "tokenizer.model", model.getvalue())


def train_base(o):
    """Pretrains a Llama of the given size on a text file, a document a line, packed into windows."""
    if not o.text:
        raise InputError("train.py base needs --text FILE, a document a line")
    folder = Path(o.model)
    if (folder / "config.json").exists() and not (folder / "runs" / "base" / "config.json").exists():
        raise InputError(f"{folder}: holds a model that this command didn't make: name another --model")
    checkpoint = Checkpoint(folder / "runs" / "base", o)
    if checkpoint.finished:
        return finished(checkpoint)
    text = read_text(o.text)
    if not checkpoint.file.exists():
        train_tokenizer(text, o, folder)
    tokenizer = Tokenizer(folder)
    documents = [np.array([*tokenizer.encode(line), tokenizer.eos_id], np.int32) for line in text.split("\n") if line]
    stream = np.concatenate(documents)
    if len(stream) <= o.block_size:
        raise InputError(f"{o.text}: {len(stream)} tokens, expected more than --block_size {o.block_size}")
    config, raw = base_config(o, tokenizer)
    torch.manual_seed(o.seed)
    model = init_weights(Llama(config))
    params = dict(model.named_parameters())
    print(f"base: {sum(p.numel() for p in params.values()):,} parameters, {len(stream):,} tokens", file=sys.stderr)
    half = o.dtype == "bfloat16"
    for layer in model.model.layers if o.compile else ():
        layer.compile()

    def step_loss(step):
        starts = np.random.default_rng([o.seed, step]).integers(0, len(stream) - o.block_size, o.batch_size)
        windows = np.stack([stream[s : s + o.block_size + 1] for s in starts]).astype(np.int64)
        windows, total = torch.from_numpy(windows), 0.0
        for part in windows.split(max(1, o.micro_tokens // o.block_size)):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = model(part[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()) * len(part) / len(windows)
            loss.backward()
            total += loss.item()
        return {"loss": total}

    fit(checkpoint, params, o, step_loss)
    write_safetensors(folder / "model.safetensors", {n: p.data.to(torch.bfloat16) for n, p in params.items()})
    write_json(folder / "config.json", raw)
    checkpoint.finish(folder)


def check_heads(o):
    """Raises InputError where heads don't divide the width into even parts."""
    if o.hidden_size % (2 * o.num_attention_heads) or o.num_attention_heads % o.num_key_value_heads:
        raise InputError(
            f"--num_attention_heads is {o.num_attention_heads}, expected hidden_size {o.hidden_size} to be an even "
            f"multiple of it, and it to be a multiple of num_key_value_heads {o.num_key_value_heads}"
        )


def base_config(o, tokenizer):
    """(LlamaConfig, the config.json that says the same)."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(o, name) for name in (*names, "max_position_embeddings")}
    sizes |= {"vocab_size": len(tokenizer), "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rope_theta": 10000.0}
    config = LlamaConfig(**sizes, head_dim=o.hidden_size // o.num_attention_heads)
    return config, raw | sizes | ends | {"torch_dtype": "bfloat16"}


def init_weights(model):
    """Normal weights of 0.02; what adds into the residual stream shrinks with the depth (GPT-2)."""
    for name, param in model.named_parameters():
        if param.ndim == 2:
            depth = 2 * model.config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            torch.nn.init.normal_(param, std=0.02 / math.sqrt(depth))
    return model


# adapters -----------------------------------------------------------------------------------------------------------


def train_adapters(o):
    """Trains a LoRA for each task in one run: every step holds `batch_size` examples of each task, each sample uses
    its own adapter, and each adapter gets the gradient and the clipping that it would get alone."""
    tasks = load_tasks(required(o, "tasks"), o.only)
    folder = Path(required(o, "pool"))
    if is_pool(folder) and not (folder / "pool.json").exists():
        raise InputError(
            f"{folder}: holds PEFT folders and no pool.json, which would leave them out: name another --pool"
        )
    model, tokenizer = load_llama(o.model, DTYPES.get(o.dtype)), Tokenizer(o.model)
    checkpoint = Checkpoint(folder / "runs" / "adapters", o, [*tasks, f"base {model.fingerprint}"])
    if checkpoint.finished:
        return finished(checkpoint)
    known = read_pool(folder) if (folder / "pool.json").exists() else PoolFolder(folder, {}, template=o.template)
    check_pool(known, model, o, o.template)
    shapes = linear_shapes(model)
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, o.template, o)
    targets = {path: shape for path, shape in shapes.items() if path.endswith(tuple(o.target))}
    if unknown := [t for t in o.target if not any(path.endswith(f".{t}") for path in shapes)]:
        raise InputError(f"--target {unknown[0]}: no such Linear, expected some of {', '.join(LINEARS)}")
    pool = Pool.of([new_adapter(task, targets, o) for task in tasks.values()], targets)
    gate = SampleGate()
    attach(model, pool, gate, dropout=o.dropout)
    model.train()
    params = {f"{path}.{part}": stack[path] for part, stack in (("A", pool.A), ("B", pool.B)) for path in pool.A}

    def step_loss(step):
        picked = [x for name in tasks for x in draw(examples[name], name, step, o.batch_size, o.seed)]
        return adapters_step(model, pool, gate, picked, o)

    fit(checkpoint, params, o, step_loss, clip_each)
    save_adapters(pool, tasks, model, known, o)
    checkpoint.finish(f"{known.path / 'adapters'}/{{{','.join(tasks)}}}")


def check_adapter_options(o):
    """Raises InputError for what would end in a traceback, or in a pool that nothing can read."""
    if not 0 <= o.dropout < 0.99:
        raise InputError(f"--dropout is {o.dropout}, expected 0 or more and less than 0.99")
    if not math.isfinite(o.alpha) or o.alpha <= 0:
        raise InputError(f"--alpha is {o.alpha}, expected a number above 0")
    if "{prompt}" not in o.template:
        raise InputError(f"--template is {o.template!r}, expected a text that holds {{prompt}}")


def new_adapter(task, targets, o):
    """B zero, A uniform within 1/sqrt(i) as PEFT starts it, seeded by the name: the order of tasks changes nothing."""
    seed = int.from_bytes(hashlib.sha256(f"{o.seed}/{task.name}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    A = {p: (torch.rand(o.r, i, generator=generator) * 2 - 1) / math.sqrt(i) for p, (_, i) in targets.items()}
    B = {p: torch.zeros(out, o.r) for p, (out, _) in targets.items()}
    alpha = int(o.alpha) if o.alpha == int(o.alpha) else o.alpha
    config = peft_config(o.r, alpha, o.dropout, o.target, Path(o.model).resolve().name)
    samples = random.Random(f"{o.seed}/{task.name}").sample(task.train, min(o.samples, len(task.train)))
    return Adapter(task.name, A, B, dict.fromkeys(A, alpha / o.r), config, [row["prompt"] for row in samples])


def adapters_step(model, pool, gate, picked, o):
    """Forward and backward of one step; the loss is the sum over adapters of the mean over its response tokens."""
    tokens = {}
    for example in picked:
        tokens[example.task] = tokens.get(example.task, 0) + len(example.ids) - example.n_prompt
    total = 0.0
    for part in micro_batches(picked, o.micro_tokens):
        batch = collate(part)
        gate.set(*fixed_rows(pool, [{name: 1.0} for name in batch.tasks]))
        share = torch.tensor([1 / tokens[name] for name in batch.tasks])[:, None].expand(batch.ids.shape)
        loss = (lm_losses(model, batch) * share[batch.predicts]).sum()
        loss.backward()
        total += loss.item()
    return {"loss": total / len(tokens)}


def lm_losses(model, batch):
    """Cross-entropy of each response token (in the order of batch.predicts): the head sees only those positions."""
    hidden = model.model(batch.ids)[batch.predicts]
    targets = batch.ids.roll(-1, 1)[batch.predicts]
    return F.cross_entropy(model.head(hidden).float(), targets, reduction="none")


def clip_each(stacks, limit):
    """Clips each adapter's gradient by its own norm; stacks are (e, ., .). Returns the largest norm before."""
    norms = torch.stack([s.grad.pow(2).sum((1, 2)) for s in stacks]).sum(0).sqrt()  # (e,)
    if limit:
        factor = (limit / (norms + 1e-6)).clamp(max=1.0)
        for stack in stacks:
            stack.grad.mul_(factor[:, None, None])
    return float(norms.max())


def check_pool(known, model, o, template):
    """Raises InputError where a pool's adapters were made for another base or with another template than this run's."""
    if known.fingerprint not in (None, model.fingerprint):
        raise InputError(f"{known.path / 'pool.json'}: made for another base than {o.model} (fingerprint differs)")
    if known.adapters and known.template != template:
        raise InputError(f"{known.path / 'pool.json'}: template is {known.template!r}, this run's {template!r}")


def save_adapters(pool, tasks, model, known, o):
    """Writes the adapters, then pool.json that names them beside those that were there."""
    for name in tasks:
        adapter = pool.adapter(name)
        for part in (adapter.A, adapter.B):
            part.update({p: y.to(DTYPES[o.save_dtype]) for p, y in part.items()})
        save_adapter(adapter, known.path / "adapters" / name)
    adapters = known.adapters | {name: known.path / "adapters" / name for name in tasks}
    write_pool(PoolFolder(known.path, adapters, model.fingerprint, o.template))


# gates --------------------------------------------------------------------------------------------------------------


def train_gates(o):
    """MeteoRA's gates, base and adapters frozen: LM cross-entropy on the response + beta * the gate term on every
    token (papers: MeteoRA, training objective). At top-1 every weight is the constant 1, so the LM loss has no
    gradient and is not computed: nothing then needs a backward pass through the network."""
    known = read_pool(required(o, "pool"))
    tasks = load_tasks(required(o, "tasks"), sorted(known.adapters))
    if o.top_k < 1 or o.top_k > len(known.adapters):
        raise InputError(f"--top_k is {o.top_k}, expected 1 to {len(known.adapters)}, the adapters of {known.path}")
    model, tokenizer = load_llama(o.model, DTYPES.get(o.dtype)), Tokenizer(o.model)
    check_pool(known, model, o, known.template)
    shapes = linear_shapes(model)
    adapters = [load_adapter(path, name, shapes) for name, path in sorted(known.adapters.items())]
    bound = [f"{adapter.name} {adapter.hash}" for adapter in adapters]
    checkpoint = Checkpoint(known.path / "runs" / f"gates_top{o.top_k}", o, [*bound, f"base {model.fingerprint}"])
    if checkpoint.finished:
        return finished(checkpoint)
    pool = Pool.of(adapters, shapes, model.model.embed_tokens.weight.dtype)
    zeros = {path: torch.zeros(pool.capacity, A.shape[2]) for path, A in pool.A.items()}
    gates = {path: MeteoraGate(G, o.top_k, o.gate_temperature) for path, G in zeros.items()}
    attach(model, pool, gates)
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, o)
    names, gate_loss = sorted(tasks), GateLoss(gates)

    def step_loss(step):
        turns = [divmod(j, len(names)) for j in range(step * o.batch_size, (step + 1) * o.batch_size)]  # balanced
        picked = [draw(examples[names[j]], names[j], turn, 1, o.seed)[0] for turn, j in turns]
        return gates_step(model, pool, gate_loss, picked, o)

    fit(checkpoint, {f"{path}.gate.weight": gate.weight for path, gate in gates.items()}, o, step_loss)
    gate_loss.remove()
    for gate in gates.values():
        gate.weight.data = gate.weight.data.to(DTYPES[o.save_dtype])
    file = known.path / "gates" / f"meteora_top{o.top_k}.safetensors"
    save_gates(file, gates, pool, o.top_k, pool.names)
    checkpoint.finish(file)


def gates_step(model, pool, gate_loss, picked, o):
    """Forward and backward of one step; returns the two losses and the gates' top-1 accuracy over all tokens."""
    use_lm = o.top_k > 1 and o.lm_weight > 0
    n = sum(len(example.ids) for example in picked)
    n_response = n - sum(example.n_prompt for example in picked)
    seen = {"lm_loss": 0.0, "gate_loss": 0.0, "right": 0.0}
    for part in micro_batches(picked, o.micro_tokens):
        batch = collate(part)
        labels = torch.tensor([pool.slot(name) for name in batch.tasks])[:, None].expand(batch.ids.shape)
        gate_loss.start(labels.masked_fill(~batch.real, -100).flatten())
        lm_loss = lm_losses(model, batch).sum() / n_response if use_lm else model.model(batch.ids).new_zeros(())
        gate_term = gate_loss.total * batch.real.sum() / n
        (o.lm_weight * lm_loss.float() + o.beta * gate_term).backward()
        seen["lm_loss"] += lm_loss.item()
        seen["gate_loss"] += gate_term.item()
        seen["right"] += float(gate_loss.right.mean()) / n
    return seen if use_lm else {key: seen[key] for key in ("gate_loss", "right")}


# Shared small things ------------------------------------------------------------------------------------------------


def required(o, name):
    if not getattr(o, name):
        raise InputError(f"--{name} is missing")
    return getattr(o, name)


def tokenize(tasks, tokenizer, vocab_size, template, o):
    """{task name: [Example]} of the train splits, those over --max_length left out with a warning."""
    examples, long = {}, 0
    for name, task in tasks.items():
        examples[name], dropped = encode_all(tokenizer, template, task.train, name, o.max_length)
        check_ids([index for example in examples[name] for index in example.ids], vocab_size)
        long += dropped
    if long:
        warn(f"{long} training examples of more than --max_length {o.max_length} tokens are left out")
    return examples


def finished(checkpoint):
    print(f"{checkpoint.folder}: finished already", file=sys.stderr)


def main():
    commands = {"base": BaseRun, "adapters": AdaptersRun, "gates": GatesRun}
    command, o = parse_command(commands, description="Train a base, adapters or gates.")
    least = {"steps": 1, "batch_size": 1, "micro_tokens": 1, "save_every": 1, "lr": 0, "warmup": 0, "clip": 0}
    least |= {"r": 1, "samples": 0} if command == "adapters" else {}
    least |= {"seed": 0, **dict.fromkeys(BASE_SIZES, 1)} if command == "base" else {}
    for name, smallest in least.items():
        if not getattr(o, name) >= smallest:
            raise InputError(f"--{name} is {getattr(o, name)}, expected at least {smallest}")
    if command == "adapters":
        check_adapter_options(o)
    if command == "base":
        check_heads(o)
    print(json.dumps(asdict(o)), file=sys.stderr)
    {"base": train_base, "adapters": train_adapters, "gates": train_gates}[command](o)


if __name__ == "__main__":
    run_script(main)
