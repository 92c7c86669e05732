"""LoGo (arXiv 2511.07129): the adapters that change a prompt's last token most, by one forward pass.

logo            score_j = ||B_j A_j x|| / (||B_j A_j|| ||x||), x the last token's input, ||.|| of a
                matrix the Frobenius norm; the mean over the Linears that the adapter has
logo_entropy    score_j = 1 / entropy of softmax(s_j B_j A_j x); the mean over all Linears

The paper's norm is s_j ||B_j A_j x||, over all Linears. With it adapters of a higher scale or on
more Linears win whatever is asked; divided by their size they win where they fit (LOG.md).
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

    pattern = r"logo(?:_entropy)?(?:_top([1-9]\d*))?"
    names = ("logo", "logo_top1", "logo_entropy")
    about = "LoGo: the k adapters that change the prompt's last token most, or most surely; no training"
    paper = "2511.07129"
    retrieves = "by a forward pass"

    def __init__(self, name: str, top_k: int, k: str | None):
        super().__init__(name, top_k)
        self.best = int(k or 0)  # of those of --retrieve
        self.by_entropy = name.startswith("logo_entropy")

    def retrieve(self, mole: Mole, prompts: list[str], ids, k: int, exclude: tuple) -> list[Ranking]:
        """The k adapters of the highest scores."""
        return logo(mole, ids, self.best or k, exclude, self.by_entropy)

    @classmethod
    def default(cls, mole: Mole, k: int, k_asked: bool) -> tuple[str, str] | None:
        """Where there is nothing but adapters: of the gates without training the best (LOG.md)."""
        lacking = [member for member in mole.pool.members.values() if not member.adapter.samples]
        return "logo_top1", f"no gates, and {len(lacking)} without samples, which --init adds"

    def weights(self, mole: Mole, pool: Pool, found: Ranking, exclude: tuple) -> dict[str, float]:
        """Scores over their sum."""
        total = sum(score for _, score in found) or 1.0
        return {name: score / total for name, score in found}


class LogoProbe(nn.Module):
    """LoGo's look at one Linear: no token uses an adapter, `score` (e,) is of the last token."""

    sequential = True

    def __init__(self, A: Tensor, B: Tensor, scale: Tensor, by_entropy: bool = False):
        super().__init__()
        self.B = B
        self.scale = scale
        self.by_entropy = by_entropy
        self.size = matrix_norms(A, B) * scale.abs()  # (e,)
        self.score = None

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> a Mixture of weight 0; keeps `score`."""
        a = ax(torch.arange(len(self.B), device=x.device)[None].expand(len(x), -1))[-1]  # (e, r)
        v = torch.einsum("er,eor->eo", a.float(), self.B.float()) * self.scale[:, None]
        if self.by_entropy:
            entropy = -(v.softmax(-1) * v.log_softmax(-1)).sum(-1)
            self.score = 1 / entropy.clamp(min=1e-6)
        else:
            self.score = v.norm(dim=-1) / (self.size * x[-1].float().norm()).clamp(min=1e-30)
        nothing = torch.zeros(len(x), 1, device=x.device)
        return Mixture(nothing.long(), nothing)


def matrix_norms(A: Tensor, B: Tensor) -> Tensor:
    """||B_j A_j||, Frobenius, of A (e, r, i) and B (e, o, r) -> (e,): the trace of B^T B A A^T is
    its square, so that no (o, i) matrix is formed."""
    inner = B.float().mT @ B.float()  # (e, r, r)
    outer = A.float() @ A.float().mT
    return (inner * outer).sum((1, 2)).clamp(min=0).sqrt()


@torch.inference_mode()
def logo(mole: Mole, ids: list[list[int]], k: int, exclude=(), by_entropy=False) -> list[Ranking]:
    """For each of the prompts `ids` the k adapters of the highest scores, by a forward pass of the
    base. Raises InputError where every adapter is excluded."""
    pool = mole.pool
    names = all_but(pool, exclude)
    if not names:
        raise InputError("method logo: every adapter is excluded")
    pool.need(names)
    probes = {}
    for path, A in pool.A.items():
        probes[path] = LogoProbe(A, pool.B[path], pool.scale[path], by_entropy)
    sizes = torch.stack([probe.size for probe in probes.values()])  # (Linears, e)
    share = torch.ones_like(sizes) if by_entropy else (sizes > 0).float()
    share = share / share.sum(0).clamp(min=1)
    found = []
    with base_alone(mole.model):
        attach(mole.model, pool, probes)
        try:
            for row in ids:  # one by one: no padding, and the last token is the last
                mole.model.model(torch.tensor([row], device=mole.device))
                score = (torch.stack([probe.score for probe in probes.values()]) * share).sum(0)  # (e,)
                scores = {name: float(score[pool.slot(name)]) for name in names}
                best = sorted(scores, key=lambda name: (-scores[name], name))[:k]
                found.append([(name, round(scores[name], 6)) for name in best])
        finally:
            detach(mole.model)
    return found
