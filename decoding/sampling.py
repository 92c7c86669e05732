"""How tokens are chosen from logits, and when they end."""

from dataclasses import dataclass, field

import torch

from common.fields import check
from common.files import InputError
from common.options import ABOVE_0, COUNT, Above0OrOff, NewTokens, Seed, ShareAbove0, Whole, check_bounds


@dataclass
class Sampling:
    """How tokens are chosen and when they end; temperature 0 is greedy."""

    max_new_tokens: NewTokens = 64  # tokens to generate at most
    temperature: Above0OrOff = 0.0  # the sampler's temperature, 0 = greedy
    sample_top_k: Whole = 0  # sample among the k likeliest tokens, 0 = all
    top_p: ShareAbove0 = 1.0  # sample among the likeliest tokens that hold this much probability
    seed: Seed = 0  # seed for the sampler; prompt j of a batch uses seed + j
    stop: list[str] = field(default_factory=list)  # text that ends an answer, not shown; repeatable


def check_values(sampling: Sampling, top_k: int, gate_temperature: float) -> None:
    """Raises InputError for values that no sampler or gate can use."""
    check_bounds(sampling)
    check("--top_k", top_k, COUNT)
    check("--gate_temperature", gate_temperature, ABOVE_0)
    if "" in sampling.stop:
        raise InputError("--stop is empty, expected the text before which an answer ends")


def sample(logits: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]) -> torch.Tensor:
    """Logits (b, v) float32 -> token ids (b,): greedy, or sampled after top-k and top-p, each row
    with its own generator; -1 where a row's logits aren't all finite."""
    finite = logits.isfinite().all(-1)
    if sampling.temperature == 0:
        return torch.where(finite, logits.argmax(-1), -1)
    logits = logits.masked_fill(~finite[:, None], 0.0)  # multinomial raises an error of its own
    # The largest becomes 0, which no temperature makes infinite; the bound keeps the divisor from
    # being rounded to 0 in float32.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if 0 < sampling.sample_top_k < logits.shape[-1]:
        least = logits.topk(sampling.sample_top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probability = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first token always stays
        probability = probability.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    ids = []
    for row, generator in zip(probability, generators, strict=True):
        ids.append(torch.multinomial(row, 1, generator=generator))
    return torch.where(finite, torch.cat(ids), -1)
