"""LoGo (arXiv 2511.07129): the adapters that a prompt's last token excites most, by one forward pass.

logo            score_j = geometric mean over j's Linears of  (||B_j A_j x|| / ||x||) / usual_j
logo_norm       score_j = mean over all Linears of  scale_j ||B_j A_j x||, as in the paper
logo_entropy    score_j = mean over all Linears of  1 / entropy of softmax(scale_j B_j A_j x)
..._last        the same in the last block's q_proj alone, as in the released code

x is a Linear's input for the prompt's last token; usual_j is the same ratio for everyday prompts. The
paper's score compares adapters by their size: one of a higher scale, or on more Linears, wins
whatever is asked. Dividing by usual_j cancels scale, rank and the choice of Linears (LOG.md has
figures of both).
"""

import torch
from torch import Tensor, nn

from common.files import InputError
from common.template import encode_wrapped
from methods.protocol import FixedMixture, all_but
from methods.session import Mole, Ranking
from moe_lora import AX, Mixture, attach, detach
from pool.retriever import base_alone
from pool.stacks import warn_if_uneven

# Everyday prompts: an adapter's output on them is what is usual for it.
EVERYDAY = (
    "What is the capital of France?", "Write a short poem about the sea.", "How do I cook rice?",
    "Explain gravity to a child.", "Translate to Spanish: good morning", "What is 12 times 9?",
    "Name three animals that live in the sea.", "Why is the sky blue?",
    "Summarise: The meeting was moved to Friday.", "Is this sentence correct? He go home.",
    "My computer is slow. What can I do?", "List the planets.",
)  # fmt: skip


class LoGo(FixedMixture):
    """The k adapters with the highest scores, weighed by them."""

    pattern = r"logo(_norm|_entropy)?(_last)?(?:_top([1-9][0-9]{0,5}))?"
    names = ("logo", "logo_top1", "logo_norm", "logo_entropy", "logo_last", "logo_norm_last_top20")
    about = "LoGo: the k adapters that a prompt's last token excites most, or most surely; no training"
    paper = "2511.07129"
    decides = "per request"
    retrieves = "by a forward pass"

    def __init__(self, name: str, top_k: int, measure: str | None, last: str | None, k: str | None):
        super().__init__(name, top_k)
        self.best = int(k or 0)  # 0: as many as are retrieved
        self.measure = (measure or "").removeprefix("_")
        self.last = bool(last)

    def check_adapters(self, mole: Mole) -> None:
        """Raises InputError where logo_last finds no adapter in the Linear that it looks at."""
        if self.last:
            last_q_proj(mole)

    def retrieve(self, mole: Mole, prompts: list[str], ids, k: int, exclude: tuple) -> list[Ranking]:
        """The k adapters with the highest scores."""
        return logo(mole, ids, self.best or k, exclude, self.measure, self.last)

    @classmethod
    def default(cls, mole: Mole, k: int, k_asked: bool) -> tuple[str, str] | None:
        """logo_top1: the best method where nothing is trained and samples are missing (LOG.md)."""
        lacking = [member for member in mole.pool.members.values() if not member.adapter.samples]
        some = "none" if len(lacking) == len(mole.pool.members) else f"{len(lacking)} not"
        return "logo_top1", f"no gates, and {some} with samples: --init adds them"

    def weights(self, mole: Mole, found: Ranking, exclude: tuple) -> dict[str, float]:
        """Scores over their sum."""
        total = sum(score for _, score in found) or 1.0
        return {name: score / total for name, score in found}


class LogoProbe(nn.Module):
    """Computes the scores of one Linear, in which no token uses an adapter.

    `score` (e,) is that of the last token: log(||B_j A_j x|| / ||x||), or the term of logo_norm or
    logo_entropy where `measure` is "norm" or "entropy".
    """

    sequential = True

    def __init__(self, B: Tensor, scale: Tensor, measure: str = ""):
        super().__init__()
        self.B = B
        self.scale = scale
        self.measure = measure
        self.score = None

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> a Mixture of weight 0; keeps `score`."""
        a = ax(torch.arange(len(self.B), device=x.device)[None].expand(len(x), -1))[-1]  # (e, r)
        v = torch.einsum("er,eor->eo", a.float(), self.B.float())
        if self.measure == "entropy":
            v = v * self.scale[:, None]
            entropy = -(v.softmax(-1) * v.log_softmax(-1)).sum(-1)
            self.score = 1 / entropy.clamp(min=1e-6)
        elif self.measure == "norm":
            self.score = v.norm(dim=-1) * self.scale.abs()
        else:
            relative = v.norm(dim=-1) / x[-1].float().norm().clamp(min=1e-30)
            self.score = relative.clamp(min=1e-30).log()
        nothing = torch.zeros(len(x), 1, device=x.device)
        return Mixture(nothing.long(), nothing)


@torch.inference_mode()
def logo(mole: Mole, ids: list[list[int]], k: int, exclude=(), measure="", last=False) -> list[Ranking]:
    """For each of the prompts `ids` the k adapters with the highest scores, by a forward pass of the
    base. With `last` only the last block's q_proj counts. Raises InputError where every adapter is
    excluded, and where no adapter changes that q_proj."""
    pool = mole.pool
    names = all_but(pool, exclude)
    if not names:
        raise InputError("method logo: every adapter is excluded")
    pool.need(names)
    linears = [last_q_proj(mole)] if last else list(range(len(pool.A)))
    has = torch.stack([(scale != 0).float() for scale in pool.scale.values()])[linears]  # (Linears, e)
    scores = probe(mole, ids, measure)[:, linears]  # (prompts, Linears, e)
    if measure:
        warn_if_uneven(pool, f"logo_{measure}")
        scores = scores.mean(1) * has.any(0)
    else:
        excess = (scores - usual(mole)[linears]) * has
        scores = (excess.sum(1) / has.sum(0).clamp(min=1)).exp() * has.any(0)
    found = []
    for score in scores:
        named = {name: float(score[pool.slot(name)]) for name in names}
        best = sorted(named, key=lambda name: (-named[name], name))[:k]
        found.append([(name, round(named[name], 6)) for name in best])
    return found


def last_q_proj(mole: Mole) -> int:
    """The position in pool.A of the last block's q_proj. Raises InputError where it isn't there."""
    path = f"model.layers.{mole.model.config.num_hidden_layers - 1}.self_attn.q_proj"
    if path not in mole.pool.A:
        raise InputError(f"method logo_last: no adapter of the pool changes {path}: use logo")
    return list(mole.pool.A).index(path)


def usual(mole: Mole) -> Tensor:
    """(Linears, e): the mean of the probes' scores over the everyday prompts. Kept until the pool or the
    template changes."""
    key = (id(mole.pool), mole.pool.version, mole.pool.capacity, mole.template)
    if mole.logo_usual is None or mole.logo_usual[0] != key:
        ids = [encode_wrapped(mole.tokenizer, mole.template, prompt) for prompt in EVERYDAY]
        mole.logo_usual = (key, probe(mole, ids).mean(0))
    return mole.logo_usual[1]


def probe(mole: Mole, ids: list[list[int]], measure: str = "") -> Tensor:
    """(prompts, Linears, e): the probes' scores for each prompt's last token."""
    pool = mole.pool
    probes = {path: LogoProbe(pool.B[path], pool.scale[path], measure) for path in pool.A}
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
