"""Controls: adapters chosen at random. What a method gains over these is due to its choice.

random_gate         weight = softmax over the k largest of  G x / rms(x) / T,   G (e, i) random
random_adapters     weight_j = 1 / k for k adapters drawn for the request

The entries of G are normal with variance 1/i, and x is divided by its root mean square. So over
random G each logit has variance 1 in every Linear, and the k weights of a token differ. With k = 2
of 28 adapters the larger one is about 0.6.

Each draw is a function of the seed, of the adapter's name, and of the Linear's path or the prompt. So
it depends neither on the pool's order nor on what other adapters there are.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.protocol import POOL, FixedMixture, Gated, all_but, member_mask
from methods.session import Mole, Ranking
from moe_lora import AX, MeteoraGate, Mixture
from pool.slots import Pool

SUFFIX = r"(?:_top([1-9][0-9]{0,5}))?(?::([0-9]{1,9}))?"  # k and the seed


class RandomGate(MeteoraGate):
    """MeteoRA's gate on x / rms(x)."""

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of k adapters per token."""
        x = F.rms_norm(x.float(), x.shape[-1:], eps=1e-12)  # logits of variance 1 in every Linear
        return super().forward(x, sample, ax)


def random_gates(
    pool: Pool, k: int, temperature: float = 1.0, known: Tensor | None = None, seed: int = 0
) -> dict[str, RandomGate]:
    """{module path: RandomGate with G (capacity, i)}; `known` (capacity,) bool marks the slots that may
    be chosen."""
    gates = {}
    for path, A in pool.A.items():
        i = A.shape[2]
        G = torch.zeros(pool.capacity, i)
        for name in pool.resident:
            row_seed = random.Random(f"{seed}/{path}/{name}").getrandbits(63)
            generator = torch.Generator().manual_seed(row_seed)
            G[pool.slot(name)] = torch.randn(i, generator=generator) * i**-0.5
        gates[path] = RandomGate(G.to(A.device), k, temperature, known)
    return gates


class RandomGates(Gated):
    """A random gate in each Linear."""

    pattern = "random_gate" + SUFFIX
    names = ("random_gate", "random_gate_top1")
    about = "control: MeteoRA's gates with random G (:SEED, default 0)"

    def __init__(self, name: str, top_k: int, k: str | None, seed: str | None):
        super().__init__(name, int(k or top_k))
        self.seed = int(seed or 0)

    @property
    def key(self) -> tuple:
        """k and the seed identify its gates."""
        return (POOL[0], f"random_gate_top{self.top_k}:{self.seed}")

    def gates(self, mole: Mole, pool: Pool, temperature: float, exclude: tuple) -> dict[str, nn.Module]:
        """random_gates() for all adapters but those of `exclude`."""
        known = member_mask(pool, mole.device, exclude)
        return random_gates(pool, self.top_k, temperature, known, self.seed)


class RandomAdapters(FixedMixture):
    """k random adapters for each prompt; equal prompts get the same."""

    pattern = "random_adapters" + SUFFIX
    names = ("random_adapters", "random_adapters_top1")
    about = "control: k random adapters for each prompt, each weighing 1/k (:SEED, default 0)"
    decides = "per request"
    retrieves = "at random"

    def __init__(self, name: str, top_k: int, k: str | None, seed: str | None):
        super().__init__(name, top_k)
        self.count = int(k or 0)  # 0: as many as are retrieved
        self.seed = int(seed or 0)

    def retrieve(self, mole: Mole, prompts: list[str], ids, k: int, exclude: tuple) -> list[Ranking]:
        """The k adapters with the largest random scores, 0 to 1."""
        rankings = []
        for prompt in prompts:
            scores = {}
            for name in all_but(mole.pool, exclude):
                scores[name] = random.Random(f"{self.seed}/{name}/{prompt}").random()
            ranking = sorted(scores.items(), key=lambda pair: -pair[1])
            rankings.append(ranking[: self.count or k])
        return rankings

    def weights(self, mole: Mole, found: Ranking, exclude: tuple) -> dict[str, float]:
        """1/k each."""
        return {name: 1 / len(found) for name, _ in found}
