"""Reads and checks a Hugging Face Llama folder: plain config fields, plain tensors."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.devices import DTYPES
from common.files import InputError, check_finite, open_safetensors, parse_json, read_json, read_text, warn

# RoPE type -> the fields that it needs besides rope_theta.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]

# config.json --------------------------------------------------------------------------------------


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder -> {field of model.LlamaConfig: value}.

    Raises InputError naming the field, its value and what is supported.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    if not file.exists():
        needed = "a model folder holds config.json, safetensors and a tokenizer"
        raise InputError(f"{file}: missing; {needed}")
    raw = read_json(file)

    def refuse(name, expected):
        raise InputError(f"{file}: {name} is {raw.get(name)!r}, expected {expected}")

    if raw.get("model_type", "llama") != "llama":
        refuse("model_type", "'llama'")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    sizes = {name: raw.get(name) for name in SIZES}
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
    sizes["max_position_embeddings"] = raw.get("max_position_embeddings", 2048)
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            refuse(name, "a positive whole number")
    if raw.get("head_dim") is None and sizes["hidden_size"] % heads:
        divisor = f"a divisor of hidden_size {sizes['hidden_size']}"
        refuse("num_attention_heads", f"{divisor}, or a head_dim field")
    if heads % sizes["num_key_value_heads"]:
        refuse("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    head_dim = raw.get("head_dim") or sizes["hidden_size"] // heads
    if not isinstance(head_dim, int) or head_dim < 1 or head_dim % 2:
        expected = "a positive even number (rotary pairs)"
        raise InputError(f"{file}: head_dim is {head_dim}, expected {expected}")
    eps = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        refuse("rms_norm_eps", "a number above 0")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(raw.get(name, False), bool):
            refuse(name, "true or false")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), (dict, type(None))):
            refuse(name, "an object or null")
    return dict(
        **sizes,
        head_dim=head_dim,
        rms_norm_eps=eps,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        rope=_read_rope(raw, file),
        eos_token_ids=_read_eos(raw, folder),
    )


def _read_rope(raw, file):
    """The RoPE fields of rope_theta with rope_scaling, or of the newer rope_parameters."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | (raw.get("rope_scaling") or {})
    rope |= raw.get("rope_parameters") or {}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in list(ROPE_FIELDS):  # a list, as a JSON value may be unhashable
        supported = ", ".join(ROPE_FIELDS)
        raise InputError(f"{file}: rope type is {rope['rope_type']!r}, supported: {supported}")
    for name in ("rope_theta", *ROPE_FIELDS[rope["rope_type"]]):
        if not isinstance(rope.get(name), (int, float)) or not 0 < rope[name] < math.inf:
            found = f"rope {rope['rope_type']!r}: {name} is {rope.get(name)!r}"
            raise InputError(f"{file}: {found}, expected a number above 0")
    return rope


def _read_eos(raw, folder):
    """The eos_token_id of generation_config.json, else of config.json, as in transformers."""
    eos = raw.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.exists():
        try:
            eos = read_json(generation).get("eos_token_id", eos)
        except InputError as error:
            warn(f"{error}; using the eos_token_id of config.json")
    eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not all(isinstance(index, int) for index in eos):
        expected = "a whole number or a list of them"
        raise InputError(f"{folder}: eos_token_id is {list(eos)}, expected {expected}")
    return eos


# Weights ------------------------------------------------------------------------------------------

# The config fields that decide a tensor's shape, for the error where it doesn't fit.
SHAPE_FIELDS = {
    "embed_tokens": "vocab_size, hidden_size",
    "lm_head": "vocab_size, hidden_size (and tie_word_embeddings: whether it exists)",
    "q_proj": "num_attention_heads, head_dim, hidden_size (attention_bias: whether .bias exists)",
    "k_proj": "num_key_value_heads, head_dim, hidden_size (attention_bias: whether .bias exists)",
    "v_proj": "num_key_value_heads, head_dim, hidden_size (attention_bias: whether .bias exists)",
    "o_proj": "num_attention_heads, head_dim, hidden_size (attention_bias: whether .bias exists)",
    "gate_proj": "intermediate_size, hidden_size (mlp_bias: whether .bias exists)",
    "up_proj": "intermediate_size, hidden_size (mlp_bias: whether .bias exists)",
    "down_proj": "intermediate_size, hidden_size (mlp_bias: whether .bias exists)",
}


