"""`train.py base`: a small Llama trained from scratch, with its tokenizer.

It exists for tiny/: all of that base's pretraining text is known, so that what the adapters add
is known too. Real bases come from Hugging Face folders.
"""

import hashlib
import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

from common.devices import check_memory, find_device
from common.files import InputError, read_text, write_bytes, write_json
from common.llama_folder import LAYERS, without_init
from common.locks import alone
from common.options import BatchSize, Count, NotNegative
from common.processes import count, rank
from common.tensors import write_safetensors
from common.tokenizer import Tokenizer
from model import Llama, LlamaConfig
from parallel.processes import wait
from pool.load import compile_blocks, make_fast
from training.checkpoint import Checkpoint
from training.loop import Run, finished, fit

SYMBOLS = ("[", "[/", "]", "\n")
FILES = ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")


@dataclass
class BaseRun(Run):
    """Options of `train.py base`."""

    model: str  # folder to write the model into
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = float32; saved as bfloat16
    text: str = ""  # UTF-8 text to train on, an empty line between its documents
    vocab_size: Count = 2048  # size of the sentencepiece vocabulary
    hidden_size: Count = 384  # width
    intermediate_size: Count = 512  # width of the MLP
    num_hidden_layers: Annotated[int, LAYERS] = 4  # blocks
    num_attention_heads: Count = 12  # query heads
    num_key_value_heads: Count = 6  # key and value heads
    max_position_embeddings: Count = 1024  # context
    block_size: Count = 1024  # tokens in a training window
    symbol: list[str] = field(default_factory=lambda: list(SYMBOLS))  # always one token; repeatable
    steps: Count = 3500  # optimizer steps
    batch_size: BatchSize = 4  # windows a step
    micro_tokens: Count = 4096  # tokens in one forward; a larger step accumulates gradients
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for matrices, AdamW for the rest
    lr: NotNegative = 5e-3  # peak learning rate
    weight_decay: NotNegative = 0.1  # the optimizer's weight decay
    save_every: Count = 200  # steps between checkpoints
    compile: bool = True  # torch.compile each block: 1.4 times the speed, 20 s of warm-up


def train_tokenizer(text: str, args: BaseRun, folder: Path) -> None:
    """A sentencepiece BPE model with byte fallback; each digit and --symbol is one token."""
    import sentencepiece

    model = io.BytesIO()
    lines = iter(text.split("\n"))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe",
            vocab_size=args.vocab_size, user_defined_symbols=args.symbol, character_coverage=1.0,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, input_sentence_size=200_000,
            shuffle_input_sentence=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--vocab_size {args.vocab_size}: {reason}") from None
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", config)
    write_bytes(folder / "tokenizer.model", model.getvalue())


def pack_documents(text: str, tokenizer: Tokenizer, args: BaseRun) -> tuple[np.ndarray, np.ndarray]:
    """(token ids of all documents, packed; positions among them where a window may begin).

    A document ends with a line break and EOS. A window begins with a document, so that it holds no
    answer without its question. Raises InputError where the text is shorter than a window.
    """
    ids = []
    for document in text.split("\n\n"):
        if document := document.strip("\n"):
            ids.append(np.array([*tokenizer.encode(f"{document}\n"), tokenizer.eos_id], np.int32))
    stream = np.concatenate(ids)
    begins = np.cumsum([0, *map(len, ids[:-1])])
    if len(stream) <= args.block_size:
        expected = f"expected more than --block_size {args.block_size}"
        raise InputError(f"{args.text}: {len(stream)} tokens, {expected}")
    return stream, begins[begins + args.block_size < len(stream)]


def train_base(args: BaseRun) -> None:
    """Pretrains a Llama of the given size on a text file, with an empty line between documents."""
    if not args.text:
        raise InputError("train.py base needs --text FILE")
    folder = Path(args.model)
    run = folder / "runs" / "base"
    if (folder / "config.json").exists() and not (run / "config.json").exists():
        found = "holds a model that this command didn't make"
        raise InputError(f"{folder}: {found}: name another --model")
    text = read_text(args.text, pipe=True)
    with alone(run):
        _train_base(text, folder, run, args)


