"""LoGo (arXiv 2511.07129): the adapters that make most of a prompt's last token, by one forward
pass of the base."""

import torch
from torch import nn

from common.files import InputError
from methods.protocol import FixedMixture
from moe_lora import Mixture, attach, detach
from pool.retriever import base_alone


class LoGo(FixedMixture):
    """The k adapters that make most of the last token, or are surest of it, weighed by their
    scores."""

    pattern = "logo|logo_entropy"
    names = ("logo", "logo_entropy")
    about = "LoGo: the k adapters that make most of the prompt's last token, or are surest of it; no training"
    paper = "2511.07129"
    retrieves = "by a forward pass"

    def retrieve(self, mole, prompts, ids, k, exclude):
        """The k adapters of the highest scores."""
        return logo(mole, ids, k, exclude, self.name)

    def weights(self, mole, pool, found, exclude):
        """Scores over their sum."""
        total = sum(score for _, score in found) or 1.0
        return {name: score / total for name, score in found}


class LogoProbe(nn.Module):
    """LoGo's look at one Linear: no token uses an adapter, and `score` (e,) is what each would make of the last token,
    ||s B A x|| or, with logo_entropy, 1 / entropy of softmax(s B A x)."""

    sequential = True

    def __init__(self, B, scale, method="logo"):
        super().__init__()
        self.B = B
        self.scale = scale
        self.method = method
        self.score = None

    def forward(self, x, sample, ax):
        """x (n, i) -> a Mixture of weight 0; keeps `score`."""
        a = ax(torch.arange(len(self.B), device=x.device)[None].expand(len(x), -1))[-1]  # (e, r)
        v = torch.einsum("er,eor->eo", a.float(), self.B.float()) * self.scale[:, None]
        entropy = -(v.softmax(-1) * v.log_softmax(-1)).sum(-1)
        self.score = v.norm(dim=-1) if self.method == "logo" else 1 / entropy.clamp(min=1e-6)
        nothing = torch.zeros(len(x), 1, device=x.device)
        return Mixture(nothing.long(), nothing)


@torch.inference_mode()
def logo(mole, ids, k, exclude=(), method="logo"):
    """LoGo (arXiv 2511.07129): [(adapter, score), ...] for each of the prompts `ids`, the k best.
    One forward pass of the base; an adapter's score is the size of what it makes of the last token,
    the norm of s B A x, or with logo_entropy one over the entropy of its softmax, each as a mean
    over the Linears."""
    mole.pool.need([name for name in mole.pool.names if name not in exclude])
    names = [name for name in mole.pool.resident if name not in exclude]
    if not names:
        raise InputError(f"method {method}: every adapter is excluded")
    probes = {path: LogoProbe(mole.pool.B[path], mole.pool.scale[path], method) for path in mole.pool.A}
    found = []
    with base_alone(mole.model):
        attach(mole.model, mole.pool, probes)
        try:
            for row in ids:  # one by one: no padding, and the last token is the last
                mole.model.model(torch.tensor([row], device=mole.device))
                total = torch.stack([probe.score for probe in probes.values()]).mean(0)  # (e,)
                scores = {name: float(total[mole.pool.slot(name)]) for name in names}
                best = sorted(scores, key=lambda name: (-scores[name], name))[:k]
                found.append([(name, round(scores[name], 6)) for name in best])
        finally:
            detach(mole.model)
    return found
