"""SMEAR (arXiv 2306.03745): one merged adapter a request, by the mean of its prompt.

p = softmax(G mean x) over the prompt's tokens,   A = sum p_j A_j,   B = sum p_j s_j B_j
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import InputError
from methods.protocol import OwnLinears, Trained, member_mask
from methods.session import Mole, PromptMask
from moe_lora import MultiLoRALinear, attach
from pool.gate_files import GateFile
from pool.slots import Pool
from tasks.folders import Batch
from training.gates import GatesTraining


class SmearRouter(nn.Module):
    """p = softmax(G mean x) over a sample's prompt tokens: (b, e) float32, kept until the next
    prompt; set `p` to choose it by hand. `known` (e,) bool as in the gates."""

    def __init__(self, G: Tensor, prompt: PromptMask, known: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(G)  # G (e, i)
        self.prompt = prompt
        self.p = None
        known = torch.ones(len(G), dtype=torch.bool, device=G.device) if known is None else known
        self.register_buffer("known", known, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, i) of b samples -> p (b, e)."""
        if self.prompt.mask is not None:
            mask = self.prompt.mask[..., None]  # (b, t, 1)
            x = x.view(*mask.shape[:2], -1)
            mean = x.float().masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)  # (b, i)
            logits = F.linear(mean, self.weight.float()).masked_fill(~self.known, float("-inf"))
            self.p = F.softmax(logits, dim=-1)
        return self.p


class SmearLinear(MultiLoRALinear):
    """SMEAR: a Linear with one merged adapter a sample, (sum p_j s_j B_j)(sum p_j A_j), p by its
    SmearRouter; every token of a sample uses it, those after the prompt too."""

    def forward(self, x: Tensor) -> Tensor:
        """x (n, i) -> (n, o)."""
        y = self.base(x)
        p = self.gate(x)
        x = x.reshape(len(p), -1, x.shape[-1])  # (b, t, i)
        if self.trace is not None:
            self.trace[: x[..., 0].numel()] = p.detach().repeat_interleave(x.shape[1], 0)
        e = p.shape[1]  # slots that joined since the router was made weigh nothing
        scaled = p * self.scale[:e]
        A = torch.tensordot(p.to(x.dtype), self.A[:e].to(x.dtype), 1)  # (b, r, i)
        B = torch.tensordot(scaled.to(x.dtype), self.B[:e].to(x.dtype), 1)  # (b, o, r)
        return y + (x @ A.mT @ B.mT).view(y.shape)


def smear_routers(pool: Pool, prompt: PromptMask, known=None) -> dict[str, SmearRouter]:
    """{module path: SmearRouter}, zero and so uniform at the start, to attach as SmearLinears."""
    routers = {}
    for path, A in pool.A.items():
        G = torch.zeros(pool.capacity, A.shape[2], device=A.device)
        routers[path] = SmearRouter(G, prompt, member_mask(pool, A.device) if known is None else known)
    return routers


class SmearTraining(GatesTraining):
    """Whole rows, as a router needs all of a prompt at once; routers decide by `prompt`."""

    padded = True

    def __init__(self, model, pool: Pool, gates: dict[str, SmearRouter], args, prompt: PromptMask):
        super().__init__(model, pool, gates, args)
        self.prompt = prompt

    def loss(self, batch: Batch, n: int, n_response: int) -> tuple[Tensor, dict[str, float]]:
        """See GatesTraining."""
        self.prompt.mask = batch.prompt
        return super().loss(batch, n, n_response)


class Smear(Trained, OwnLinears):
    """Routers of a file, in Linears of their own."""

    pattern = "smear"
    names = ("smear",)
    about = "SMEAR: one merged adapter a request"
    paper = "2306.03745"
    made_by = "train.py gates --kind smear"
    decides = "per request and Linear, merged"
    kind = "smear"
    has_temperature = False

    def attach(self, mole: Mole, backend: str, exclude: tuple) -> None:
        """SmearLinears with the file's routers."""
        rows = GateFile(self.file(mole), mole.pool, mole.model.fingerprint(), exclude, self.made_by)
        routers = rows.fill(smear_routers(mole.pool, mole.prompt, rows.known), mole.dtype)
        attach(mole.model, mole.pool, routers, backend, make=SmearLinear)

    @classmethod
    def check_run(cls, args, names: list[str]) -> None:
        """Raises InputError for composites, whose prompts are of several tasks."""
        super().check_run(args, names)
        if args.composite:
            raise InputError(
                "--composite goes with neither --fit nor --kind smear: both see one task a prompt"
            )

    @classmethod
    def training(cls, model, pool: Pool, args) -> SmearTraining:
        """Attaches SmearLinears with routers of zero."""
        prompt = PromptMask()
        routers = smear_routers(pool, prompt)
        attach(model, pool, routers, make=SmearLinear)
        return SmearTraining(model, pool, routers, args, prompt)