def _train_base(text, folder, run, args):
    data = {f"data of {args.text}": hashlib.sha256(text.encode()).hexdigest()}
    checkpoint = Checkpoint(run, args, data)
    if checkpoint.finished:
        return finished(checkpoint)
    if not checkpoint.file.exists() and rank() == 0:
        train_tokenizer(text, args, folder)
    wait()
    tokenizer = Tokenizer(folder)
    stream, begins = pack_documents(text, tokenizer, args)
    config, raw = base_config(args, tokenizer)
    torch.manual_seed(args.seed)
    device = find_device(args.device)
    model = make_fast(init_weights(Llama(config)).to(device))
    params = dict(model.named_parameters())
    size = sum(param.numel() for param in params.values())
    print(f"base: {size:,} parameters, {len(stream):,} tokens", file=sys.stderr)
    half = args.dtype == "bfloat16"
    compile_blocks(model, args.compile, saves=0, costs=0)

    def step_loss(step):
        starts = np.random.default_rng([args.seed, step]).choice(begins, args.batch_size)
        windows = np.stack([stream[s : s + args.block_size + 1] for s in starts]).astype(np.int64)
        windows = torch.from_numpy(windows).to(device)
        share = windows[rank() :: count()]  # this process's
        total = 0.0
        for part in share.split(max(1, args.micro_tokens // args.block_size)) if len(share) else ():
            with torch.autocast(windows.device.type, torch.bfloat16, enabled=half):
                logits = model(part[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
            loss = loss * len(part) / len(windows)
            loss.backward()
            total += loss.item()
        return {"loss": total}

    fit(checkpoint, params, args, step_loss)
    tensors = {name: param.data.to(torch.bfloat16) for name, param in params.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", raw)
    checkpoint.finish(folder, [folder / name for name in FILES])


def check_sizes(args: BaseRun) -> None:
    """Raises InputError where heads don't divide the width into even parts, and where the machine has
    too little memory for the model."""
    heads = args.num_attention_heads
    kv_heads = args.num_key_value_heads
    if args.hidden_size % (2 * heads) or heads % kv_heads:
        raise InputError(
            f"--num_attention_heads is {heads}, expected hidden_size {args.hidden_size} to be an even "
            f"multiple of it, and it to be a multiple of num_key_value_heads {kv_heads}"
        )
    with torch.device("meta"), without_init():
        model = Llama(llama_config(args, args.vocab_size))
    size = 4 * sum(param.numel() * param.itemsize for param in model.parameters())
    what = f"--hidden_size {args.hidden_size} and the other sizes: the weights and what trains them"
    check_memory(what, size, find_device(args.device))


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings")


def llama_config(args: BaseRun, vocab_size: int) -> LlamaConfig:
    """The model that the options ask for."""
    sizes = {name: getattr(args, name) for name in SIZES}
    head_dim = args.hidden_size // args.num_attention_heads
    return LlamaConfig(vocab_size, **sizes, head_dim=head_dim, rms_norm_eps=1e-5, tie_word_embeddings=True)


def base_config(args: BaseRun, tokenizer: Tokenizer) -> tuple[LlamaConfig, dict]:
    """(LlamaConfig, the config.json that says the same)."""
    config = llama_config(args, len(tokenizer))
    sizes = {name: getattr(config, name) for name in SIZES}
    sizes |= {"vocab_size": len(tokenizer), "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    raw |= {"rope_theta": 10000.0, **sizes}
    raw |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return config, raw | {"torch_dtype": "bfloat16"}


def init_weights(model: Llama) -> Llama:
    """Normal weights of 0.02; those that write to the residual stream shrink with depth (GPT-2)."""
    for name, param in model.named_parameters():
        if param.ndim == 2:
            to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * model.config.num_hidden_layers if to_residual else 1
            torch.nn.init.normal_(param, std=0.02 / math.sqrt(depth))
    return model
