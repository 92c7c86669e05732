"""Llama, whole: token ids in, logits out, with a KV cache. Knows nothing of LoRA.

Llama 1, 2, 3, 3.1, 3.2 and what shares their architecture (SmolLM2, TinyLlama): pre-norm blocks of
grouped-query attention with rotary positions, and a SwiGLU MLP. Module names are Hugging Face's.

The blocks see all tokens of a batch as one tensor (n, h); only attention knows which sequence a
token belongs to. A batch is ids (b, t), rows padded on the right: causal attention never looks to
the right, so padding needs no mask. In training it may also be ids (1, n) of packed sequences.
Letters: b batch, t positions, n tokens, s attended keys, h hidden size, d head_dim, v vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.llama_folder import read_config, read_weights, rope_context, without_init

LayerCache = tuple[Tensor, Tensor]  # one layer's keys and values (b, kv heads, capacity, d)


@dataclass
class LlamaConfig:
    """What config.json says. The names are Hugging Face's, except those of the last two fields."""

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

    @property
    def context(self) -> int:
        """The most positions that a sequence may have; some kinds of RoPE stretch it."""
        return rope_context(self.max_position_embeddings, self.rope)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, then times weight in x's dtype; x (n, h) -> (n, h)."""

    def __init__(self, h: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(h))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(n, h) -> (n, h)."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Causal attention; several query heads share a key-value head (grouped-query attention)."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.d = c.head_dim
        q_size = c.num_attention_heads * c.head_dim
        kv_size = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=c.attention_bias)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor, layout: "Layout", stored: LayerCache | None = None) -> Tensor:
        """x (n, h) -> (n, h); `stored` is read and written."""
        q = self.q_proj(x).unflatten(-1, (-1, self.d))  # (n, heads, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.d))  # (n, kv heads, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.d))  # (n, kv heads, d)
        q = rotate(q, layout.cos, layout.sin)
        k = rotate(k, layout.cos, layout.sin)
        return self.o_proj(attend(q, k, v, layout, stored))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); x (n, h) -> (n, h)."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h) -> (n, h)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer; x (n, h) -> (n, h)."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, layout: "Layout", stored: LayerCache | None = None) -> Tensor:
        """(n, h) -> (n, h); `stored` is read and written."""
        x = x + self.self_attn(self.input_layernorm(x), layout, stored)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything under Hugging Face's `model.` prefix: token ids in, normed hidden states out."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.config = c
        self.token_rows = TokenRows()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids: Tensor, cache=None, counts=None, depth=None, lengths=None) -> Tensor:
        """ids (b, t) -> (b, t, h), through `depth` blocks (default: all). With a KVCache, row j's ids
        continue its cached tokens; the first counts[j] (default: all) are cached, the rest is
        padding; ValueError if full. Uncached ids (1, n) may be packed sequences of `lengths`."""
        if cache is not None and counts is None:
            counts = torch.full_like(cache.lengths, ids.shape[1])
        x = self.embed_tokens(ids.flatten())  # (n, h)
        layout = lay_out(self.config, ids, cache, counts, lengths, x.dtype)
        self.token_rows.sample = layout.sample
        x = self.run_blocks(x, layout, cache, depth)
        if cache is not None:
            cache.advance(counts, ids.shape[1])
        return self.norm(x).view(*ids.shape, -1)

    def run_blocks(self, x: Tensor, layout: "Layout", cache=None, depth=None) -> Tensor:
        """x (n, h) through the first `depth` blocks -> (n, h)."""
        if cache is not None and cache.end:  # an empty cache needs no mask: causal attention
            layout.mask = visible(layout.positions, cache.end)
        for index, block in enumerate(self.layers[:depth]):
            x = block(x, layout, None if cache is None else (cache.k[index], cache.v[index]))
        return x


class Llama(nn.Module):
    """ids (b, t) -> logits (b, t, v): `model` computes hidden states, `head` their logits."""

    linear = staticmethod(F.linear)  # x W^T for the head and the loss; fast/ sets a faster one

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.fingerprint = None  # () -> a hash of the weights as stored, set by load_llama
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(v, h)."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def head(self, hidden: Tensor) -> Tensor:
        """(..., h) -> logits (..., v)."""
        return self.linear(hidden, self.head_weight)

    def forward(self, ids: Tensor, cache=None, counts=None) -> Tensor:
        """ids (b, t) -> logits (b, t, v); see Trunk.forward."""
        return self.head(self.model(ids, cache, counts))

    def new_cache(self, b: int, capacity: int) -> "KVCache":
        """An empty KVCache for b sequences of at most `capacity` tokens."""
        return KVCache(self.config, b, capacity, self.head_weight.dtype, self.head_weight.device)


class TokenRows:
    """Set by Trunk.forward for wrapped Linears, since a Linear's forward gets only x."""

    sample = None  # (n,) int64, each token's row of the batch or index of its packed sequence


@dataclass
class Layout:
    """What every block needs to know about the n tokens of one forward."""

    positions: Tensor  # (b, t) int64, of each token in its sequence; packed: (1, n)
    sample: Tensor  # (n,) int64, see TokenRows
    lengths: list[int] | None  # of the packed sequences, if ids are packed
    cos: Tensor  # (n, 1, d)
    sin: Tensor  # (n, 1, d), its first half negated, as rotate() expects
    mask: Tensor | None = None  # (b, 1, t, s) bool, True: the token sees the key; None: causal


