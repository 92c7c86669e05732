"""LoGo (arXiv 2511.07129): the adapters that change a prompt's last token most, by one forward pass.

logo            score_j = ||s_j B_j A_j x||, x the last token's input, a mean over all Linears
logo_entropy    score_j = 1 / entropy of softmax(s_j B_j A_j x)
"""

import torch
from torch import Tensor, nn

from common.files import InputError
from methods.protocol import FixedMixture, all_but
from methods.session import Mole, Ranking
from moe_lora import AX, Mixture, attach, detach
from pool.retriever import base_alone
from pool.slots import Pool


class LoGo(FixedMixture):
    """The k adapters of the highest scores, weighed by them."""

    pattern = "logo|logo_entropy"
    names = ("logo", "logo_entropy")
    about = "LoGo: the k adapters that change the prompt's last token most, or most surely; no training"
    paper = "2511.07129"
    retrieves = "by a forward pass"

    def retrieve(self, mole: Mole, prompts: list[str], ids, k: int, exclude: tuple) -> list[Ranking]:
        """The k adapters of the highest scores."""
        return logo(mole, ids, k, exclude, self.name)

    def weights(self, mole: Mole, pool: Pool, found: Ranking, exclude: tuple) -> dict[str, float]:
        """Scores over their sum."""
        total = sum(score for _, score in found) or 1.0
        return {name: score / total for name, score in found}


class LogoProbe(nn.Module):
    """LoGo's look at one Linear: no token uses an adapter, `score` (e,) is of the last token."""

    sequential = True

    def __init__(self, B: Tensor, scale: Tensor, method="logo"):
        super().__init__()
        self.B = B
        self.scale = scale
        self.method = method
        self.score = None

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> a Mixture of weight 0; keeps `score`."""
        a = ax(torch.arange(len(self.B), device=x.device)[None].expand(len(x), -1))[-1]  # (e, r)
        v = torch.einsum("er,eor->eo", a.float(), self.B.float()) * self.scale[:, None]
        entropy = -(v.softmax(-1) * v.log_softmax(-1)).sum(-1)
        self.score = v.norm(dim=-1) if self.method == "logo" else 1 / entropy.clamp(min=1e-6)
        nothing = torch.zeros(len(x), 1, device=x.device)
        return Mixture(nothing.long(), nothing)


@torch.inference_mode()
def logo(mole: Mole, ids: list[list[int]], k: int, exclude=(), method="logo") -> list[Ranking]:
    """For each of the prompts `ids` the k adapters of the highest scores, by a forward pass of the
    base. Raises InputError where every adapter is excluded."""
    pool = mole.pool
    names = all_but(pool, exclude)
    if not names:
        raise InputError(f"method {method}: every adapter is excluded")
    pool.need(names)
    probes = {path: LogoProbe(pool.B[path], pool.scale[path], method) for path in pool.A}
    found = []
    with base_alone(mole.model):
        attach(mole.model, pool, probes)
        try:
            for row in ids:  # one by one: no padding, and the last token is the last
                mole.model.model(torch.tensor([row], device=mole.device))
                score = torch.stack([probe.score for probe in probes.values()]).mean(0)  # (e,)
                scores = {name: float(score[pool.slot(name)]) for name in names}
                best = sorted(scores, key=lambda name: (-scores[name], name))[:k]
                found.append([(name, round(scores[name], 6)) for name in best])
        finally:
            detach(mole.model)
    return found
