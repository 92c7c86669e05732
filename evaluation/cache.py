"""How many slots a pool needs: the share of requests that find their adapter in a slot (the hit rate).

Requests arrive as a Poisson process, each for an adapter drawn from Zipf's law, p_j ~ 1 / j^zipf, as
in InfiniLoRA (arXiv 2604.07173). An adapter that is in no slot is loaded, and the least recently used
one leaves. The hit rate depends on the order of the requests alone, so it is the same at any rate of
requests; the rate only says how many loads a second that is. A request takes no time here. In reality
the slots must also hold the adapters of all requests that are being answered.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from common.fields import Number
from common.files import InputError
from common.options import Above0, Count, Counts, Seed, ShareAbove0, numbers
from pool.recency import Recency


@dataclass
class CacheBench:
    """Options of `bench.py cache`."""

    adapters: Count = 1000  # number of adapters that requests ask for
    zipf: Annotated[float, Number(float, 0, 10)] = 1.2  # exponent of their popularity, 0 = all alike
    slots: Counts = "8,32,128,512"  # slots of the pool; a row for each number
    share: ShareAbove0 = 0.95  # hit rate whose least number of slots is one more row
    requests: Count = 200_000  # simulated requests; the first tenth isn't counted
    rate: Above0 = 10.0  # requests a second
    seed: Seed = 0  # seed for the requests


def bench_cache(args: CacheBench) -> list[dict]:
    """A row for each number of slots: the hit rate in percent, simulated and by Che's approximation; the
    adapters loaded a second; the seconds that an adapter stays if nobody asks for it."""
    p = popularity(args.adapters, args.zipf)
    generator = np.random.default_rng(args.seed)
    requests = generator.choice(args.adapters, size=args.requests, p=p).tolist()
    rows = {}
    for slots in numbers("--slots", args.slots):
        if slots > args.adapters:
            raise InputError(f"--slots has {slots}, expected at most {args.adapters}, the --adapters")
        rows[str(slots)] = slots
    least = least_slots(p, args.share)
    rows[f"{least}, the least for {100 * args.share:g} %"] = least
    table = []
    for name, slots in rows.items():
        share = simulate(requests, slots)
        T = stay(p, slots)
        row = {"slots": name, "found, %": 100 * share, "Che, %": 100 * che_share(p, T)}
        row["loads/s"] = args.rate * (1 - share)
        row["stays, s"] = None if math.isinf(T) else T / args.rate
        table.append(row)
    return table


def popularity(adapters: int, zipf: float) -> np.ndarray:
    """(adapters,): each adapter's share of the requests by Zipf's law, the most popular first."""
    p = np.arange(1, adapters + 1, dtype=np.float64) ** -zipf
    return p / p.sum()


def simulate(requests: list[int], slots: int) -> float:
    """The hit rate of `requests`, which are adapters numbered by falling popularity.

    Recency decides who leaves, as in a Pool. At the beginning the most popular adapters are in the
    slots. So that this doesn't matter, the first tenth of the requests isn't counted; it has to be more
    than the T requests for which an adapter stays.
    """
    resident = Recency()
    for adapter in reversed(range(slots)):
        resident.need(adapter)
    warm_up = len(requests) // 10
    found = 0
    for number, adapter in enumerate(requests):
        if adapter in resident:
            found += number >= warm_up
        else:
            resident.forget(resident.leaver())
        resident.need(adapter)
    return found / (len(requests) - warm_up)


# Che's approximation: an adapter leaves after T requests for others, the same T for all. -----------


def in_slot(p: np.ndarray, T: float) -> np.ndarray:
    """(adapters,): 1 - (1 - p_j)^T, the probability that one of the last T requests asked for j."""
    with np.errstate(divide="ignore", invalid="ignore"):  # where p is 1, and where T is 0
        return np.nan_to_num(-np.expm1(T * np.log1p(-p)))


def che_share(p: np.ndarray, T: float) -> float:
    """The hit rate by Che: the sum over j of p_j (1 - (1 - p_j)^T)."""
    return 1.0 if math.isinf(T) else float(p @ in_slot(p, T))


def stay(p: np.ndarray, slots: int) -> float:
    """The T at which the sum over j of 1 - (1 - p_j)^T is `slots`; infinite if each adapter has one."""
    return solve(lambda T: in_slot(p, T).sum(), slots) if slots < len(p) else math.inf


def least_slots(p: np.ndarray, share: float) -> int:
    """The least number of slots for which che_share() is at least `share`."""
    if share == 1:
        return len(p)
    T = solve(lambda T: che_share(p, T), share)
    return math.ceil(in_slot(p, T).sum() - 1e-6)  # so that bisection's error adds no slot


def solve(increasing: Callable[[float], float], value: float) -> float:
    """The T at which increasing(T) reaches `value`, by bisection."""
    low = 0.0
    high = 1.0
    while increasing(high) < value and high < 1e18:
        low = high
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if increasing(middle) < value:
            low = middle
        else:
            high = middle
    return high
