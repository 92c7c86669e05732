"""x W^T of few tokens and of many, as the processor does it fastest."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import compiled

# What this processor has no products for: torch would go through them token by token, ten times as long (LOG.md).
_PRODUCTS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
WIDENED = tuple(dtype for dtype, has in _PRODUCTS.items() if not getattr(torch.ops.mkldnn, has, lambda: False)())


def linear(x, weight, bias=None, dtype=None):
    """x (n, i), weight (o, i) -> (n, o), computed in x's dtype or another. Few tokens in a compiled block are sums of
    four rows at a time, which read the weights faster than the library's products do (LOG.md)."""
    dtype = dtype or x.dtype
    few = compiled.SUMS if dtype == torch.float32 or widened(x, dtype) else 1
    compiling = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if compiling and compiled.at_most(math.prod(x.shape[:-1]), few):
        rows = weight.chunk(4 if len(weight) >= 512 else 1)
        y = torch.cat([(w[:, None] * x).sum(-1, dtype=torch.float32) for w in rows]).T
        return (y if bias is None else y + bias).to(dtype)
    return product(x.to(dtype), weight.to(dtype), bias)


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


def widened(x, dtype):
    """Whether products with x in `dtype` take longer than in float32."""
    return x.device.type == "cpu" and dtype in WIDENED


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)
