"""Llama, whole: config.json and safetensors in, logits out, with a KV cache. Knows nothing of LoRA.

Llama 1, 2, 3, 3.1, 3.2 and what shares their architecture (SmolLM2, TinyLlama): pre-norm blocks of grouped-query
attention with rotary positions and a SwiGLU MLP. Module names and config fields are Hugging Face's, so that loading
is a strict load_state_dict and adapter keys map by stripping a prefix.

Batches are right-padded: row j holds counts[j] real tokens, then anything. Padding needs no mask: causal attention
never looks at what comes later, and in the cache the next real tokens overwrite it. In training rows stand one behind
the other, without padding: only attention knows where one ends. Letters: b batch, t positions, h hidden size, d
head_dim, v vocabulary.
"""

import contextlib
import hashlib
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.files import InputError, check_finite, open_safetensors, parse_json, read_json, read_text, warn
from fast import compiled
from fast.matmul import Linear, divisor, linear, widened

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")

# Config -------------------------------------------------------------------------------------------------------------


@dataclass
class LlamaConfig:
    """The fields of config.json that decide shapes and arithmetic, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    eos_token_ids: tuple = ()


def read_config(path):
    """config.json of a model folder -> LlamaConfig. Raises InputError naming field, value and what is supported."""
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    if not file.exists():
        raise InputError(f"{file}: missing; a model folder holds config.json, safetensors and a tokenizer")
    raw = read_json(file)

    def refuse(name, expected):
        raise InputError(f"{file}: {name} is {raw.get(name)!r}, expected {expected}")

    if raw.get("model_type", "llama") != "llama":
        refuse("model_type", "'llama'")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    sizes = {}
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        sizes[name] = raw.get(name)
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
    sizes["max_position_embeddings"] = raw.get("max_position_embeddings", 2048)
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            refuse(name, "a positive whole number")
    if raw.get("head_dim") is None and sizes["hidden_size"] % heads:
        refuse("num_attention_heads", f"a divisor of hidden_size {sizes['hidden_size']}, or a head_dim field")
    if heads % sizes["num_key_value_heads"]:
        refuse("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    head_dim = raw.get("head_dim") or sizes["hidden_size"] // heads
    if not isinstance(head_dim, int) or head_dim < 1 or head_dim % 2:
        raise InputError(f"{file}: head_dim is {head_dim}, expected a positive even number (rotary pairs)")
    eps = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        refuse("rms_norm_eps", "a number above 0")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(raw.get(name, False), bool):
            refuse(name, "true or false")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), (dict, type(None))):
            refuse(name, "an object or null")
    return LlamaConfig(
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
    """Both layouts: rope_theta + rope_scaling, and the newer rope_parameters that holds everything."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | (raw.get("rope_scaling") or {})
    rope |= raw.get("rope_parameters") or {}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ROPE_TYPES:
        raise InputError(f"{file}: rope type is {rope['rope_type']!r}, supported: {', '.join(ROPE_TYPES)}")
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    for name in ("rope_theta", *needed.get(rope["rope_type"], ())):
        if not isinstance(rope.get(name), (int, float)) or not 0 < rope[name] < math.inf:
            found = f"{name} is {rope.get(name)!r}"
            raise InputError(f"{file}: rope {rope['rope_type']!r}: {found}, expected a number above 0")
    return rope


def _read_eos(raw, folder):
    """generation_config.json decides where it has eos_token_id, as in transformers; each may be an int or a list."""
    eos, generation = raw.get("eos_token_id"), folder / "generation_config.json"
    if generation.exists():
        try:
            eos = read_json(generation).get("eos_token_id", eos)
        except InputError as error:
            warn(f"{error}; using the eos_token_id of config.json")
    eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not all(isinstance(index, int) for index in eos):
        raise InputError(f"{folder}: eos_token_id is {list(eos)}, expected a whole number or a list of them")
    return eos


# Rotary positions ---------------------------------------------------------------------------------------------------


def rope_frequencies(config, length, device=None):
    """Inverse frequencies (d/2,), float32; `length` is the longest position + 1 and matters for 'dynamic' alone."""
    rope, d, theta = config.rope, config.head_dim, config.rope["rope_theta"]
    if rope["rope_type"] == "dynamic" and length > config.max_position_embeddings:
        stretch = rope["factor"] * length / config.max_position_embeddings - (rope["factor"] - 1)
        theta = theta * stretch ** (d / (d - 2))
    exponent = torch.arange(0, d, 2, dtype=torch.int64, device=device).float() / d
    frequency = 1.0 / theta**exponent
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    if rope["rope_type"] == "llama3":  # long waves are stretched, short ones kept, those between interpolated
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / rope["factor"]
    return frequency


