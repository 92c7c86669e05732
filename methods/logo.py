"""LoGo (arXiv 2511.07129): the adapters that a prompt's last token excites most, by one forward pass.

logo            score_j = ||B_j A_j x|| / ||x||, x the last token's input, as a multiple of what it
                is for everyday prompts; the geometric mean over the Linears that the adapter has
logo_entropy    score_j = 1 / entropy of softmax(s_j B_j A_j x); the mean over all Linears

The paper's score is s_j ||B_j A_j x||, over all Linears. It compares adapters by their size: one of a
higher scale, or on more Linears, wins whatever is asked. As a multiple of what is usual for the
adapter itself, scale, rank and the choice of Linears cancel out (LOG.md has both, measured).
"""

import torch
from torch import Tensor, nn

from common.files import InputError
from common.template import encode_wrapped
from methods.protocol import FixedMixture, all_but, warn_if_uneven
from methods.session import Mole, Ranking
from moe_lora import AX, Mixture, attach, detach
from pool.retriever import base_alone
from pool.slots import Pool

# Everyday prompts: an adapter's output on them is what is usual for it.
EVERYDAY = (
    "What is the capital of France?", "Write a short poem about the sea.", "How do I cook rice?",
    "Explain gravity to a child.", "Translate to Spanish: good morning", "What is 12 times 9?",
    "Name three animals that live in the sea.", "Why is the sky blue?",
    "Summarise: The meeting was moved to Friday.", "Is this sentence correct? He go home.",
    "My computer is slow. What can I do?", "List the planets.",
)  # fmt: skip


class LoGo(FixedMixture):
    """The k adapters of the highest scores, weighed by them."""

    pattern = r"logo(?:_entropy)?(?:_top([1-9][0-9]{0,5}))?"
    names = ("logo", "logo_top1", "logo_entropy")
    about = "LoGo: the k adapters that a prompt's last token excites most, or most surely; no training"
    paper = "2511.07129"
    decides = "per request"
    retrieves = "by a forward pass"

    def __init__(self, name: str, top_k: int, k: str | None):
        super().__init__(name, top_k)
        self.best = int(k or 0)  # 0: as many as are retrieved
        self.by_entropy = name.startswith("logo_entropy")

    def retrieve(self, mole: Mole, prompts: list[str], ids, k: int, exclude: tuple) -> list[Ranking]:
        """The k adapters of the highest scores."""
        return logo(mole, ids, self.best or k, exclude, self.by_entropy)

    @classmethod
    def default(cls, mole: Mole, k: int, k_asked: bool) -> tuple[str, str] | None:
        """Where there is nothing but adapters: without training and samples it is the best (LOG.md)."""
        lacking = [member for member in mole.pool.members.values() if not member.adapter.samples]
        some = "none" if len(lacking) == len(mole.pool.members) else f"{len(lacking)} not"
        return "logo_top1", f"no gates, and {some} with samples: --init adds them"

    def weights(self, mole: Mole, pool: Pool, found: Ranking, exclude: tuple) -> dict[str, float]:
        """Scores over their sum."""
        total = sum(score for _, score in found) or 1.0
        return {name: score / total for name, score in found}


class LogoProbe(nn.Module):
    """LoGo's look at one Linear: no token uses an adapter, `score` (e,) is of the last token: log
    (||B_j A_j x|| / ||x||), or 1 / entropy."""

    sequential = True

    def __init__(self, B: Tensor, scale: Tensor, by_entropy: bool = False):
        super().__init__()
        self.B = B
        self.scale = scale
        self.by_entropy = by_entropy
        self.score = None

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> a Mixture of weight 0; keeps `score`."""
        a = ax(torch.arange(len(self.B), device=x.device)[None].expand(len(x), -1))[-1]  # (e, r)
        v = torch.einsum("er,eor->eo", a.float(), self.B.float())
        if self.by_entropy:
            v = v * self.scale[:, None]
            entropy = -(v.softmax(-1) * v.log_softmax(-1)).sum(-1)
            self.score = 1 / entropy.clamp(min=1e-6)
        else:
            relative = v.norm(dim=-1) / x[-1].float().norm().clamp(min=1e-30)
            self.score = relative.clamp(min=1e-30).log()
        nothing = torch.zeros(len(x), 1, device=x.device)
        return Mixture(nothing.long(), nothing)


@torch.inference_mode()
def logo(mole: Mole, ids: list[list[int]], k: int, exclude=(), by_entropy=False) -> list[Ranking]:
    """For each of the prompts `ids` the k adapters of the highest scores, by a forward pass of the
    base. Raises InputError where every adapter is excluded."""
    pool = mole.pool
    names = all_but(pool, exclude)
    if not names:
        raise InputError("method logo: every adapter is excluded")
    pool.need(names)
    scores = probe(mole, ids, by_entropy)  # (prompts, Linears, e)
    if by_entropy:
        warn_if_uneven(pool, "logo_entropy")
        scores = scores.mean(1)
    else:
        has = torch.stack([(pool.scale[path] != 0).float() for path in pool.A])  # (Linears, e)
        excess = (scores - usual(mole)) * has
        scores = (excess.sum(1) / has.sum(0).clamp(min=1)).exp()
    found = []
    for score in scores:
        named = {name: float(score[pool.slot(name)]) for name in names}
        best = sorted(named, key=lambda name: (-named[name], name))[:k]
        found.append([(name, round(named[name], 6)) for name in best])
    return found


def usual(mole: Mole) -> Tensor:
    """(Linears, e): the mean of the probes' scores for everyday prompts, computed anew where the
    pool or the template has changed."""
    key = (id(mole.pool), mole.pool.version, mole.pool.capacity, mole.template)
    if mole.logo_usual is None or mole.logo_usual[0] != key:
        ids = [encode_wrapped(mole.tokenizer, mole.template, prompt) for prompt in EVERYDAY]
        mole.logo_usual = (key, probe(mole, ids).mean(0))
    return mole.logo_usual[1]


def probe(mole: Mole, ids: list[list[int]], by_entropy: bool = False) -> Tensor:
    """The probes' scores of each prompt's last token: (prompts, Linears, e)."""
    pool = mole.pool
    probes = {path: LogoProbe(pool.B[path], pool.scale[path], by_entropy) for path in pool.A}
    found = []
    with base_alone(mole.model):
        attach(mole.model, pool, probes)
        try:
            for row in ids:  # one by one: no padding, and the last token is the last
                mole.model.model(torch.tensor([row], device=mole.device))
                found.append(torch.stack([one.score for one in probes.values()]))
        finally:
            detach(mole.model)
    return torch.stack(found)
