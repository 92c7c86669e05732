"""The LM loss of all trainers, which forms no (n, v) logits, and the gate term of MeteoRA's loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from model import Llama
from tasks.folders import Batch

BLOCK = 2048  # vocabulary entries at a time, so that their logits and weights stay in the caches


class BlockwiseCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden states (n, h) under a frozen head W (v, h), and its gradient.

    It goes through the vocabulary block by block, as flash attention goes through keys: there are
    no (n, v) logits, and each weight of the head is read once. `linear` computes x W^T. The target
    is kept apart from the other entries: where the model is nearly certain of it, the gradient is
    a small difference, which rounding would swallow.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, W: torch.Tensor, targets: torch.Tensor, linear: Callable
    ) -> torch.Tensor:
        """hidden (n, h), W (v, h), targets (n,) -> losses (n,), float32."""
        W_target = W[targets].float()  # (n, h)
        logit = (hidden.float() * W_target).sum(-1, True)  # (n, 1), the target's
        top = logit  # the highest so far
        rest = torch.zeros_like(logit)  # sum over the other entries of p = exp(their logit - top)
        W_rest = torch.zeros_like(W_target)  # sum of their rows of W, each times its p
        for first, block in zip(range(0, len(W), BLOCK), W.split(BLOCK), strict=True):
            logits = linear(hidden, block).float()  # (n, BLOCK)
            entries = torch.arange(first, first + len(block), device=W.device)
            logits.masked_fill_(entries == targets[:, None], float("-inf"))
            highest = torch.maximum(top, logits.amax(-1, True))
            rescale = (top - highest).exp()
            p = logits.sub_(highest).exp_()
            rest = rest * rescale + p.sum(-1, True)
            W_rest = W_rest * rescale + linear(p.to(W.dtype), block.T)
            top = highest
        total = rest + (logit - top).exp()
        ctx.save_for_backward(((W_rest - rest * W_target) / total).to(hidden.dtype))
        return (total.log() + top - logit)[:, 0]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient of `hidden` alone, which forward computed with the losses."""
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None


def hidden_states(model: Llama, batch: Batch, padded: bool = False) -> torch.Tensor:
    """(n, h) of the tokens before a response's tokens, in the order of batch.predicts.

    The sequences are packed, so no padding is computed; `padded` rows are for gates that need them.
    """
    if padded:
        return model.model(batch.ids)[batch.predicts]
    hidden = model.model(batch.ids[batch.real][None], lengths=batch.lengths)  # (1, n, h)
    return hidden[0, batch.predicts[batch.real]]


def lm_losses(model: Llama, batch: Batch, padded: bool = False) -> torch.Tensor:
    """Cross-entropy of each response token: the head sees only those positions."""
    hidden = hidden_states(model, batch, padded)
    targets = batch.ids.roll(-1, 1)[batch.predicts]
    return BlockwiseCrossEntropy.apply(hidden, model.head_weight, targets, model.linear)


class GateLoss:
    """The gate term of MeteoRA's loss: one mean cross-entropy over every gate's full e logits
    against the task's own adapter, over all labelled tokens (beta * this is added to the LM loss).

    Gates that have `keep_logits` keep the logits of their last forward until remove().
    """

    def __init__(self, gates: dict[str, nn.Module]):
        self.gates = [gate for gate in gates.values() if hasattr(gate, "keep_logits")]
        for gate in self.gates:
            gate.keep_logits = True

    def __call__(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """labels (n,) int64 (slot, or -100 for none) of the last forward's tokens -> the loss, and
        for each gate in module order how many labelled tokens have their label as top-1: (m,)."""
        logits = torch.stack([gate.logits for gate in self.gates])  # (m, n, e)
        total = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), ignore_index=-100)
        return total, (logits.argmax(-1) == labels).sum(-1)

    def remove(self) -> None:
        """Gates keep no logits any more."""
        for gate in self.gates:
            gate.keep_logits = False
            gate.logits = None