def rotate(x, cos, sin):
    """Rotates pairs (x_j, x_{j + d/2}), Hugging Face's split into halves. x (b, heads, t, d); cos, sin (b, 1, t, d)."""
    return x * cos + x.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sin


class KVCache:
    """Keys and values of past tokens, and how many each row holds. The model advances it, no layer does.

    k, v: (layers, b, kv heads, capacity + 1, d), so that no view of them happens to be contiguous, which to a compiler
    would be a graph of its own; lengths: (b,) int64. No row is longer than `end`, a number kept beside the
    tensor so that nobody waits for a device to read it. What is cached stays as the adapters active at that token
    computed it: switching adapters between tokens changes what follows, never the past.
    """

    def __init__(self, config, b, capacity, dtype=torch.float32, device=None):
        shape = (config.num_hidden_layers, b, config.num_key_value_heads, capacity + 1, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(b, dtype=torch.int64, device=device)
        self.rows = torch.arange(b, device=device)  # kept, as a captured step reads it
        self.capacity, self.end = capacity, 0
        self.steady = False  # a promise: from step to step nothing changes but the tokens (compiled.py)
        self.captured, self._views = None, (None, [])

    def views(self, end):
        """For a compiled step: [(k, v) of each layer] up to `end` and a bit, of a length that seldom changes."""
        end = min(self.capacity, -(-end // 64) * 64)
        if self._views[0] != end:
            self._views = end, [(k[:, :, :end], v[:, :, :end]) for k, v in zip(self.k, self.v, strict=True)]
            for view in (view for pair in self._views[1] for view in pair):
                torch._dynamo.mark_dynamic(view, 2)
                compiled.of_any_length(view, few=True)
        return self._views[1]


# The network --------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, h, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(h)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def outputs(linears, x):
    """[(n, o), ...] of Linears of one input x (n, i). What stands in for a Linear may share work with its neighbours in
    a compiled block, by together(linears, x)."""
    if torch.compiler.is_compiling() and hasattr(linears[0], "together"):
        return linears[0].together(linears, x)
    return [linear(x) for linear in linears]


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def qkv(self, x, cos, sin):
        """x (n, h), cos, sin (n, d) -> q (n, heads, d), k, v (n, kv heads, d), turned to their positions."""
        q, k, v = (y.view(len(x), -1, self.d) for y in outputs((self.q_proj, self.k_proj, self.v_proj), x))
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def attend(q, k, v, b, cache=None, positions=None, mask=None):
    """b sequences of t tokens each: q (b*t, heads, d), k, v (b*t, kv heads, d) -> (b*t, heads*d). With a cache (k, v)
    the new keys and values go to `positions` (b, t); a mask (b, 1, t, end) says what of it each token sees, without one
    a token sees the new ones up to itself."""
    n, heads, d = q.shape
    q, k, v = (y.view(b, n // b, -1, d) for y in (q, k, v))
    if cache is not None:
        rows = torch.arange(b, device=q.device)[:, None]
        for past, new in zip(cache, (k, v), strict=True):
            past[rows, :, positions] = new
    k, v = (y.transpose(1, 2) for y in (k, v)) if mask is None else (past[:, :, : mask.shape[-1]] for past in cache)
    dtype = q.dtype
    short = q.requires_grad and q.element_size() == 2 and k.shape[2] <= 256  # half as long a backward pass (LOG.md)
    if short or widened(q, dtype):
        q, k, v = q.float(), k.float(), v.float()
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != k.shape[1]
    )
    return y.transpose(1, 2).reshape(n, heads * d).to(dtype)


def attend_apart(q, k, v, lengths):
    """attend() for sequences of these lengths, one behind the other, without a cache; neighbours of one length go
    together."""
    runs = [(t, len(list(some))) for t, some in itertools.groupby(lengths)]
    parts = (y.split([t * b for t, b in runs]) for y in (q, k, v))
    return torch.cat([attend(*part, b) for part, (_, b) in zip(zip(*parts, strict=True), runs, strict=True)])


def attend_one(q, k, v, cache, positions):
    """attend() for one token a row, t = 1, written as sums, which a compiler joins with what is around them."""
    b, heads, d = q.shape
    rows = torch.arange(b, device=q.device)
    for past, new in zip(cache, (k, v), strict=True):
        past[rows, :, positions[:, 0]] = new
    k, v = (past[:, :, None].float() for past in cache)  # (b, kv heads, 1, capacity, d)
    turned = q.new_empty(q.shape)  # row by row, whatever q is; without it q is computed anew for each key
    turned[rows] = q
    q = turned.view(b, k.shape[1], -1, 1, d).float()  # (b, kv heads, group, 1, d)
    score = (q * k).sum(-1) * d**-0.5  # (b, kv heads, group, capacity)
    seen = torch.arange(k.shape[3], device=q.device) <= positions  # (b, capacity)
    p = score.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    parts = v.chunk(divisor(d, 4) if v.device.type == "cpu" else 1, -1)  # side by side, as in kernels.at_once
    y = torch.cat([(p[..., None] * part).sum(-2) for part in parts], -1)
    return y.reshape(b, heads * d).to(cache[0].dtype)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate, up = outputs((self.gate_proj, self.up_proj), x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Two halves with attention between them: what comes before and after it knows tokens alone, not sequences, so
    that compiled it is one graph for all lengths and batches."""

    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def before(self, x, cos, sin):
        return self.self_attn.qkv(self.input_layernorm(x), cos, sin)

    def after(self, x, y):
        x = x + self.self_attn.o_proj(y)
        return x + self.mlp(self.post_attention_layernorm(x))

    def step(self, x, cos, sin, positions, cache):
        """Both and the attention, for one new token in each row of the cache."""
        return self.after(x, attend_one(*self.before(x, cos, sin), cache, positions))


class Rows:
    """Which row of the batch each of the tokens belongs to that run through the blocks: sample (n,) int64."""

    sample = None


class Trunk(nn.Module):
    """Everything under Hugging Face's `model.` prefix: token ids in, normed hidden states out."""

    def __init__(self, c):
        super().__init__()
        self.config, self.rows = c, Rows()
        self.uncompile()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def compile(self):
        """From now on blocks run compiled (compiled.py); results differ by rounding."""
        if self.compiled_step:
            return
        if not compiled.possible(self.embed_tokens.weight.device):
            warn("no C++ compiler here, which torch.compile needs: going on without")
            return
        self.before, self.after = map(compiled.compile_for_any_length, (Block.before, Block.after))
        self.compiled_step, self.compiled_head = map(compiled.compile_function, (Block.step, linear))

    def uncompile(self):
        """compile() undone."""
        self.before, self.after, self.compiled_step, self.compiled_head = Block.before, Block.after, None, None

    def forward(self, ids, cache=None, counts=None, depth=None, lengths=None):
        """ids (b, t) -> (b, t, h). With a cache, row j's ids follow its cached tokens and counts[j] of them are real
        (default: all); the cache then holds them. `depth`: how many blocks to run, without a cache; default all. With
        `lengths`, a list, ids (1, n) are sequences of these lengths, one behind the other, and there is no cache.
        Raises ValueError where the cache is too small."""
        b, t = ids.shape
        end = max(lengths or [t])
        step = torch.arange(end, device=ids.device)
        positions, mask = torch.cat([step[:some] for some in lengths]) if lengths else step.expand(b, t), None
        if cache is not None:
            end = cache.end + t
            if end > cache.capacity:
                raise ValueError(f"cache of {cache.capacity} positions is full: {cache.end} + {t}")
            counts = torch.full_like(cache.lengths, t) if counts is None else counts
            positions = cache.lengths[:, None] + step  # (b, t)
        x = self.embed_tokens(ids.flatten())  # (n, h)
        dynamic = cache is not None and self.config.rope["rope_type"] == "dynamic"
        length = int((cache.lengths + counts).max()) if dynamic else end  # no other type asks the device
        angle = positions.reshape(-1, 1, 1) * rope_frequencies(self.config, length, ids.device)  # (n, 1, d/2)
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)
        rows = torch.arange(len(lengths or ids), device=ids.device) if cache is None else cache.rows
        repeats = torch.tensor(lengths, device=ids.device) if lengths else t
        self.rows.sample = rows if t == 1 else rows.repeat_interleave(repeats)
        few = bool(self.compiled_step) and cache is not None and t == 1 and b <= compiled.FEW
        if self.compiled_step:
            compiled.of_any_length(self.rows.sample, few=few)
        if few:
            x = compiled.step_through(self.compiled_step, self.layers, x, cos, sin, positions, cache, end)
        else:
            if cache is not None and cache.end:  # an empty cache needs no mask: causal among the new tokens
                mask = torch.arange(end, device=ids.device) <= positions[:, None, :, None]  # (b, 1, t, end)
            for index, layer in enumerate(self.layers[:depth]):
                past = None if cache is None else (cache.k[index], cache.v[index])
                qkv = self.before(layer, x, cos, sin)
                y = attend_apart(*qkv, lengths) if lengths else attend(*qkv, b, past, positions, mask)
                x = self.after(layer, x, y)
        if cache is not None:
            cache.lengths += counts
            cache.end += int(counts.max()) if t > 1 else 1
        return self.norm(x).view(b, t, -1)


class Llama(nn.Module):
    """ids (b, t) -> logits (b, t, v). `model` gives hidden states, `head` turns those that are needed into logits."""

    def __init__(self, config):
        super().__init__()
        self.config, self.fingerprint = config, None
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def head(self, hidden):
        if self.model.compiled_head and hidden.dim() == 2 and len(hidden) <= compiled.FEW:
            (hidden,) = compiled.of_any_length(hidden.contiguous(), few=True)
            return self.model.compiled_head(hidden, self.head_weight)
        return linear(hidden, self.head_weight)

    def forward(self, ids, cache=None, counts=None):
        return self.head(self.model(ids, cache, counts))


# Loading ------------------------------------------------------------------------------------------------------------

# Which config fields decide a tensor's shape, for the message where it doesn't fit.
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
    module = next((m for m in SHAPE_FIELDS if m in name), None)
    return f"decided by {SHAPE_FIELDS[module]}" if module else "decided by hidden_size, num_hidden_layers"


def weight_files(folder):
    """The safetensors files of a model folder, in order. Raises InputError listing every missing shard."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = parse_json(read_text(index), index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: expected an object weight_map of tensor names to file names")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise InputError(f"{index}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}")
        return files
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if list(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: only .bin weights, which are pickles and can run code when loaded; convert them once with "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


@contextlib.contextmanager
def _without_init():
    """No initial weights inside: on the meta device torch would import sympy for them, a second of every start."""
    kept = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    for kind in kept:
        kind.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for kind, reset in kept.items():
            kind.reset_parameters = reset


def find_device(name):
    """A device's name, auto: cuda where there is one. Raises InputError where torch has no such device here."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name).tolist()  # of meta there is nothing to read
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # graphs, timing and random numbers are the current one's
    return name


def load_llama(folder, dtype=None, device="cpu"):
    """A Llama from a Hugging Face folder, frozen, in eval mode. `dtype` None keeps the file's.

    Built on the meta device and filled tensor by tensor, so that no second copy of the weights ever exists. Raises
    InputError for whatever is missing, left over, of the wrong shape or not finite. `fingerprint` is the sha256 over
    each tensor's name, shape and first 256 values: enough to tell bases apart without hashing gigabytes.
    """
    config = read_config(folder)
    with torch.device("meta"), _without_init():
        model = Llama(config)
    expected = model.state_dict()
    found, marks = {}, {}
    for file in weight_files(folder):
        with open_safetensors(file) as tensors:
            for name in sorted(tensors.keys()):
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                    continue  # both follow from the config
                tensor = tensors.get_tensor(name)
                if name not in expected:
                    raise InputError(f"{file}: unexpected tensor {name} {list(tensor.shape)}; {_deciding_fields(name)}")
                got, want = tuple(tensor.shape), tuple(expected[name].shape)
                if got != want:
                    raise InputError(f"{file}: {name} is {got}, expected {want}; {_deciding_fields(name)}")
                if tensor.dtype not in (*DTYPES.values(), torch.float64):
                    raise InputError(f"{file}: {name} holds {tensor.dtype}, expected float32, bfloat16 or float16")
                dtype = dtype or tensor.dtype
                marks[name] = f"{name} {got}".encode() + tensor.flatten()[:256].float().numpy().tobytes()
                found[name] = tensor.to(device, dtype)
                check_finite(file, name, found[name])  # after the cast, which may overflow
    if missing := sorted(expected.keys() - found.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: tensor {missing[0]}{more} missing; {_deciding_fields(missing[0])}")
    model.load_state_dict(found, strict=True, assign=True)
    model.fingerprint = hashlib.sha256(b"".join(marks[name] for name in sorted(marks))).hexdigest()
    return model.requires_grad_(False).eval()
