"""SpectR and LAG, and the aligned pool that they read: against float64, Arrow's gate and each other."""

import pytest
import torch

from generate import load
from helpers_methods import IDS, close, logits_of, noise
from helpers_models import RANKS, make_pool
from methods.arrow import ArrowGate, arrow_prototypes
from methods.spectral import SHORTLIST, SpectralGate
from model import load_llama
from moe_lora import AX, MultiLoRALinear, SampleGate, fixed_rows
from pool.adapters import linear_shapes
from pool.slots import Pool
from pool.stacks import aligned_pool

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def pools(small_model):
    """A pool of ranks 1 to 7 in float64 with two free slots, and the same aligned."""
    pool = make_pool(linear_shapes(load_llama(small_model)), capacity=7)
    double = Pool(pool.shapes, pool.capacity, pool.rank, torch.float64)
    for name in RANKS:
        double.add(pool.adapter(name))
    return double, aligned_pool(double)


def random_linear(e=61, r=5, i=11, o=13):
    """A (e, r, i) and B (e, o, r) of one Linear of an aligned pool of random adapters."""
    pool = Pool({"p": (o, i)}, e, r)
    pool.A["p"].copy_(noise(e, r, i, seed=5))
    pool.B["p"].copy_(noise(e, o, r, seed=6))
    aligned = aligned_pool(pool)
    return aligned.A["p"], aligned.B["p"]


def gate_of(A, B, k, weighted=False, shortlists=False, known=None, temperature=1.0):
    """The gate that the methods make of an aligned Linear."""
    known = torch.ones(len(A), dtype=torch.bool) if known is None else known
    S = B.norm(dim=1) if weighted else None
    return SpectralGate(known, k, temperature, S, A[:, 0] if shortlists else None)


def by_hand(A, B, x, k, weighted=False, shortlists=False):
    """[{slot: weight}] of the tokens x, by SVDs of the whole matrices in float64."""
    found = []
    for token in x.double():
        arrow = []
        norms = []
        for a, b in zip(A.double(), B.double(), strict=True):
            Vh = torch.linalg.svd(b @ a).Vh[: len(a)]
            arrow.append(float((Vh[0] @ token).abs()))
            norms.append(float((b @ (a @ token)).norm() if weighted else (Vh @ token).norm()))
        slots = sorted(range(len(A)), key=lambda slot: -arrow[slot])[: SHORTLIST if shortlists else None]
        best = sorted(slots, key=lambda slot: -norms[slot])[:k]
        weights = torch.tensor([norms[slot] for slot in best]).softmax(0)
        found.append(dict(zip(best, weights.tolist(), strict=True)))
    return found


def test_an_aligned_pool_computes_the_same(pools):
    """Without it an adapter, a rank or a scale could get lost, and the method would look worse."""
    pool, aligned = pools
    choices = [{"ant": 1.0}, {"bee": 0.5, "cat": -2.0}, {"eel": 3.0, "dog": 0.25, "ant": 1.5}]
    for path, (o, i) in pool.shapes.items():
        base = torch.nn.Linear(i, o).double()
        x = noise(3, 11, i, seed=1).double()
        outputs = []
        for one in pools:
            gate = SampleGate()
            gate.set(
                *(part.double() if part.is_floating_point() else part for part in fixed_rows(one, choices))
            )
            outputs.append(MultiLoRALinear(base, one.A[path], one.B[path], one.scale[path].double(), gate)(x))
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert aligned.resident == pool.resident
    assert [aligned.slot(name) for name in RANKS] == [pool.slot(name) for name in RANKS]