def _deciding_fields(name):
    for module, names in SHAPE_FIELDS.items():
        if module in name:
            return f"decided by {names}"
    return "decided by hidden_size, num_hidden_layers"


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises InputError listing every missing shard.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in _shards(index)]
        if missing := [file.name for file in files if not file.exists()]:
            count = f"{len(missing)} of {len(files)} shards"
            raise InputError(f"{index}: {count} are missing: {', '.join(missing)}")
        return files
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if list(folder.glob("*.bin")):
        convert = "save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        raise InputError(
            f"{folder}: only .bin weights, which are pickles and can run code when loaded; "
            f"convert them once with safetensors.torch.{convert}"
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _shards(index):
    """The sorted file names of a model.safetensors.index.json."""
    value = parse_json(read_text(index), index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{index}: expected an object weight_map of tensor names to file names")
    return sorted(set(names))


@contextlib.contextmanager
def without_init() -> Iterator[None]:
    """Layers made inside get no initial weights.

    On the meta device torch imports sympy for them, which takes a second of every start.
    """
    kept = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    for kind in kept:
        kind.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for kind, reset in kept.items():
            kind.reset_parameters = reset


def read_weights(
    folder: str | Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, torch.Tensor], str]:
    """({name: tensor}, fingerprint) of a model folder's safetensors, read one tensor at a time.

    `shapes` are those of the model's tensors; `dtype` None keeps the file's. Raises InputError for
    a tensor that is missing, unexpected, of the wrong shape or not finite. The fingerprint is 128
    bits of the sha256 over hash_bytes() of all tensors, whatever file each of them lies in.
    """
    tensors = {}
    marks = {}
    for file in weight_files(folder):
        with open_safetensors(file) as found:
            for name in sorted(found.keys()):
                tied_head = name == "lm_head.weight" and name not in shapes  # it is the embedding
                if tied_head or name.endswith("rotary_emb.inv_freq"):  # computed from the config
                    continue
                tensor = found.get_tensor(name)
                _check_tensor(file, name, tensor, shapes)
                dtype = dtype or tensor.dtype
                tensors[name] = tensor.to(device, dtype)
                check_finite(file, name, tensors[name])  # after the cast, which may overflow
                marks[name] = hash_bytes(name, tensor)  # last: the threads have read the pages
    if missing := sorted(shapes.keys() - tensors.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        first = missing[0]
        raise InputError(f"{folder}: tensor {first}{more} missing; {_deciding_fields(first)}")
    return tensors, hashlib.sha256(b"".join(map(marks.get, sorted(marks)))).hexdigest()[:32]


@cache
def _multipliers():
    """512 odd numbers of 64 bits without a pattern, the same everywhere."""
    data = bytearray(hashlib.shake_128(b"multipliers").digest(512 * 8))
    return torch.frombuffer(data, dtype=torch.int64) | 1


def hash_bytes(name: str, tensor: torch.Tensor) -> bytes:
    """sha256 over a tensor's name, dtype, shape and, instead of its bytes, a sum for each 4 KiB.

    Of 512 words x_j of 64 bits that is the sum of m_j x_j modulo 2^64, the m_j odd: no change of a
    single word is lost, nor, but by a chance of one in 2^64, that of several or of their order. An
    even number of the words' top bits may change within 4 KiB unseen: against mistakes that is
    enough, against an attacker it is not. sha256 over all bytes takes six times as long (LOG.md).
    """
    raw = tensor.reshape(-1).view(torch.uint8)
    rest = len(raw) % 4096
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for part in (raw[: len(raw) - rest], F.pad(raw[len(raw) - rest :], (0, -rest % 4096))):
        if len(part):
            words = part.view(torch.int64).view(-1, 512)
            digest.update(torch.mv(words, _multipliers()).numpy())
    return digest.digest()


def _check_tensor(file, name, tensor, shapes):
    if name not in shapes:
        found = f"unexpected tensor {name} {list(tensor.shape)}"
        raise InputError(f"{file}: {found}; {_deciding_fields(name)}")
    if tuple(tensor.shape) != shapes[name]:
        expected = f"expected {shapes[name]}; {_deciding_fields(name)}"
        raise InputError(f"{file}: {name} is {tuple(tensor.shape)}, {expected}")
    if tensor.dtype not in (*DTYPES.values(), torch.float64):
        expected = "float32, bfloat16 or float16"
        raise InputError(f"{file}: {name} holds {tensor.dtype}, expected {expected}")
