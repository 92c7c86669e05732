"""A gate of your own, trained on the embedded tasks: python -m examples.key_gate

The gate gives each adapter a key and asks a small query of each token. It learns from the answers
alone, with no hint which adapter is right. Twenty steps take some ten seconds on two CPU cores and
teach it some of the tasks; change the class and see how far yours gets.
"""

import torch
from torch import nn

from generate import answer, load
from methods.batch import set_methods
from moe_lora import Mixture
from tasks.folders import collate, encode
from tasks.tiny import examples
from training.losses import lm_losses

STEPS = 20


class KeyGate(nn.Module):
    """Two adapters a token, by the products of its query with the adapters' keys."""

    def __init__(self, i, e, d=16):  # i: in features of the Linear, e: adapters, d: size of a key
        super().__init__()
        self.query = nn.Parameter(torch.randn(i, d) / i**0.5)
        self.keys = nn.Parameter(torch.zeros(e, d))

    def forward(self, x, sample, ax):
        """x (n, i) -> Mixture. Not needed here: sample (n,), each token's row of the batch, and ax(),
        A x of all adapters (n, e, r)."""
        logits = x.float() @ self.query @ self.keys.T  # (n, e)
        top, idx = logits.topk(2, dim=-1)  # (n, 2)
        return Mixture(idx, top.softmax(-1))


def main() -> None:
    """Trains the gate and answers two questions with it."""
    torch.manual_seed(0)
    mole = load()
    gates = {path: KeyGate(A.shape[2], mole.pool.capacity) for path, A in mole.pool.A.items()}
    mole.custom_gates["keys"] = gates  # a method like any other from now on
    parameters = [p for gate in gates.values() for p in gate.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    rows = [(name, row) for name in mole.pool.names for row in examples(name, "train", STEPS)]
    for step in range(STEPS):
        picked = rows[step::STEPS]
        batch = collate([encode(mole.tokenizer, mole.template, row, name) for name, row in picked])
        set_methods(mole, ["keys"] * len(picked))
        loss = lm_losses(mole.model, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.2f}")
    print(answer(mole, ["Sort the words: river, apple, dog", "Translate into German: house"], method="keys"))


if __name__ == "__main__":
    main()
