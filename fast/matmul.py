"""x W^T of few tokens and of many, as the processor does it fastest."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fast import compiled

# What this processor has no products for: torch would go through them token by token, ten times as long (LOG.md).
_PRODUCTS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
WIDENED = tuple(dtype for dtype, has in _PRODUCTS.items() if not getattr(torch.ops.mkldnn, has, lambda: False)())


def linear(x, weight, bias=None, dtype=None):
    """x (n, i), weight (o, i) -> (n, o), computed in x's dtype or another. In a compiled block without gradients one
    token's is a sum, on a CPU without a faster product a few tokens' are: these read the weights faster than the
    library does, and are joined with what is around them (LOG.md). On a GPU a few tokens' are where another dtype is
    asked for: else the weight, a gate's few rows, would be converted by a kernel of its own."""
    dtype, n = dtype or x.dtype, math.prod(x.shape[:-1])
    cpu = x.device.type == "cpu"
    summed = (dtype == torch.float32 or widened(x, dtype)) if cpu else dtype != x.dtype
    compiling = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if compiling and compiled.at_most(n, compiled.FEW if summed else 1):
        y = _sums_of_few(x, weight) if cpu and not compiled.at_most(n, 1) else _sums(x, weight)
        return (y if bias is None else y + bias).to(dtype)
    return product(x.to(dtype), weight.to(dtype), bias)


def _sums(x, weight):
    """x (n, i) -> (n, o), four rows of the weight at a time."""
    rows, dtype = weight.chunk(4 if len(weight) >= 512 else 1), torch.promote_types(x.dtype, torch.float32)
    return torch.cat([(w[:, None] * x).sum(-1, dtype=dtype) for w in rows]).T


def _sums_of_few(x, weight):
    """x (n, i) -> (n, o) float32, a weight read once for all tokens. A vector holds a number of each token, and several
    rows of the weight are summed at once, as an addition takes cycles, though no more than a set of the cache has
    lines. Of weights of 16 bits and as many tokens as fill one vector it holds numbers of one token, so that as many
    weights are made float32 at once."""
    i, dtype, places = x.shape[1], torch.float32, torch.arange(x.shape[0])  # a slice would be a guard on n
    lanes = compiled.LANES if compiled.at_most(x.shape[0], compiled.LANES) else compiled.FEW
    if weight.dtype == dtype or lanes > compiled.LANES:
        xt = x.new_empty(i, lanes, dtype=dtype)
        xt[:, places] = x.to(dtype).T
        rows = weight.to(dtype).chunk(divisor(len(weight), 7))
        return torch.cat([(w[..., None] * xt).sum(1) for w in rows]).T[places]
    tokens = x.new_empty(lanes, i, dtype=dtype)
    tokens[places] = x.to(dtype)
    return torch.stack([(weight.to(dtype) * token).sum(-1) for token in tokens])[places]


def product(x, weight, bias=None):
    """x (n, i), weight (o, i) -> (n, o) by the library, as it is fastest on a CPU (LOG.md): in float32 where there is
    nothing better, and there, of few tokens, as W x^T."""
    n, wide = math.prod(x.shape[:-1]), widened(x, x.dtype)
    if wide and not compiled.at_most(n, 3):
        rows = [weight] if torch.compiler.is_compiling() else weight.split(max(1, 2**20 // weight.shape[1]))  # in cache
        y = torch.cat([product(x.float(), w.float()) for w in rows], -1)
        return (y if bias is None else y + bias).to(x.dtype)
    if x.dim() == 2 and x.dtype == torch.float32 and x.device.type == "cpu" and compiled.at_most(n, 32):
        y = (weight @ x.T).T.contiguous()
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def divisor(n, most):
    """The largest divisor of n up to `most`."""
    return max(p for p in range(1, most + 1) if n % p == 0)


def widened(x, dtype):
    """Whether products with x in `dtype` take longer than in float32."""
    return x.device.type == "cpu" and dtype in WIDENED


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)