def lay_out(config: LlamaConfig, ids: Tensor, cache, counts, lengths, dtype: torch.dtype) -> Layout:
    """The Layout of ids (b, t); see Trunk.forward. Raises ValueError if the cache is too small."""
    b, t = ids.shape
    device = ids.device
    step = torch.arange(max(lengths or [t]), device=device)
    if lengths:
        positions = torch.cat([step[:length] for length in lengths])[None]
        repeats = torch.tensor(lengths, device=device)
    else:
        positions = step.expand(b, t)
        repeats = torch.full((b,), t, device=device)
    sample = torch.repeat_interleave(repeats, output_size=ids.numel())  # row j, repeats[j] times
    if cache is not None:
        if cache.end + t > cache.capacity:
            raise ValueError(f"cache of {cache.capacity} positions is full: {cache.end} + {t}")
        positions = cache.lengths[:, None] + positions
    ends = repeats if cache is None else cache.lengths + counts  # (b,)
    angle = positions.reshape(-1, 1, 1) * rope_frequencies(config, ends[sample])  # (n, 1, d/2)
    cos = torch.cat((angle.cos(), angle.cos()), -1)
    sin = torch.cat((-angle.sin(), angle.sin()), -1)
    return Layout(positions, sample, lengths, cos.to(dtype), sin.to(dtype))


def visible(positions: Tensor, cached: int) -> Tensor:
    """positions (b, t) -> mask (b, 1, t, cached + t): True for keys up to the token itself."""
    keys = torch.arange(cached + positions.shape[1], device=positions.device)  # (s,)
    return keys <= positions[:, None, :, None]


def rope_frequencies(config: LlamaConfig, lengths: Tensor) -> Tensor:
    """Inverse frequencies (d/2,), float32. For 'dynamic' (n, 1, d/2), which depends on `lengths`
    (n,): the present length of each token's sequence."""
    rope = config.rope
    d = config.head_dim
    theta = rope["rope_theta"]
    if rope["rope_type"] == "dynamic":
        beyond = (lengths[:, None, None] / config.max_position_embeddings - 1).clamp(min=0)
        theta = theta * (1 + rope["factor"] * beyond) ** (d / (d - 2))
    frequency = 1.0 / theta ** (torch.arange(0, d, 2, device=lengths.device).float() / d)
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    if rope["rope_type"] == "llama3":  # stretch long waves, keep short ones, interpolate between
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        width = rope["high_freq_factor"] - rope["low_freq_factor"]
        keep = ((turns - rope["low_freq_factor"]) / width).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / rope["factor"]
    return frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (n, heads, d) -> the same, each pair (x_j, x_{j + d/2}) rotated by its token's angle."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cos + swapped * sin


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, stored=None) -> Tensor:
    """q (n, heads, d), k, v (n, kv heads, d) -> (n, heads * d): causal attention within each
    sequence. New keys and values are written into `stored`, the layer's part of the cache."""
    if layout.lengths:
        sequences = zip(*(y.split(layout.lengths) for y in (q, k, v)), strict=True)
        return torch.cat([softmax_attention(q[None], k[None], v[None])[0] for q, k, v in sequences])
    b = len(layout.positions)
    q, k, v = (y.unflatten(0, (b, -1)) for y in (q, k, v))  # (b, t, heads, d)
    if stored is not None:
        k, v = remember(k, v, layout, stored)
    return softmax_attention(q, k, v, layout.mask).flatten(0, 1)


def remember(k: Tensor, v: Tensor, layout: Layout, stored: LayerCache) -> LayerCache:
    """Writes k, v (b, t, kv heads, d) into the cache and returns the keys and values to attend to,
    (b, s, kv heads, d). Padding is written too; the row's next tokens overwrite it."""
    rows = torch.arange(len(k), device=k.device)[:, None]
    for tensor, new in zip(stored, (k, v), strict=True):
        tensor[rows, :, layout.positions] = new  # indexed by (b, 1) and (b, t): (b, t, kv heads, d)
    if layout.mask is None:
        return k, v
    return tuple(tensor[:, :, : layout.mask.shape[-1]].transpose(1, 2) for tensor in stored)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal unless there is a mask (b, 1, t, s): q (b, t, heads, d),
    k, v (b, s, kv heads, d) -> (b, t, heads * d)."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)


class KVCache:
    """Keys and values of past tokens, never recomputed: k, v (layers, b, kv heads, capacity, d).
    Row j has lengths[j] <= end tokens. `replayable` is for fast/: while it keeps one value other
    than None, the caller promises that steps differ in their token ids alone."""

    replayable = None

    def __init__(self, config: LlamaConfig, b: int, capacity: int, dtype: torch.dtype, device):
        shape = (config.num_hidden_layers, b, config.num_key_value_heads, capacity, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(b, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.end = 0

    def advance(self, counts: Tensor, t: int) -> None:
        """After a forward of t positions: row j has counts[j] more tokens, the rest was padding."""
        self.lengths += counts
        self.end += int(counts.max()) if t > 1 else 1  # for t = 1 counts isn't read: no GPU wait


def load_llama(folder, dtype: torch.dtype | None = None, device="cpu") -> Llama:
    """A Llama from a Hugging Face folder, frozen, in eval mode; `dtype` None: as stored. No second
    copy of the weights ever exists. Raises InputError (common/files.py) for a folder that is bad."""
    config = LlamaConfig(**read_config(folder))
    with torch.device("meta"), without_init():
        model = Llama(config)
    tensors, model.fingerprint = read_weights(folder, model.state_dict(), dtype, device)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:  # the file's head differs
        config.tie_word_embeddings = False
        model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, False, device="meta")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()
