"""x W^T of a decode batch and of a prompt, as the CPU or GPU at hand does it fastest."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fast.compiled import MAX_DECODE_ROWS, SIMD_LANES, statically_at_most

# The dtypes in which this CPU has no matmul: torch would go through it token by token, ten times as
# long (LOG.md).
_MATMULS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
WIDENED = tuple(
    dtype for dtype, has in _MATMULS.items() if not getattr(torch.ops.mkldnn, has, lambda: False)()
)


class FastLinear(nn.Linear):
    """nn.Linear by linear() below."""

    def forward(self, x):
        """x (..., i) -> (..., o)."""
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None, dtype=None):
    """x (n, i), weight (o, i) -> (n, o), computed in x's dtype or another.

    In a compiled block without gradients one token's is a fused multiply-and-sum; on a CPU, in
    float32 or where it has no matmul of that dtype, a decode batch's is too: these read the weights
    faster than the library does, and fuse with what is around them (LOG.md). On a GPU a decode
    batch's is one where another dtype is asked for: else the weight, a gate's few rows, would be
    converted by a kernel of its own.
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
    """x (n, i) -> (n, o), four chunks of the weight's rows side by side: independent sums hide the
    latency of adds."""
    rows = weight.chunk(4 if len(weight) >= 512 else 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([(w[:, None] * x).sum(-1, dtype=dtype) for w in rows]).T


def _multiply_and_sum_batch(x, weight):
    """x (n, i) -> (n, o) float32, each weight read once for all tokens.

    A SIMD vector holds one number of each token, and several rows of the weight are summed side by
    side, to hide the latency of dependent adds, though no more than a cache set has lines. Of
    16-bit weights and as many tokens as fill one vector, a vector holds numbers of one token
    instead, so that as many weights are widened to float32 at once.
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


def gemm(x, weight, bias=None):
    """x (n, i), weight (o, i) -> (n, o) by the library, as it is fastest on a CPU (LOG.md): in
    float32 where there is nothing better, and there, of up to 32 tokens, as W x^T."""
    n = math.prod(x.shape[:-1])
    if widened(x, x.dtype) and not statically_at_most(n, 3):
        in_cache = max(1, 2**20 // weight.shape[1])  # rows that stay in the cache while they are converted
        rows = [weight] if torch.compiler.is_compiling() else weight.split(in_cache)
        y = torch.cat([gemm(x.float(), w.float()) for w in rows], -1)
        return (y if bias is None else y + bias).to(x.dtype)
    if x.dim() == 2 and x.dtype == torch.float32 and x.device.type == "cpu" and statically_at_most(n, 32):
        y = (weight @ x.T).T.contiguous()
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def widened(x, dtype):
    """Whether matmuls with x in `dtype` take longer than in float32."""
    return x.device.type == "cpu" and dtype in WIDENED


def largest_divisor(n, most):
    """The largest divisor of n up to `most`."""
    return max(p for p in range(1, most + 1) if n % p == 0)
