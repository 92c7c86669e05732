"""model.py's Llama at speed: install(), FastLlama, a block's compiled halves, decode attention.

Why this room exists. Decoding one token reads every weight once, so memory bandwidth is its limit:
SmolLM2-135M has 0.54 GB in float32, which takes 15 ms at 35 GB/s. A prompt and a training step are
bound by arithmetic instead: 512 tokens are 0.1 TFLOP, 0.6 s at 180 GFLOP/s. Plain PyTorch reaches
neither limit, because it runs one operation after another. Each writes its result to memory, each
takes some microseconds to start, and a gated Linear has a dozen. The operations here are those of
model.py and moe_lora.py; what changes is how they are grouped, laid out and started. Figures are
for two CPU cores, float32, 28 adapters, top-2 (LOG.md has all, and what did not help):

    compile a block, not the model   One graph serves all layers, lengths and batches: it compiles
                                     in seconds, not a minute. The parts before and after attention
                                     know only tokens, not sequences: one graph each (compiled.py).
    matmul as multiply-and-sum       For a decode batch F.linear is a call that fuses with nothing.
                                     As a sum, the norm, the gate's logits, A x and the residual
                                     fuse into one loop that reads each weight once. Base with head:
                                     23.3 to 18.9 ms; eight requests: 33.6 to 24.3 ms (matmul.py).
    gather fused into the sum        The chosen adapters are read in place, without a copy. A prompt
                                     with adapters takes 1.17 times the base's time; computing all
                                     28 takes 1.6 times (kernels.py).
    top-k as k maxima                torch.topk doesn't fuse: for 512 x 28 it takes 135
                                     microseconds, two maxima take 60 (kernels.top_k_mixture).
    q, k, v together                 Their gates read the same x, so the logits are one matmul and
                                     A x is another; the same holds for gate and up (moe_lora.py).
    a captured step                  Between two steps only four small tensors change, yet guards,
                                     allocation and Python take a third of a step. So the kernels of
                                     one step are recorded with their buffers and called again: 21.2
                                     to about 14 ms in bf16. On a GPU it is a CUDA graph (compiled.py).
    padded rows of B                 Rows a multiple of 4 KiB apart share one cache set. 16 more
                                     elements a row: 18.1 to 10.0 ms for a large Linear
                                     (kernels.alloc_B).
    float32 where bf16 has no        An AVX2 processor runs a bf16 matmul token by token. That takes
    instruction                      ten times as long as converting the weights (matmul.WIDENED).
    known adapters                   In training each token's adapter is given. Tokens are sorted by
                                     it and multiplied in groups: n*r*(i+o) multiply-adds instead of
                                     e times as many (kernels.mix_grouped).

How the parts fit. install() changes a Llama's modules to subclasses, in place: Llama to FastLlama,
Trunk to FastTrunk, nn.Linear to FastLinear. Three things are created later, and the model says how:
model.gated_linear (attach() wraps a Linear with it), model.new_cache() and model.alloc_B (the
layout of a pool's B). Until compile_blocks() the blocks run uncompiled, with the faster matmuls and
the cost model; compiling pays off from some hundred tokens on. Only pool/load.py imports this room,
and bench.py, which times it. A test holds that every method gives the same answers without it.
"""

import itertools
import sys
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
from model import (
    Block,
    KVCache,
    Layout,
    Llama,
    LlamaConfig,
    Trunk,
    remember,
    rotate,
    softmax_attention,
    visible,
)


