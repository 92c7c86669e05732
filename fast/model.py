"""model.py's Llama at speed: FastLlama, a block's compiled halves, decode attention, and install(),
the way in.

Why this room exists. Decoding one token reads every weight once, so its limit is the memory's
bandwidth: SmolLM2-135M has 0.54 GB in float32, which 35 GB/s read in 15 ms. A prompt and a training
step are bound by arithmetic instead: 512 tokens are 0.1 TFLOP, 0.6 s at 180 GFLOP/s. Plain PyTorch
reaches neither limit, because it runs one operation after another: each writes its result to
memory, each costs some microseconds to start, and a gated Linear has a dozen. The operations
themselves are as in model.py and moe_lora.py; what changes here is how they are grouped, laid out
and started. On two CPU cores, float32, 28 adapters, top-2 (LOG.md has all figures, and what did not
help):

    compile a block, not the model   the same graph serves all layers, lengths and batches: seconds to compile instead
                                     of a minute. What stands before attention and what stands after it knows tokens
                                     alone, not sequences, so each half is one graph (compiled.py)
    matmul as multiply-and-sum       for a decode batch F.linear is a call that fuses with nothing. Written as a sum,
                                     the norm, the gate's logits, A x and the residual fuse into one loop that reads
                                     each weight once: base 23.3 to 18.9 ms with the head, eight requests 33.6 to 24.3
                                     (matmul.py)
    gather fused into the sum        the chosen adapters are read where they lie; no copy is made. A prompt with
                                     adapters takes 1.17 times the base's time, computing all 28 takes 1.6 (kernels.py)
    top-k as k maxima                torch.topk is a call of its own, 135 microseconds for 512 x 28, two maxima 60
    q, k, v together                 their gates read the same x, so their logits and their A x are one matmul each,
                                     and so are those of gate and up (moe_lora.py)
    a captured step                  between two steps only four small tensors change, yet guards, allocation and Python
                                     take a third of a step. The kernels of one step are recorded with their buffers and
                                     called again: 21.2 to about 14 ms in bf16; on a GPU a CUDA graph (compiled.py)
    padded rows of B                 rows a multiple of 4 KiB apart share one cache set; 16 numbers more a row: 18.1 to
                                     10.0 ms for a large Linear (kernels.alloc_B)
    float32 where bf16 has no        an AVX2 processor goes through a bf16 matmul token by token, ten times as long as
    instruction                      converting the weights first (matmul.WIDENED)
    known adapters                   in training each token's adapter is given: tokens are sorted by it and multiplied
                                     in groups, n*r*(i+o) multiply-adds for e times as many (kernels.mix_grouped)

How the parts fit. install() turns a Llama's modules into subclasses, in place: Llama into
FastLlama, Trunk into FastTrunk, nn.Linear into FastLinear. Three things are made later, and made
fast because the model says how: model.gated_linear (what attach() wraps a Linear with),
model.new_cache() and model.alloc_B (a pool's layout). Until compile_blocks() the blocks run
uncompiled, with the faster matmuls and the cost model; compiling pays from some hundred tokens on.
pool/load.py alone imports this room, and bench.py, which times it; a test holds that without it
every method gives the same answers.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common.files import warn
from fast import compiled
from fast.compiled import MAX_DECODE_ROWS, mark_dynamic_tokens
from fast.kernels import alloc_B
from fast.matmul import FastLinear, largest_divisor, linear, widened
from fast.moe_lora import FastMultiLoRALinear, forward_together, ready_to_compile
from model import KVCache, Llama, Trunk, remember, rotate, softmax_attention, visible


def install(model):
    """Makes a Llama fast, in place: the same results up to rounding, but for the random numbers of
    LoRA dropout. Blocks are compiled once compile_blocks() says so."""
    model.__class__ = FastLlama
    model.model.__class__ = FastTrunk
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
    return model


class CompiledBlock(NamedTuple):
    """A block's halves, the whole block for a decode batch, and the head, through torch.compile."""

    pre_attention: Callable
    post_attention: Callable
    decode_block: Callable
    head: Callable


