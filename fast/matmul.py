"""x W^T of a decode batch and of a prompt, the fastest way for the CPU or GPU at hand."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fast.compiled import MAX_DECODE_ROWS, SIMD_LANES, statically_at_most

_MATMULS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


def _has_matmul(dtype):
    return getattr(torch.ops.mkldnn, _MATMULS[dtype], lambda: False)()


# Dtypes in which this CPU has no matmul: torch computes it token by token there, in ten times the
# time (LOG.md).
WIDENED = tuple(dtype for dtype in _MATMULS if not _has_matmul(dtype))


class FastLinear(nn.Linear):
    """nn.Linear, computed by linear() below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., i) -> (..., o)."""
        return linear(x, self.weight, self.bias)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x (n, i), weight (o, i) -> (n, o), computed in x's dtype or in `dtype`.

    In a compiled block without gradients this is a fused multiply-and-sum for one token. On a CPU
    it is one for a decode batch too, in float32 or where the CPU has no matmul of the dtype: such
    loops read the weights faster than the library does, and fuse with what is around them (LOG.md).
    On a GPU it is one for a decode batch where another dtype is asked for: else a separate kernel
    would convert the weight, which is a gate's few rows.
    """
    dtype = dtype or x.dtype
    n = math.prod(x.shape[:-1])
    cpu = x.device.type == "cpu"
    fused = (dtype == torch.float32 or widened(x, dtype)) if cpu else dtype != x.dtype
    compiling = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if compiling and statically_at_most(n, MAX_DECODE_ROWS if fused else 1):
        several = cpu and not statically_at_most(n, 1)
        y = _multiply_and_sum_batch(x, weight) if several else _multiply_and_sum(x, weight)
        return (y if bias is None else y + bias).to(dtype)
    return gemm(x.to(dtype), weight.to(dtype), bias)


def _multiply_and_sum(x, weight):
    """x (n, i) -> (n, o); four chunks of the weight's rows are independent sums, which hide the
    latency of dependent adds."""
    rows = weight.chunk(4 if len(weight) >= 512 else 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([(w[:, None] * x).sum(-1, dtype=dtype) for w in rows]).T


def _multiply_and_sum_batch(x, weight):
    """x (n, i) -> (n, o) float32, each weight read once for all tokens.

    A SIMD vector holds one number of each token. Up to seven rows of the weight are summed at a
    time: independent sums hide the latency of dependent adds, and more would exceed the lines of a
    cache set. With 16-bit weights and tokens that fit one vector, a vector holds numbers of one
    token instead, so that as many weights are widened to float32 at once.
    """
    i = x.shape[1]
    dtype = torch.float32
    tokens = torch.arange(x.shape[0])  # a slice would be a guard on n
    lanes = SIMD_LANES if statically_at_most(x.shape[0], SIMD_LANES) else MAX_DECODE_ROWS
    if weight.dtype == dtype or lanes > SIMD_LANES:
        xt = x.new_empty(i, lanes, dtype=dtype)
        xt[:, tokens] = x.to(dtype).T
        rows = weight.to(dtype).chunk(largest_divisor(len(weight), 7))
        return torch.cat([(w[..., None] * xt).sum(1) for w in rows]).T[tokens]
    padded = x.new_empty(lanes, i, dtype=dtype)
    padded[tokens] = x.to(dtype)
    return torch.stack([(weight.to(dtype) * token).sum(-1) for token in padded])[tokens]


def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (n, i), weight (o, i) -> (n, o) by the library, the fastest way on a CPU (LOG.md): in
    float32 where the CPU has no matmul of x's dtype, and in float32 as W x^T up to 32 tokens."""
    n = math.prod(x.shape[:-1])
    if widened(x, x.dtype) and not statically_at_most(n, 3):
        in_cache = max(1, 2**20 // weight.shape[1])  # so many rows stay in the cache when converted
        rows = [weight] if torch.compiler.is_compiling() else weight.split(in_cache)
        y = torch.cat([gemm(x.float(), w.float()) for w in rows], -1)
        return (y if bias is None else y + bias).to(x.dtype)
    cpu_float32 = x.dtype == torch.float32 and x.device.type == "cpu"
    if x.dim() == 2 and cpu_float32 and statically_at_most(n, 32):
        y = (weight @ x.T).T.contiguous()
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def widened(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether matmuls in `dtype` on x's device take longer than in float32."""
    return x.device.type == "cpu" and dtype in WIDENED


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return max(p for p in range(1, most + 1) if n % p == 0)
