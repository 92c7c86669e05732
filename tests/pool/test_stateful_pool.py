"""A pool through any sequence of joining, leaving and being needed, against a plain dict."""

import math

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common.files import InputError
from helpers_hypothesis import few
from helpers_models import random_adapter
from pool.adapters import save_adapter
from pool.slots import Pool

SHAPES = {"layers.0.q": (5, 3), "layers.0.up": (7, 3), "layers.1.q": (5, 11), "layers.1.up": (2, 11)}
# Some of the Linears each, so that a later one brings Linears that no earlier one had.
TARGETS = [["0.q"], ["0.q", "0.up"], ["1.q"], list(SHAPES), ["up"], ["1.up", "0.q"], ["q"]]
RANKS = [2, 3, 1, 5, 2, 7, 3]
NAMES = [f"adapter {j}" for j in range(len(RANKS))]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{name: Adapter} of several ranks and Linears, each with its folder."""
    found = {}
    for j, name in enumerate(NAMES):
        adapter = random_adapter(name, SHAPES, RANKS[j], alpha=3.0 + j, seed=j, targets=TARGETS[j])
        adapter.config["target_modules"] = sorted(adapter.A)
        adapter.folder = tmp_path_factory.mktemp("pool") / name
        save_adapter(adapter, adapter.folder)
        found[name] = adapter
    return found


class PoolAsDict(RuleBasedStateMachine):
    """`resident` {name: Adapter} is what the slots should hold, those needed longest ago first;
    `on_disk` the other members."""

    def __init__(self, adapters):
        super().__init__()
        self.adapters = adapters
        self.resident = {}
        self.on_disk = {}

    @initialize(data=st.data(), limit=st.integers(0, 4))
    def load(self, data, limit):
        """A pool of some adapters, at most `limit` of them in slots, 0: all."""
        names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
        self.limit = limit or math.inf
        self.pool = Pool.load({name: self.adapters[name].folder for name in names}, SHAPES, resident=limit)
        for name in names:
            there = self.resident if len(self.resident) < self.limit else self.on_disk
            there[name] = self.adapters[name]
        self.stacks = {}
        self.before = None

    @rule(name=st.sampled_from(NAMES), has_folder=st.booleans())
    def add(self, name, has_folder):
        """Joins where there is room, waits on disk where there is none; a name joins once."""
        adapter = self.adapters[name]
        if not has_folder:
            adapter = random_adapter(name, SHAPES, 2, seed=99, targets=["q"])
        taken = name in self.resident or name in self.on_disk
        full = len(self.resident) == self.limit
        if taken or (full and not has_folder):
            with pytest.raises(InputError, match=f"adapter '?{name}"):
                self.pool.add(adapter)
            return
        slot = self.pool.add(adapter)
        assert (slot is None) == full
        (self.on_disk if full else self.resident)[name] = adapter

    @precondition(lambda self: self.resident or self.on_disk)
    @rule(data=st.data())
    def need(self, data):
        """Members are in slots afterwards, or nothing has moved where they are too many beside those
        that lie on no disk and so never leave."""
        members = sorted([*self.resident, *self.on_disk])
        names = data.draw(st.lists(st.sampled_from(members), min_size=1, max_size=5))
        once = list(dict.fromkeys(names))
        staying = [name for name, adapter in self.resident.items() if adapter.folder is None]
        if len({*once, *staying}) > self.pool.capacity:
            with pytest.raises(InputError, match="adapters are needed at once"):
                self.pool.need(names)
            return
        too_many = len({*self.resident, *once}) - self.pool.capacity
        leaving = [name for name in self.resident if name not in {*once, *staying}]
        leaving = leaving[: max(too_many, 0)]
        self.pool.need(names)
        for name in leaving:
            self.on_disk[name] = self.resident.pop(name)
        for name in once:
            adapter = self.resident.pop(name, None) or self.on_disk.pop(name)
            self.resident[name] = adapter

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        """Leaves slot and disk; where there is none of that name nothing changes."""
        if name in self.resident or name in self.on_disk:
            self.pool.remove(name)
            self.resident.pop(name, None)
            self.on_disk.pop(name, None)
        else:
            with pytest.raises(InputError, match="no adapter"):
                self.pool.remove(name)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def recompute(self, data):
        """One that was computed in memory joins in another's slot, under its name."""
        name = data.draw(st.sampled_from(sorted(self.resident)))
        self.remove(name)
        self.add(name, has_folder=False)

    @rule(data=st.data())
    def need_a_stranger(self, data):
        """Nothing changes, whatever else is needed with it."""
        others = data.draw(st.lists(st.sampled_from(NAMES), max_size=2))
        with pytest.raises(InputError, match="no adapter 'nobody'"):
            self.pool.need([*(name for name in others if name in self.on_disk), "nobody"])

    @invariant()
    def slots_hold_the_adapters(self):
        """Each resident's slot is its adapter, padded by zeros, and gives it back; every other slot is
        zero."""
        pool = self.pool
        assert pool.resident == list(self.resident)
        assert set(pool.names) == self.resident.keys() | self.on_disk.keys()
        assert len(self.resident) <= pool.capacity <= self.limit
        for name, adapter in self.resident.items():
            assert pool.adapter(name).hash == adapter.hash
        slots = {pool.members[name].slot: adapter for name, adapter in self.resident.items()}
        assert len(slots) == len(self.resident) and all(0 <= slot < pool.capacity for slot in slots)
        for path in pool.A:
            A, B, scale = (torch.zeros_like(part[path]) for part in (pool.A, pool.B, pool.scale))
            for slot, adapter in slots.items():
                if path in adapter.A:
                    r = len(adapter.A[path])
                    A[slot, :r] = adapter.A[path]
                    B[slot, :, :r] = adapter.B[path]
                    scale[slot] = adapter.scale[path]
            assert torch.equal(pool.A[path], A) and torch.equal(pool.B[path], B)
            assert torch.equal(pool.scale[path], scale)
            stack = self.stacks.setdefault(path, pool.A[path])
            assert stack is pool.A[path]  # whoever holds a stack sees every change

    @invariant()
    def the_version_tells_of_changes(self):
        """What the slots hold changes with the version alone."""
        now = {name: self.pool.members[name].slot for name in self.resident}
        if self.before and self.before[0] == self.pool.version:
            assert self.before[1] == now
        self.before = (self.pool.version, now)


def test_any_sequence_of_changes(adapters):
    """Without it some sequence of joining, leaving and eviction leaves rows of an adapter that is
    gone, puts two into one slot, or throws out the one that is used most. The asserts are in the rules
    and invariants of PoolAsDict, which hypothesis runs after each change."""
    run_state_machine_as_test(lambda: PoolAsDict(adapters), settings=few(60, stateful_step_count=20))