def install(model: Llama) -> Llama:
    """Makes a Llama fast, in place, and returns it. Results stay the same up to rounding.
    Blocks are compiled after compile_blocks()."""
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
    """Llama, which also says how to make its gated Linears, its caches and its pool's B fast."""

    gated_linear = FastMultiLoRALinear  # read by moe_lora.attach
    alloc_B = staticmethod(alloc_B)  # read by the pool
    linear = staticmethod(linear)

    def new_cache(self, b: int, capacity: int) -> "FastKVCache":
        """An empty FastKVCache for b sequences of at most `capacity` tokens."""
        like = self.head_weight
        return FastKVCache(self.config, b, capacity, like.dtype, like.device)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., h) -> logits (..., v)."""
        run = self.model.compiled
        if run and hidden.dim() == 2 and len(hidden) <= MAX_DECODE_ROWS:
            (hidden,) = mark_dynamic_tokens(hidden.contiguous(), decode=True)
            return run.head(hidden, self.head_weight)
        return linear(hidden, self.head_weight)

    def compile_blocks(self, on: bool = True) -> None:
        """Switches compiled blocks on or off; results differ by rounding. Without a compiler it
        warns and changes nothing."""
        if not on:
            self.model.compiled = None
        elif not self.model.compiled:
            if not compiled.can_compile(self.head_weight.device):
                warn("no C++ compiler here, which torch.compile needs: going on without")
                return
            print("compiling the model's blocks, which takes seconds to minutes once", file=sys.stderr)
            self.model.compiled = CompiledBlock(
                pre_attention=compiled.compile_for_any_length(pre_attention),
                post_attention=compiled.compile_for_any_length(post_attention),
                decode_block=compiled.compile_function(decode_block),
                head=compiled.compile_function(linear),
            )


class FastTrunk(Trunk):
    """Trunk, with compiled blocks after compile_blocks(). With `depth`, or with gates that have to
    run as plain Python, the blocks run uncompiled all the same."""

    compiled = None  # a CompiledBlock

    def run_blocks(
        self,
        x: torch.Tensor,
        layout: Layout,
        cache: KVCache | None = None,
        depth: int | None = None,
    ) -> torch.Tensor:
        """x (n, h) -> (n, h). A decode step is replayed, captured or run by whole compiled blocks,
        anything else by the halves of blocks."""
        b, t = layout.positions.shape
        decode = self.compiled is not None and cache is not None and t == 1 and b <= MAX_DECODE_ROWS
        if decode:
            self.token_rows.sample = cache.rows  # the same tensor each time, for captured steps
            views = cache.views(cache.end + 1)
            inputs = (x, layout.cos, layout.sin, layout.positions)
            replayed = compiled.replay(cache, views, inputs)
            if replayed is not None:
                return replayed
        run = None
        if self.compiled and depth is None and ready_to_compile(self.layers, decode):
            run = self.compiled
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
    """KVCache with views for a compiled decode step, and the captured step.

    It has one position more than its capacity, so that no view of it is contiguous: torch.compile
    would specialise on that.
    """

    def __init__(
        self,
        config: LlamaConfig,
        b: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__(config, b, capacity + 1, dtype, device)
        self.capacity = capacity
        self.rows = torch.arange(b, device=device)
        self.captured = None
        self._views = (None, [])

    def views(self, end: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[(k, v) of each layer] up to `end`, rounded up so that their length seldom changes."""
        end = min(self.capacity, -(-end // 64) * 64)
        if self._views[0] != end:
            views = [(k[:, :, :end], v[:, :, :end]) for k, v in zip(self.k, self.v, strict=True)]
            for view in itertools.chain(*views):
                torch._dynamo.mark_dynamic(view, 2)
                mark_dynamic_tokens(view, decode=True)
            self._views = (end, views)
        return self._views[1]


# A block in parts. The parts before and after attention know only tokens, not sequences, so each is
# one compiled graph for all lengths and batches.


def pre_attention(
    block: Block, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (n, h) -> q (n, heads, d), k, v (n, kv heads, d), rotated to their positions."""
    attention = block.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    ys = forward_together(projections, block.input_layernorm(x))
    q, k, v = (y.view(len(x), -1, attention.d) for y in ys)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def post_attention(block: Block, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The rest of the block: x (n, h) and attention's output y (n, heads * d) -> (n, h)."""
    x = x + block.self_attn.o_proj(y)
    mlp = block.mlp
    gate, up = forward_together((mlp.gate_proj, mlp.up_proj), block.post_attention_layernorm(x))
    return x + mlp.down_proj(F.silu(gate) * up)


def decode_block(
    block: Block,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    stored: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The whole block for one new token in each row of the cache."""
    q, k, v = pre_attention(block, x, cos, sin)
    return post_attention(block, x, attend_decode(q, k, v, stored, positions))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    stored: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """model.attend, in float32 where that is faster; equally long packed sequences are batched."""
    if layout.lengths:
        return attend_packed(q, k, v, layout.lengths)
    b = len(layout.positions)
    q, k, v = (y.unflatten(0, (b, -1)) for y in (q, k, v))  # (b, t, heads, d)
    if stored is not None:
        k, v = remember(k, v, layout, stored)
    return fastest_attention(q, k, v, layout.mask).flatten(0, 1)


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """attend() for packed sequences of these lengths; neighbours of one length are one batch."""
    runs = [(t, len(list(run))) for t, run in itertools.groupby(lengths)]
    sizes = [t * b for t, b in runs]
    parts = (y.split(sizes) for y in (q, k, v))
    ys = []
    for (_, b), *run in zip(runs, *parts, strict=True):
        batch = (y.unflatten(0, (b, -1)) for y in run)  # each (b, t, heads, d)
        ys.append(fastest_attention(*batch).flatten(0, 1))
    return torch.cat(ys)


def fastest_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """model.softmax_attention, in float32 where the CPU has no matmul of the dtype, and for short
    sequences in training, where float32 halves the time of the backward pass (LOG.md)."""
    dtype = q.dtype
    short = q.requires_grad and q.element_size() == 2 and k.shape[1] <= 256
    if short or widened(q, dtype):
        q = q.float()
        k = k.float()
        v = v.float()
    return softmax_attention(q, k, v, mask).to(dtype)


def attend_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stored: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
) -> torch.Tensor:
    """attend() for one token a row, as fused multiply-and-sums: q (b, heads, d),
    k, v (b, kv heads, d), positions (b, 1) -> (b, heads * d)."""
    b, heads, d = q.shape
    rows = torch.arange(b, device=q.device)
    for tensor, new in zip(stored, (k, v), strict=True):
        tensor[rows, :, positions[:, 0]] = new
    k, v = (tensor[:, :, None].float() for tensor in stored)  # (b, kv heads, 1, capacity, d)
    # A buffer keeps q from being fused into what follows, which would compute it anew for each key.
    q_by_row = q.new_empty(q.shape)
    q_by_row[rows] = q
    q = q_by_row.view(b, k.shape[1], -1, 1, d).float()  # (b, kv heads, group, 1, d)
    score = (q * k).sum(-1) * d**-0.5  # (b, kv heads, group, capacity)
    seen = torch.arange(k.shape[3], device=q.device) <= positions  # (b, capacity)
    p = score.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    # Independent sums hide the latency of dependent adds, as in kernels.py.
    parts = v.chunk(largest_divisor(d, 4) if v.device.type == "cpu" else 1, -1)
    y = torch.cat([(p[..., None] * part).sum(-2) for part in parts], -1)
    return y.reshape(b, heads * d).to(stored[0].dtype)
