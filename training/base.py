"""`train.py base`: a small Llama from nothing, with its tokenizer.

It exists for tiny/: a base whose pretraining text is known to the last word, so that what the
adapters bring to it is known too. Real bases come from Hugging Face folders.
"""

import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from common.devices import find_device
from common.files import InputError, read_text, write_bytes, write_json, write_safetensors
from common.options import Count, NotNegative
from common.tokenizer import Tokenizer
from model import Llama, LlamaConfig
from pool.load import compile_blocks, make_fast
from training.loop import Checkpoint, Run, finished, fit


@dataclass
class BaseRun(Run):
    """Options of `train.py base`."""

    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the arithmetic, auto = float32; saved in bfloat16
    )
    text: str = ""  # UTF-8 text to train on, an empty line between its documents
    vocab_size: Count = 2048  # sentencepiece pieces
    hidden_size: Count = 384  # width
    intermediate_size: Count = 512  # width of the MLP
    num_hidden_layers: Count = 4  # blocks
    num_attention_heads: Count = 12  # query heads
    num_key_value_heads: Count = 6  # key and value heads
    max_position_embeddings: Count = 1024  # context
    block_size: Count = 1024  # tokens in a training window
    symbol: list[str] = field(
        default_factory=lambda: ["[", "[/", "]", "\n"]
    )  # always tokens of their own; repeatable
    steps: Count = 3500  # optimizer steps
    batch_size: Count = 4  # windows a step
    micro_tokens: Count = 4096  # tokens in one forward; a step of more accumulates gradients
    optimizer: Literal["adamw", "muon"] = "muon"  # for matrices, AdamW for the rest
    lr: NotNegative = 5e-3  # peak learning rate
    weight_decay: NotNegative = 0.1  # the optimizer's
    save_every: Count = 200  # steps between checkpoints
    compile: bool = True  # torch.compile each block: 1.4 times the speed, 20 s of warm-up


def train_tokenizer(text, args, folder):
    """A sentencepiece BPE model with byte fallback, digits and --symbol apart."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.split("\n")), model_writer=model, model_type="bpe", vocab_size=args.vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            user_defined_symbols=args.symbol, character_coverage=1.0, num_threads=1, minloglevel=2,
            input_sentence_size=200_000, shuffle_input_sentence=False,
        )  # fmt: skip
    except RuntimeError as error:
        raise InputError(f"--vocab_size {args.vocab_size}: {' '.join(str(error).split())}") from None
    write_json(
        folder / "tokenizer_config.json", {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    )
    write_bytes(folder / "tokenizer.model", model.getvalue())


def train_base(args):
    """Pretrains a Llama of the given size on a text file, an empty line between documents, packed
    into windows that begin with one. A document ends with a line break, then EOS."""
    if not args.text:
        raise InputError("train.py base needs --text FILE")
    folder = Path(args.model)
    if (folder / "config.json").exists() and not (folder / "runs" / "base" / "config.json").exists():
        raise InputError(f"{folder}: holds a model that this command didn't make: name another --model")
    checkpoint = Checkpoint(folder / "runs" / "base", args)
    if checkpoint.finished:
        return finished(checkpoint)
    text = read_text(args.text)
    if not checkpoint.file.exists():
        train_tokenizer(text, args, folder)
    tokenizer = Tokenizer(folder)
    documents = filter(None, (document.strip("\n") for document in text.split("\n\n")))
    ids = [
        np.array([*tokenizer.encode(f"{document}\n"), tokenizer.eos_id], np.int32) for document in documents
    ]
    stream = np.concatenate(ids)
    begins = np.cumsum([0, *map(len, ids[:-1])])
    begins = begins[
        begins + args.block_size < len(stream)
    ]  # where a window may start: no answer without its question
    if len(stream) <= args.block_size:
        raise InputError(
            f"{args.text}: {len(stream)} tokens, expected more than --block_size {args.block_size}"
        )
    config, raw = base_config(args, tokenizer)
    torch.manual_seed(args.seed)
    device = find_device(args.device)
    model = make_fast(init_weights(Llama(config)).to(device))
    params = dict(model.named_parameters())
    print(
        f"base: {sum(p.numel() for p in params.values()):,} parameters, {len(stream):,} tokens",
        file=sys.stderr,
    )
    half = args.dtype == "bfloat16"
    compile_blocks(model, args.compile, saves=0, costs=0)

    def step_loss(step):
        starts = np.random.default_rng([args.seed, step]).choice(begins, args.batch_size)
        windows = np.stack([stream[s : s + args.block_size + 1] for s in starts]).astype(np.int64)
        windows = torch.from_numpy(windows).to(device)
        total = 0.0
        for part in windows.split(max(1, args.micro_tokens // args.block_size)):
            with torch.autocast(windows.device.type, torch.bfloat16, enabled=half):
                logits = model(part[:, :-1])
            loss = (
                F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
                * len(part)
                / len(windows)
            )
            loss.backward()
            total += loss.item()
        return {"loss": total}

    fit(checkpoint, params, args, step_loss)
    write_safetensors(folder / "model.safetensors", {n: p.data.to(torch.bfloat16) for n, p in params.items()})
    write_json(folder / "config.json", raw)
    checkpoint.finish(folder)


def check_heads(args):
    """Raises InputError where heads don't divide the width into even parts."""
    if (
        args.hidden_size % (2 * args.num_attention_heads)
        or args.num_attention_heads % args.num_key_value_heads
    ):
        raise InputError(
            f"--num_attention_heads is {args.num_attention_heads}, expected hidden_size {args.hidden_size} to be an "
            f"even multiple of it, and it to be a multiple of num_key_value_heads {args.num_key_value_heads}"
        )


def base_config(args, tokenizer):
    """(LlamaConfig, the config.json that says the same)."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    sizes = {name: getattr(args, name) for name in (*names, "max_position_embeddings")}
    sizes |= {"vocab_size": len(tokenizer), "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": 10000.0,
    }
    config = LlamaConfig(**sizes, head_dim=args.hidden_size // args.num_attention_heads)
    return config, raw | sizes | ends | {"torch_dtype": "bfloat16"}


def init_weights(model):
    """Normal weights of 0.02; what adds into the residual stream shrinks with the depth (GPT-2)."""
    for name, param in model.named_parameters():
        if param.ndim == 2:
            depth = (
                2 * model.config.num_hidden_layers
                if name.endswith(("o_proj.weight", "down_proj.weight"))
                else 1
            )
            torch.nn.init.normal_(param, std=0.02 / math.sqrt(depth))
    return model