class FastLlama(Llama):
    """Llama; what is made for it later is fast as well."""

    gated_linear = FastMultiLoRALinear  # what moe_lora.attach makes
    alloc_B = staticmethod(alloc_B)  # how a pool lays out B
    linear = staticmethod(linear)

    def new_cache(self, b, capacity):
        """An empty FastKVCache for b sequences of at most `capacity` tokens."""
        return FastKVCache(self.config, b, capacity, self.head_weight.dtype, self.head_weight.device)

    def head(self, hidden):
        """(..., h) -> logits (..., v)."""
        run = self.model.compiled
        if run and hidden.dim() == 2 and len(hidden) <= MAX_DECODE_ROWS:
            (hidden,) = mark_dynamic_tokens(hidden.contiguous(), decode=True)
            return run.head(hidden, self.head_weight)
        return linear(hidden, self.head_weight)

    def compile_blocks(self, on=True):
        """From now on blocks run compiled (or, `on` False, no longer); results differ by rounding.
        Without a compiler a warning, and nothing changes."""
        if not on:
            self.model.compiled = None
        elif not self.model.compiled:
            if not compiled.can_compile(self.head_weight.device):
                warn("no C++ compiler here, which torch.compile needs: going on without")
                return
            self.model.compiled = CompiledBlock(
                *map(compiled.compile_for_any_length, (pre_attention, post_attention)),
                *map(compiled.compile_function, (decode_block, linear)),
            )


class FastTrunk(Trunk):
    """Trunk, with compiled blocks where that is asked for and possible: not with `depth`, nor with
    gates that have to run as plain Python."""

    compiled = None  # a CompiledBlock

    def run_blocks(self, x, layout, cache=None, depth=None):
        """x (n, h) -> (n, h); replays, captures or runs a decode step, runs anything else by halves
        of blocks."""
        b, t = layout.positions.shape
        decode = self.compiled is not None and cache is not None and t == 1 and b <= MAX_DECODE_ROWS
        if decode:
            self.token_rows.sample = cache.rows  # kept, as a captured step reads it
            views = cache.views(cache.end + 1)
            inputs = (x, layout.cos, layout.sin, layout.positions)
            replayed = compiled.replay(cache, views, inputs)
            if replayed is not None:
                return replayed
        run = self.compiled if self.compiled and depth is None and ready_to_compile(self.layers) else None
        if run:
            mark_dynamic_tokens(self.token_rows.sample, decode=decode)
        if run and decode:
            return compiled.run_and_capture(run.decode_block, self.layers, cache, views, inputs)
        if cache is not None and cache.end:
            layout.mask = visible(layout.positions, cache.end)
        pre = run.pre_attention if run else pre_attention
        post = run.post_attention if run else post_attention
        for index, block in enumerate(self.layers[:depth]):
            stored = None if cache is None else (cache.k[index], cache.v[index])
            q, k, v = pre(block, x, layout.cos, layout.sin)
            x = post(block, x, attend(q, k, v, layout, stored))
        return x


