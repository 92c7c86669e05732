"""Small random Llama folders, a small tokenizer, random adapters, pools and gates."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from common.llama_folder import read_config
from common.tensors import write_safetensors
from methods.session import find_mole, load_weights
from model import Llama, LlamaConfig
from moe_lora import MeteoraGate, Mixture
from pool.adapters import Adapter, linear_shapes, peft_config, save_adapter
from pool.slots import Pool

RANKS = {"ant": 2, "bee": 7, "cat": 3, "dog": 5, "eel": 1}

# A small Llama: every size another number, so that a wrong axis can't pass. h = 44 = 4 heads of 11
# is no multiple of head_dim 6, 4 query heads share 2 key heads.
SMALL = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 331, "hidden_size": 44,
    "intermediate_size": 67, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6,
    "max_position_embeddings": 97, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def write_llama(folder, seed=0, dtype=torch.float32, **fields):
    """A random Llama as a Hugging Face folder (config.json, model.safetensors); weights large
    enough to matter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL | fields))
    model = Llama(LlamaConfig(**read_config(folder)))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, param in model.state_dict().items():
        noise = torch.randn(param.shape, generator=generator)
        tensors[name] = (1 + 0.1 * noise if "norm" in name else noise * 0.15).to(dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def tokenizer_bytes(vocab_size=331):
    """A sentencepiece model with byte fallback, trained on a few lines."""
    text = [
        "the quick brown fox jumps over the lazy dog",
        "what is the plural of mouse",
        "sort these words for me",
    ] * 9
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=out, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return out.getvalue()


def random_adapter(name, shapes, r=3, alpha=7.0, seed=0, targets=None, size=0.3):
    """An Adapter with random A and B on `targets` (module suffixes, default all) of `shapes`
    (linear_shapes)."""
    generator = torch.Generator().manual_seed(seed)
    used = {p: s for p, s in shapes.items() if targets is None or p.endswith(tuple(targets))}
    A = {p: torch.randn(r, i, generator=generator) * size for p, (_, i) in used.items()}
    B = {p: torch.randn(o, r, generator=generator) * size for p, (o, _) in used.items()}
    names = sorted({p.rpartition(".")[2] for p in used})
    return Adapter(name, A, B, dict.fromkeys(A, alpha / r), peft_config(r, alpha, 0.0, names, "small"))


def write_adapters(folder, model, names, **options):
    """Random adapters of ranks 2, 3, 5, 7, ... as PEFT folders under `folder`; returns {name:
    folder}."""
    ranks, shapes = (2, 3, 5, 7, 11, 13), linear_shapes(model)
    for j, name in enumerate(names):
        save_adapter(
            random_adapter(name, shapes, ranks[j % len(ranks)], seed=j, **options), Path(folder) / name
        )
    return {name: Path(folder) / name for name in names}


def make_pool(shapes, names=RANKS, capacity=None, rank=1, **options):
    """Five adapters of ranks 1 to 7, small enough that roundings don't grow through the layers;
    `names` sets the order."""
    adapters = [random_adapter(n, shapes, RANKS[n], seed=RANKS[n], size=0.1, **options) for n in names]
    pool = Pool({p: shapes[p] for p in shapes if p in adapters[0].A}, capacity or len(adapters), rank)
    for adapter in adapters:
        pool.add(adapter)
    return pool


def random_gates(pool, k, temperature=1.0, seed=0):
    """{module path: MeteoraGate} whose logits are of order 1, rows seeded by name: the order of the
    pool doesn't matter."""
    gates = {}
    for index, (path, A) in enumerate(pool.A.items()):
        G = torch.zeros(pool.capacity, A.shape[2])
        for name in pool.names:
            row = torch.randn(
                A.shape[2], generator=torch.Generator().manual_seed(1000 * seed + 10 * index + RANKS[name])
            )
            G[pool.slot(name)] = row * 0.3
        gates[path] = MeteoraGate(
            G, k, temperature, torch.tensor([j < len(pool.names) for j in range(pool.capacity)])
        )
    return gates


class LoudestGate(nn.Module):
    """A gate of one's own: the k adapters whose A x is longest, in equal shares."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x, sample, ax):
        idx = ax().norm(dim=-1).topk(self.k, -1).indices  # (n, k)
        return Mixture(idx, torch.full(idx.shape, 1 / self.k))


def load_mole(model, pool=None, extra=(), **how):
    """A Mole with its weights; `extra` [(name, PEFT folder)] may name one twice, as a command line
    may."""
    return load_weights(find_mole(model, pool, extra), **how)
