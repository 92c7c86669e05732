"""pool/cosines.py: the cosines of the dense matrices s B A, in float64."""

import pytest
import torch

from helpers_models import random_adapter
from pool.cosines import cosines, describe_cosines
from pool.slots import Pool

SHAPES = {"model.layers.0.self_attn.q_proj": (7, 11), "model.layers.0.mlp.down_proj": (5, 13)}
RANKS = {"ant": 2, "bee": 5, "cat": 3}


def adapters():
    """Of mixed ranks and scales; dog has one Linear alone, and is like cat there."""
    made = [random_adapter(name, SHAPES, r, seed=r) for name, r in RANKS.items()]
    dog = random_adapter("dog", SHAPES, 3, alpha=2.0, seed=3, targets=("down_proj",))
    cat = made[2]
    for path in dog.A:
        dog.A[path] = cat.A[path] + 0.1 * dog.A[path]
        dog.B[path] = cat.B[path].clone()
    return [*made, dog]


def dense(made):
    """{name: all of its s B A in one vector}, float64."""
    found = {}
    for adapter in made:
        parts = []
        for path, (o, i) in SHAPES.items():
            delta = torch.zeros(o, i, dtype=torch.float64)
            if path in adapter.A:
                delta = adapter.scale[path] * adapter.B[path].double() @ adapter.A[path].double()
            parts.append(delta.flatten())
        found[adapter.name] = torch.cat(parts)
    return found


def test_cosines_are_those_of_the_dense_matrices():
    """Padded ranks, a Linear that one of them lacks, slots instead of names or a scale left out: each
    gives a number between -1 and 1 that nobody would doubt."""
    made = adapters()
    pool = Pool.of([random_adapter("gone", SHAPES, 7), *made], SHAPES)
    pool.remove("gone")  # its slot is free, and the stacks' rank is larger than any adapter's
    vectors = dense(made)
    names = ["dog", "bee", "ant", "cat"]
    expected = torch.stack([torch.stack([torch.cosine_similarity(vectors[a], vectors[b], 0) for b in names])
                            for a in names])  # fmt: skip
    torch.testing.assert_close(cosines(pool, names), expected, rtol=1e-6, atol=1e-6)
    others = [float(expected[j, l]) for j in range(4) for l in range(j)]  # noqa: E741
    assert describe_cosines(pool) == {
        "mean": pytest.approx(sum(others) / 6, abs=6e-5),
        "largest": pytest.approx(max(others), abs=6e-5),
        "pair": ["cat", "dog"],
    }


def test_cosines_of_copies_zeros_and_large_ones():
    """A NaN, which JSON doesn't have, would end an evaluation after its last answer."""
    ant = random_adapter("ant", SHAPES, 2, seed=2)
    copy = random_adapter("copy", SHAPES, 2, seed=2, alpha=3.0)
    zero = random_adapter("zero", SHAPES, 3)
    large = random_adapter("large", SHAPES, 2, seed=2)
    for path in SHAPES:
        zero.B[path] = torch.zeros_like(zero.B[path])
        large.A[path] = large.A[path] * -1e30
        large.B[path] = large.B[path] * 1e18
    found = cosines(Pool.of([ant, copy, zero, large], SHAPES), ["ant", "copy", "zero", "large"])
    expected = [[1, 1, 0, -1], [1, 1, 0, -1], [0, 0, 0, 0], [-1, -1, 0, 1]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_one_adapter_has_no_pair():
    """A mean over no pairs is a division by zero."""
    pool = Pool.of([random_adapter("ant", SHAPES, 2)], SHAPES)
    assert describe_cosines(pool) == {}
    pool.remove("ant")
    assert describe_cosines(pool) == {}