class FastKVCache(KVCache):
    """KVCache with a position to spare, so that no view of it happens to be contiguous, on which
    torch.compile would specialise; with views for a compiled step, and the captured one."""

    def __init__(self, config, b, capacity, dtype=torch.float32, device=None):
        super().__init__(config, b, capacity + 1, dtype, device)
        self.capacity = capacity
        self.rows = torch.arange(b, device=device)
        self.captured = None
        self._views = (None, [])

    def views(self, end):
        """[(k, v) of each layer] up to `end` and a bit, of a length that seldom changes."""
        end = min(self.capacity, -(-end // 64) * 64)
        if self._views[0] != end:
            views = [(k[:, :, :end], v[:, :, :end]) for k, v in zip(self.k, self.v, strict=True)]
            for view in itertools.chain(*views):
                torch._dynamo.mark_dynamic(view, 2)
                mark_dynamic_tokens(view, decode=True)
            self._views = (end, views)
        return self._views[1]


# A block in parts: what comes before and after attention knows tokens alone, not sequences, so that
# compiled it is one graph for all lengths and batches.


def pre_attention(block, x, cos, sin):
    """x (n, h) -> q (n, heads, d), k, v (n, kv heads, d), rotated to their positions."""
    attention = block.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (
        y.view(len(x), -1, attention.d) for y in forward_together(projections, block.input_layernorm(x))
    )
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def post_attention(block, x, y):
    """The rest of the block: x (n, h) and what attention read, y (n, heads * d) -> (n, h)."""
    x = x + block.self_attn.o_proj(y)
    mlp = block.mlp
    gate, up = forward_together((mlp.gate_proj, mlp.up_proj), block.post_attention_layernorm(x))
    return x + mlp.down_proj(F.silu(gate) * up)


def decode_block(block, x, cos, sin, positions, stored):
    """The whole block for one new token in each row of the cache."""
    return post_attention(block, x, attend_decode(*pre_attention(block, x, cos, sin), stored, positions))


def attend(q, k, v, layout, stored=None):
    """model.attend, in float32 where that is faster; packed sequences of one length go together."""
    if layout.lengths:
        return attend_packed(q, k, v, layout.lengths)
    b = len(layout.positions)
    q, k, v = (y.unflatten(0, (b, -1)) for y in (q, k, v))  # (b, t, heads, d)
    if stored is not None:
        k, v = remember(k, v, layout, stored)
    return fastest_attention(q, k, v, layout.mask).flatten(0, 1)


def attend_packed(q, k, v, lengths):
    """attend() for packed sequences of these lengths; neighbours of one length are one batch."""
    runs = [(t, len(list(some))) for t, some in itertools.groupby(lengths)]
    parts = (y.split([t * b for t, b in runs]) for y in (q, k, v))
    ys = []
    for (_, b), *run in zip(runs, *parts, strict=True):
        ys.append(fastest_attention(*(y.unflatten(0, (b, -1)) for y in run)).flatten(0, 1))
    return torch.cat(ys)


def fastest_attention(q, k, v, mask=None):
    """model.softmax_attention, in float32 where the CPU has nothing better, and for short sequences
    in training, whose backward pass takes half as long (LOG.md)."""
    dtype = q.dtype
    short = q.requires_grad and q.element_size() == 2 and k.shape[1] <= 256
    if short or widened(q, dtype):
        q = q.float()
        k = k.float()
        v = v.float()
    return softmax_attention(q, k, v, mask).to(dtype)


def attend_decode(q, k, v, stored, positions):
    """attend() for one token a row, as fused multiply-and-sums: q (b, heads, d), k, v (b, kv heads,
    d), positions (b, 1) -> (b, heads * d)."""
    b, heads, d = q.shape
    rows = torch.arange(b, device=q.device)
    for tensor, new in zip(stored, (k, v), strict=True):
        tensor[rows, :, positions[:, 0]] = new
    k, v = (tensor[:, :, None].float() for tensor in stored)  # (b, kv heads, 1, capacity, d)
    q_by_row = q.new_empty(
        q.shape
    )  # a buffer: fused into what follows, q would be computed anew for each key
    q_by_row[rows] = q
    q = q_by_row.view(b, k.shape[1], -1, 1, d).float()  # (b, kv heads, group, 1, d)
    score = (q * k).sum(-1) * d**-0.5  # (b, kv heads, group, capacity)
    seen = torch.arange(k.shape[3], device=q.device) <= positions  # (b, capacity)
    p = score.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    parts = v.chunk(
        largest_divisor(d, 4) if v.device.type == "cpu" else 1, -1
    )  # independent sums, as in kernels.py
    y = torch.cat([(p[..., None] * part).sum(-2) for part in parts], -1)
    return y.reshape(b, heads * d).to(stored[0].dtype)
