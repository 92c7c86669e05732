"""MeteoRA's gate term: the mean cross-entropy over all gates and labelled tokens, written out."""

import pytest
import torch
import torch.nn.functional as F

from helpers_models import make_pool, random_gates
from moe_lora import attach
from pool.adapters import linear_shapes
from training.losses import GateLoss

IDS = torch.randint(331, (3, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(plain_or_fast):
    return plain_or_fast


@pytest.fixture
def pool(model):
    return make_pool(linear_shapes(model))


def test_gate_loss_is_the_mean_cross_entropy_over_gates_and_tokens(model, pool):
    """Over the k chosen logits instead of all e, summed instead of averaged, or with padding
    counted, it trains, but to something else than the paper's; `right` is the figure by which gates
    are judged."""
    gates = random_gates(pool, 2)
    linears = attach(model, pool, gates)
    inputs = {}
    for path, linear in linears.items():
        linear.register_forward_pre_hook(
            lambda module, args, path=path: inputs.update({path: args[0].detach().view(3, 11, -1)})
        )
    labels = torch.tensor([3, 0, 4])[:, None].repeat(1, 11)
    labels[1, 5:] = -100
    labels[2, 9:] = -100
    loss = GateLoss(gates)
    model(IDS)
    found, hits_found = loss(labels.flatten())
    losses, right, slopes = [], [], {}
    for path, x in inputs.items():
        total, hits, slope = [], 0, torch.zeros_like(gates[path].weight)
        for row in range(3):
            for t in range(11):
                label = int(labels[row, t])
                if label >= 0:
                    logits = gates[path].weight.detach() @ x[row, t]
                    total.append(float(logits.logsumexp(0) - logits[label]))
                    hits += int(logits.argmax()) == label
                    slope += torch.outer(logits.softmax(0) - F.one_hot(torch.tensor(label), 5), x[row, t])
        assert len(total) == 11 + 5 + 9
        losses.append(sum(total) / len(total))
        slopes[path] = slope / len(total) / 21
        right.append(hits)
    assert found.item() == pytest.approx(sum(losses) / 21, rel=1e-5)
    assert hits_found.tolist() == right and 0 < sum(right) < 21 * 25
    found.backward()
    last = list(gates)[-1]  # the only gate that reaches no other through its weights
    grad = gates[last].weight.grad
    assert (grad - slopes[last]).abs().max() <= 1e-5 * slopes[last].abs().max()


def test_gate_loss_starts_afresh_and_lets_go(model, pool):
    """A total carried over from the last step, or gates that go on holding a graph that nobody
    frees, grow for ever."""
    gates = random_gates(pool, 1)
    attach(model, pool, gates)
    loss, totals = GateLoss(gates), []
    for _ in range(2):
        model(IDS)
        totals.append(loss(torch.full((33,), 2))[0].item())
    assert totals[0] == totals[1] > 0
    loss.remove()
    model(IDS)
    assert all(gate.logits is None for gate in gates.values())