def test_rows_of_an_aligned_A_are_orthonormal(pools):
    """Rows of another length would be singular values inside the score; padding that is not zero,
    directions that the adapter doesn't read."""
    pool, aligned = pools
    for path, A in aligned.A.items():
        assert torch.equal(A[5:], torch.zeros(2, *A.shape[1:], dtype=A.dtype))
        for name, r in RANKS.items():
            rows = A[aligned.slot(name)]
            want = torch.zeros(7, 7, dtype=A.dtype)
            want[:r, :r] = torch.eye(r)
            torch.testing.assert_close(rows @ rows.T, want, rtol=0, atol=1e-12)
            columns = aligned.B[path][aligned.slot(name)]
            lengths = columns.norm(dim=0)[:r]
            assert (lengths[:-1] >= lengths[1:]).all() and not columns[:, r:].any()


def test_a_change_of_the_pool_leaves_its_copy(pools):
    """A copy that shares its members with the pool would lose a slot while a request still uses it."""
    pool = make_pool({UP: (67, 44)}, names=("ant", "eel"))
    copy = aligned_pool(pool)
    pool.remove("ant")
    assert copy.resident == ["ant", "eel"] and copy.slot("ant") == 0


def test_its_first_row_is_arrows_prototype(pools):
    """Arrow's gate is the oracle of what LAG's shortlist is computed from."""
    A, B = random_linear()
    x = noise(31, 11, seed=2)
    idx, _ = ArrowGate(arrow_prototypes(A, B), 3)(x, None, None)
    assert torch.equal(AX(x, A)()[..., 0].abs().topk(3).indices, idx)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shortlists", [False, True])
def test_gates_are_their_equations(weighted, shortlists):
    """Against whole matrices token by token; LAG's shortlist leaves out 41 of 61 adapters."""
    A, B = random_linear()
    x = noise(31, 11, seed=3)
    idx, weight = gate_of(A, B, 2, weighted, shortlists)(x, None, AX(x, A))
    want = by_hand(A, B, x, 2, weighted, shortlists)
    for slots, weights, expected in zip(idx.tolist(), weight.tolist(), want, strict=True):
        assert dict(zip(slots, weights, strict=True)) == pytest.approx(expected, rel=1e-4)
    if shortlists:
        assert want != by_hand(A, B, x, 2, weighted), "or the shortlist is never tried"


def test_a_shortlist_of_all_is_spectr():
    """With at most 20 adapters LAG compares them all."""
    A, B = (y[:SHORTLIST] for y in random_linear())
    x = noise(31, 11, seed=3)
    for weighted in (False, True):
        for known in (None, torch.arange(SHORTLIST) % 3 > 0):
            gates = [gate_of(A, B, 3, weighted, shortlists, known) for shortlists in (False, True)]
            spectr, lag = (gate(x, None, AX(x, A)) for gate in gates)
            assert torch.equal(spectr.idx, lag.idx) and torch.equal(spectr.weight, lag.weight)
            assert known is None or known[spectr.idx].all()


def test_of_rank_1_spectr_is_arrow():
    """The norm of one number is its size: two codes for one thing must agree."""
    A, B = random_linear(r=1)
    x = noise(31, 11, seed=4)
    spectr = gate_of(A, B, 3, temperature=0.7)(x, None, AX(x, A))
    arrow = ArrowGate(arrow_prototypes(A, B), 3, 0.7)(x, None, None)
    assert torch.equal(spectr.idx, arrow.idx)
    torch.testing.assert_close(spectr.weight, arrow.weight, rtol=1e-6, atol=1e-6)


def test_k_and_temperature_reach_the_gates_and_rows_share_a_batch(small_model, pool_with_every_part):
    """Without it an option is read and not passed on, or a fixed row reads a slot of another pool."""
    mole = load(small_model, pool_with_every_part)
    for name in ("spectr", "lag_weighted"):
        default = logits_of(mole, [name])
        for options in ({"top_k": 1}, {"gate_temperature": 9.0}):
            assert not close(default, logits_of(mole, [name], **options), 1e-3)
        mixed = ["uniform", name, "base", "adapter:cat"]
        together = logits_of(mole, mixed)
        assert mole.attached[1] is not mole.pool
        for row, one in enumerate(mixed):
            assert close(together[row], logits_of(mole, [one], IDS[row : row + 1])[0]), one
