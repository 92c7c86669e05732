"""Reads and checks a Hugging Face Llama folder: plain config fields, plain tensors."""

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import nn

from common.devices import DTYPES, check_memory
from common.fields import POSITIVE, Number, read_field
from common.files import InputError, read_json, warn
from common.fingerprint import file_state, hash_weights
from common.printable import shown
from common.progress import track
from common.tensors import check_finite, open_safetensors

# RoPE type -> the fields that it needs besides rope_theta. 'linear' and 'dynamic' stretch the
# context by their factor; the max_position_embeddings of 'llama3' is the stretched one.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
STRETCHED = ("linear", "dynamic")
STRETCH = Number(float, 1, 1e6)  # factors
SIZE = Number(int, 1, 10_000_000)
WIDTH = Number(int, 1, 1_000_000)  # torch can count the elements of any weight of such sizes
LAYERS = Number(int, 1, 1_000)  # making more takes seconds, even without weights
CONTEXT = Number(int, 1, 1_000_000_000)
SIZES = {"vocab_size": SIZE, "hidden_size": WIDTH, "intermediate_size": SIZE}
SIZES |= {"num_hidden_layers": LAYERS, "num_attention_heads": WIDTH}
EOS_ID = Number(int, 0, 2**31 - 1)
# Fields of Llama's relatives that change the arithmetic and aren't implemented -> the values that
# leave it as it is, as null does. _check_variants has those that depend on the sizes.
SWITCHES = """alibi attn_temperature_tuning parallel_attn qk_layernorm qk_norm rope_interleave
    scale_embedding use_bidirectional_attention use_parallel_residual use_qk_norm"""
FACTORS = """attention_factor embedding_multiplier lm_head_multiplier logit_scale logits_scaling
    partial_rotary_factor residual_multiplier rotary_pct scale_emb"""
ANY = """attention_chunk_size attn_logit_softcapping clip_qkv final_logit_softcapping
    original_max_position_embeddings quantization_config scale_depth"""
