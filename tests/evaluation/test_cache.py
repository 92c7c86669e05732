"""evaluation/cache.py: shares against exact ones, a Pool and each other."""

import random

import numpy as np
import pytest

from evaluation.cache import (
    CacheBench,
    bench_cache,
    che_share,
    in_slot,
    least_slots,
    popularity,
    simulate,
    stay,
)
from helpers_models import random_adapter
from pool.adapters import save_adapter
from pool.slots import Pool


def draw(p, count, seed=0):
    """Requests drawn from p."""
    return np.random.default_rng(seed).choice(len(p), size=count, p=p).tolist()


def test_the_simulation_is_exact():
    """Against King's formula: the last two adapters that were needed are i, then j, with probability
    p_j p_i / (1 - p_j). Another order of eviction, or a share of other requests, gives another one."""
    p = popularity(7, 0.9)
    requests = draw(p, 300_000)
    assert simulate(requests, 1) == pytest.approx((p**2).sum(), abs=0.003)
    exact = 0.0
    for j in range(7):
        for i in set(range(7)) - {j}:
            exact += p[j] * p[i] / (1 - p[j]) * (p[j] + p[i])
    assert simulate(requests, 2) == pytest.approx(exact, abs=0.003)
    assert simulate(requests, 7) == 1


def test_who_leaves_is_who_leaves_a_pool(tmp_path):
    """Without it the simulation sizes a pool that evicts in another order than ours."""
    names = [f"a{j}" for j in range(11)]
    for j, name in enumerate(names):
        adapter = random_adapter(name, {"layers.0.q": (5, 3)}, 2, seed=j)
        adapter.config["target_modules"] = ["layers.0.q"]
        save_adapter(adapter, tmp_path / name)
    order = [3, 2, 1, 0, *range(4, 11)]  # the first four are in slots, the most popular one latest
    folders = {names[j]: tmp_path / names[j] for j in order}
    pool = Pool.load(folders, {"layers.0.q": (5, 3)}, resident=4)
    assert pool.resident == ["a3", "a2", "a1", "a0"]
    requests = draw(popularity(11, 0.7), 310)
    found = 0
    for number, j in enumerate(requests):
        found += number >= 31 and names[j] in pool.resident
        pool.need([names[j]])
    assert simulate(requests, 4) == found / 279 and 0 < found < 279


def test_the_approximation_where_it_is_exact():
    """One slot holds the last adapter that was needed; adapters that are alike find one in slots/e."""
    p = popularity(13, 1.2)
    assert p[4] / p[1] == pytest.approx((2 / 5) ** 1.2) and p.sum() == pytest.approx(1)
    assert che_share(p, stay(p, 1)) == pytest.approx((p**2).sum())
    assert che_share(p, stay(p, 13)) == 1
    alike = popularity(13, 0)
    for slots in (1, 5, 12):
        assert che_share(alike, stay(alike, slots)) == pytest.approx(slots / 13)
    assert che_share(popularity(1, 1.2), stay(popularity(1, 1.2), 1)) == 1


@pytest.mark.parametrize("zipf", [0, 0.7, 1.2, 10])
def test_the_least_slots(zipf):
    """Against a search among all numbers of slots; more slots must not find fewer adapters."""
    p = popularity(53, zipf)
    shares = [che_share(p, stay(p, slots)) for slots in range(1, 54)]
    assert shares == sorted(shares)
    assert in_slot(p, stay(p, 29)).sum() == pytest.approx(29)
    for share in (0.1, 0.5, 0.83, 0.95, 1):
        enough = [slots for slots in range(1, 54) if shares[slots - 1] >= share - 1e-12]
        assert least_slots(p, share) == (enough[0] if share < 1 else 53)


def test_the_approximation_equals_the_simulation():
    """At InfiniLoRA's popularity, with a thousand adapters. (With 8 slots it is 0.6 points above.)"""
    for row in bench_cache(CacheBench(slots="32,128,512", seed=random.Random(3).getrandbits(30))):
        assert row["found, %"] == pytest.approx(row["Che, %"], abs=0.4)
    assert row["slots"] == "573, the least for 95 %" and row["Che, %"] == pytest.approx(95, abs=0.01)