NEUTRAL = {
    **dict.fromkeys(SWITCHES.split(), [False]),
    **dict.fromkeys(FACTORS.split(), [1]),
    **dict.fromkeys(ANY.split(), []),  # original_max_... is read inside rope_scaling only
    "hidden_activation": ["silu"],
    "is_causal": [True],
    "norm_type": ["rms_norm", "rmsnorm"],
    "num_experts": [0],
    "num_local_experts": [0],
    "position_embedding_type": ["rope", "rotary"],
}

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
    read = partial(read_field, file, raw)

    def refuse(name, expected):
        raise InputError(f"{file}: {name} is {shown(raw.get(name))}, expected {expected}")

    if read("model_type", str, "llama") != "llama":
        refuse("model_type", "'llama'")
    if read("hidden_act", str, "silu") != "silu":
        refuse("hidden_act", "'silu'")
    fields = {name: read(name, number) for name, number in SIZES.items()}
    heads = fields["num_attention_heads"]
    if raw.get("head_dim") is None and fields["hidden_size"] % heads:
        divisor = f"a divisor of hidden_size {fields['hidden_size']}"
        refuse("num_attention_heads", f"{divisor}, or a head_dim field")
    fields["num_key_value_heads"] = read("num_key_value_heads", WIDTH, heads)
    if heads % fields["num_key_value_heads"]:
        refuse("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    fields["head_dim"] = read("head_dim", WIDTH, fields["hidden_size"] // heads)
    if fields["head_dim"] % 2:
        expected = "a positive even number (rotary pairs)"
        raise InputError(f"{file}: head_dim is {fields['head_dim']}, expected {expected}")
    fields["max_position_embeddings"] = read("max_position_embeddings", CONTEXT, 2048)
    fields["rms_norm_eps"] = read("rms_norm_eps", POSITIVE, 1e-6)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        fields[name] = read(name, bool, False)
    fields["rope"] = _read_rope(raw, file)
    if fields["rope"]["rope_type"] == "dynamic" and fields["head_dim"] < 4:
        expected = "at least 4 with rope 'dynamic', which divides by head_dim - 2"
        raise InputError(f"{file}: head_dim is {fields['head_dim']}, expected {expected}")
    fields["eos_token_ids"] = _read_eos(raw, file)
    _check_variants(raw, fields, file)
    return fields


def _check_variants(raw, fields, file):
    """Refuses a config.json whose arithmetic is another one; `fields` are LlamaConfig's."""
    layers = fields["num_hidden_layers"]
    neutral = NEUTRAL | {
        "attention_multiplier": [fields["head_dim"] ** -0.5],
        "dim_model_base": [fields["hidden_size"]],
        "layer_norm_eps": [fields["rms_norm_eps"]],
        "layer_types": [["full_attention"] * layers],
        "no_rope_layers": [[1] * layers],  # 1 where a layer has RoPE
        "query_pre_attn_scalar": [fields["head_dim"]],
        "rotary_dim": [fields["head_dim"]],
    }
    for name, values in neutral.items():
        if raw.get(name) not in (None, *values):
            expected = " or ".join(json.dumps(value) for value in (None, *values))
            found = f"{name} is {shown(raw[name])}, which isn't implemented"
            raise InputError(f"{file}: {found}: expected {expected}")
    window = raw.get("sliding_window")
    if window is None or raw.get("use_sliding_window") is False:
        return
    context = rope_context(fields["max_position_embeddings"], fields["rope"])
    if read_field(file, raw, "sliding_window", CONTEXT) < context:
        found = f"sliding_window is {window!r}, which isn't implemented"
        raise InputError(f"{file}: {found}: expected null or at least the context, {context}")


def rope_context(max_position_embeddings: int, rope: dict[str, Any]) -> int:
    """How many positions a sequence may have."""
    stretch = rope["factor"] if rope["rope_type"] in STRETCHED else 1
    return int(max_position_embeddings * stretch)


def _read_rope(raw, file):
    """The RoPE fields of rope_theta with rope_scaling, or of the newer rope_parameters."""
    objects = [read_field(file, raw, name, dict, {}) for name in ("rope_scaling", "rope_parameters")]
    given = objects[0] or objects[1]  # as in transformers
    rope = {"rope_theta": raw.get("rope_theta")}
    rope |= {name: value for name, value in given.items() if value is not None}
    kind = rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in list(ROPE_FIELDS):  # a list, as a JSON value may be unhashable
        supported = ", ".join(ROPE_FIELDS)
        raise InputError(f"{file}: rope type is {shown(kind)}, supported: {supported}")
    where = f"{file}: rope {kind!r}"
    rope["rope_theta"] = read_field(where, rope, "rope_theta", POSITIVE, 10000.0)
    for name in ROPE_FIELDS[kind]:
        rope[name] = read_field(where, rope, name, STRETCH if name == "factor" else POSITIVE)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        found = f"low_freq_factor is {rope['low_freq_factor']:g}"
        raise InputError(
            f"{where}: {found}, expected less than high_freq_factor {rope['high_freq_factor']:g}"
        )
    known = {"rope_type", "type", "rope_theta", *ROPE_FIELDS["llama3"]}
    for name in sorted(rope.keys() - known):
        if rope[name] not in NEUTRAL.get(name, []):
            raise InputError(f"{where}: {name} is {shown(rope[name])}, which isn't implemented")
    return rope


def _read_eos(raw, file):
    """The eos_token_id of generation_config.json, else of config.json, as in transformers."""
    generation = file.with_name("generation_config.json")
    if generation.exists():
        try:
            preferred = read_json(generation)
        except InputError as error:
            warn(f"{error}; using the eos_token_id of config.json")
        else:
            if "eos_token_id" in preferred:
                raw, file = preferred, generation
    eos = read_field(file, raw, "eos_token_id", (EOS_ID, [EOS_ID]), [])
    return tuple(eos) if isinstance(eos, list) else (eos,)


# Weights ------------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
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


def weight_map(folder: str | Path) -> dict[str, Path]:
    """{tensor name: the safetensors file that it counts from} of a model folder.

    The index says so, and what it doesn't list isn't there. As in transformers, a model.safetensors
    that it doesn't name is the whole model. Raises InputError listing every missing shard.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    listed = read_index(index) if index.exists() else {}
    if whole.exists() and whole not in listed.values():
        if index.exists():
            warn(f"{index}: ignored, as it doesn't name {whole.name}, which is the whole model")
        with open_safetensors(whole) as found:
            return dict.fromkeys(found.keys(), whole)
    if index.exists():
        files = sorted(set(listed.values()))
        if missing := [file.name for file in files if not file.exists()]:
            count = f"{len(missing)} of {len(files)} shards"
            raise InputError(f"{index}: {count} are missing: {', '.join(missing)}")
        return listed
    if list(folder.glob("*.bin")):
        convert = "save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        raise InputError(
            f"{folder}: only .bin weights, which are pickles and can run code when loaded; "
            f"convert them once with safetensors.torch.{convert}"
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def read_index(index: Path) -> dict[str, Path]:
    """{tensor name: file} of a model.safetensors.index.json; all files lie in its folder. Raises
    InputError."""
    names = read_field(index, read_json(index), "weight_map", {str: str})
    for name in names.values():
        path = PureWindowsPath(name)  # knows the separators and drives of every system
        if path.anchor or ".." in path.parts:
            raise InputError(f"{index}: weight_map names {name!r}, expected a file in this folder")
    return {tensor: index.parent / name for tensor, name in names.items()}


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
    expected: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, torch.Tensor], Callable[[], str]]:
    """({name: tensor}, fingerprint) of a model folder's safetensors, read one tensor at a time.

    `expected` is the model's state_dict; `dtype` None keeps the file's. Without an lm_head in it,
    which is then tied to the embedding, either may be stored alone, and as in transformers a head
    of other values is returned too. Raises InputError for a tensor that is missing, unexpected, of
    the wrong shape or not finite. fingerprint() is hash_weights() of these tensors, which is
    computed at its first call.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    size = sum(tensor.numel() for tensor in expected.values()) * (dtype or torch.bfloat16).itemsize
    check_memory(f"{Path(folder) / 'config.json'}: its sizes", size, device)
    sources = weight_map(folder)
    tied = HEAD not in shapes
    head_name = EMBEDDING if tied and EMBEDDING not in sources else HEAD
    allowed = shapes | {HEAD: shapes[EMBEDDING]} if tied else shapes
    tensors = {}
    stored_in = {}
    for file in track(sorted(set(sources.values())), "files of weights"):
        state = file_state(file)
        with open_safetensors(file) as found:
            names = set(found.keys())
            here = sorted(name for name, source in sources.items() if source == file)
            for stored in track(here, f"tensors of {file.name}"):
                if stored.endswith("rotary_emb.inv_freq"):  # computed from the config
                    continue
                if stored not in names:
                    raise InputError(f"{file}: no tensor {stored}, which the index says is here")
                tensor = found.get_tensor(stored)
                _check_tensor(file, stored, tensor, allowed)
                dtype = dtype or tensor.dtype
                name = head_name if stored == HEAD else stored
                tensors[name] = tensor.to(device, dtype)
                check_finite(file, stored, tensors[name])  # after the cast, which may overflow
                stored_in[name] = (file, state, stored)
    if missing := sorted(shapes.keys() - tensors.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        first = missing[0]
        raise InputError(f"{folder}: tensor {first}{more} missing; {_deciding_fields(first)}")
    if tied and HEAD in tensors and torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        del tensors[HEAD], stored_in[HEAD]
    return tensors, cache(partial(hash_weights, stored_in))


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
