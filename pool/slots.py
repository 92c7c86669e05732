"""The slots of a pool: named adapters of mixed rank and mixed targets, stacked for the kernels."""

import copy
import math
from dataclasses import dataclass

import torch

from common.files import (
    InputError,
)
from common.options import nearest
from pool.adapters import Adapter, _pattern, load_adapter


@dataclass
class Member:
    """What a pool knows of an adapter."""

    slot: int | None  # None: on disk only
    hash: str | None  # None until it was loaded
    adapter: Adapter  # its tensors dropped: name, scales, config, samples, folder


class Pool:
    """Named adapters of mixed rank and mixed targets, in slots: A[path] (e, r, i), B[path] (e, o,
    r), scale[path] (e,).

    Smaller ranks are zero-padded to `rank`, modules an adapter lacks are zero. Adding and removing
    write in place, so whoever holds the tensors (the Linears, a compiled block) sees the change;
    only more slots or a larger rank give them another shape. Outputs never depend on which slot an
    adapter got.

    `alloc_B(e, o, r, dtype=, device=)` makes a zero B where another memory layout than torch's is
    wanted (alloc_B_of).

    A pool with a `limit` never has more slots than that: further members stay on disk until need()
    asks for them, and those that were needed longest ago leave for them. `version` counts the
    changes of what is in the slots.
    """

    def __init__(self, shapes, capacity, rank, dtype=torch.float32, device=None, alloc_B=None):
        self.shapes = shapes
        self.capacity = capacity
        self.rank = rank
        self.members = {}
        self.limit = None
        self.version = 0
        self._used = []  # names, those needed longest ago first
        make = {"dtype": dtype, "device": device}
        self.A = {path: torch.zeros(capacity, rank, i, **make) for path, (_, i) in shapes.items()}
        self.alloc_B = alloc_B or zeros
        self.B = {path: self.alloc_B(capacity, o, rank, **make) for path, (o, _) in shapes.items()}
        self.scale = {path: torch.zeros(capacity, device=device) for path in shapes}

    @classmethod
    def of(cls, adapters, shapes, dtype=torch.float32, device=None, alloc_B=None):
        """A pool just large enough, on the Linears that at least one of the adapters sits on."""
        pool = cls._for(adapters, shapes, dtype, device, alloc_B)
        for adapter in adapters:
            pool.add(adapter)
        return pool

    @classmethod
    def load(cls, folders, shapes, dtype=torch.float32, device=None, resident=0, alloc_B=None):
        """The same from {name: PEFT folder}; one adapter at a time is in memory beside the pool.
        Where `resident` is given and smaller than their number, the pool is limited to so many
        slots and the others are left on disk."""
        headers = [load_adapter(path, name, shapes, header=True) for name, path in folders.items()]
        capacity = min(resident or len(headers), len(headers))
        pool = cls._for(headers, shapes, dtype, device, alloc_B, capacity)
        pool.limit = resident or None
        for adapter in headers:
            pool.members[adapter.name] = Member(None, None, _light(adapter))
        pool.need(list(folders)[: pool.capacity])
        return pool

    @classmethod
    def _for(cls, adapters, shapes, dtype, device, alloc_B, capacity=0):
        used = {path for adapter in adapters for path in adapter.A}
        shapes = {path: shape for path, shape in shapes.items() if path in used}
        rank = max(adapter.rank for adapter in adapters)
        return cls(shapes, capacity or len(adapters), rank, dtype, device, alloc_B)

    @property
    def names(self):
        """Adapter names by slot order, those on disk behind them."""
        return sorted(
            self.members, key=lambda name: (self.members[name].slot is None, self.members[name].slot or 0)
        )

    @property
    def resident(self):
        """Names of the adapters that are in slots, those needed longest ago first."""
        return [name for name in self._used if name in self.members and self.members[name].slot is not None]

    def member(self, name):
        """The Member `name`. Raises InputError with the nearest names."""
        if name not in self.members:
            hint = nearest(name, self.members) or (": " + ", ".join(self.names[:50]))
            raise InputError(f"no adapter {name!r} in the pool{hint}")
        return self.members[name]

    def slot(self, name):
        """The slot of adapter `name`, which is fetched from disk where it must. Raises InputError."""
        if self.member(name).slot is None:
            self.need([name])
        return self.members[name].slot

    def need(self, names):
        """Has all of `names` in slots at once; where there is no room, those needed longest ago
        leave. Raises InputError for more names than slots, before anything is changed."""
        names = list(dict.fromkeys(names))
        for name in names:
            self.member(name)
        if len(names) > self.capacity:
            raise InputError(
                f"{len(names)} adapters are needed at once, {self.capacity} fit: --resident {len(names)}"
            )
        for name in names:
            if name in self._used:
                self._used.remove(name)
            self._used.append(name)  # so that none of them leaves for another
        for name in names:
            if self.members[name].slot is None:
                known = self.members[name]
                adapter = load_adapter(known.adapter.folder, name, self.shapes, quiet=known.hash is not None)
                self.members[name] = Member(
                    self._fill(self._free_slot(), adapter), adapter.hash, _light(adapter)
                )

    def add(self, adapter):
        """Puts the adapter into a free slot and returns the slot; grows capacity or rank where it
        must. Where the limit is reached and no slot is free it stays on disk: None. Raises
        InputError where it isn't there either."""
        if adapter.name in self.members:
            first = self.members[adapter.name].adapter.folder
            raise InputError(f"adapter name {adapter.name!r} twice: {first} and {adapter.folder}")
        full = len(self.resident) >= self.capacity
        slot = None
        larger = min(max(2 * self.capacity, 4), self.limit or math.inf) if full else self.capacity
        waits = full and larger == self.capacity
        if waits and not adapter.folder:
            raise InputError(
                f"adapter {adapter.name}: all {self.capacity} slots are taken, and no folder to wait in"
            )
        self._cover(adapter)
        if adapter.rank > self.rank or larger > self.capacity:
            self._grow(larger, max(self.rank, adapter.rank))
        if not waits:
            slot = self._fill(self._free_slot(), adapter)
            self._used.append(adapter.name)
        self.members[adapter.name] = Member(slot, adapter.hash, _light(adapter))
        return slot

    def _cover(self, adapter):
        """Stacks for Linears that no adapter sat on so far; whoever holds the others has to look
        for them."""
        like = next(iter(self.A.values()))
        shapes = {p: (len(adapter.B[p]), a.shape[1]) for p, a in adapter.A.items() if p not in self.A}
        more = Pool(shapes, self.capacity, self.rank, like.dtype, like.device, self.alloc_B)
        for mine, new in (
            (self.shapes, shapes),
            (self.A, more.A),
            (self.B, more.B),
            (self.scale, more.scale),
        ):
            mine.update(new)

    def _free_slot(self):
        """A slot without an adapter; where there is none, the one needed longest ago leaves its
        own."""
        free = set(range(self.capacity)) - {m.slot for m in self.members.values()}
        if not free:
            free = {self._empty(self.resident[0])}
        return min(free)

    def _fill(self, slot, adapter):
        for path, a in adapter.A.items():
            self.A[path][slot, : a.shape[0]] = a
            self.B[path][slot, :, : a.shape[0]] = adapter.B[path]
            self.scale[path][slot] = adapter.scale[path]
        self.version += 1
        return slot

    def _empty(self, name):
        """Takes an adapter out of its slot; it stays a member, on disk."""
        slot = self.members[name].slot
        self.members[name].slot = None
        for path in self.A:
            for stack in (self.A[path], self.B[path], self.scale[path]):
                stack[slot] = 0
        self._used.remove(name)
        self.version += 1
        return slot

    def remove(self, name):
        """Takes an adapter out. Raises InputError where there is none of that name."""
        if self.member(name).slot is not None:
            self._empty(name)
        del self.members[name]

    def _grow(self, capacity, rank):
        """Larger stacks under the same tensor objects, so that their holders follow."""
        like = next(iter(self.A.values()))
        bigger = Pool(self.shapes, capacity, rank, like.dtype, like.device, self.alloc_B)
        for path in self.A:
            bigger.A[path][: self.capacity, : self.rank] = self.A[path]
            bigger.B[path][: self.capacity, :, : self.rank] = self.B[path]
            bigger.scale[path][: self.capacity] = self.scale[path]
            for old, new in zip(
                (self.A, self.B, self.scale), (bigger.A, bigger.B, bigger.scale), strict=True
            ):
                old[path].data = new[path]
        self.capacity = capacity
        self.rank = rank

    def adapter(self, name):
        """The adapter as its slot holds it now, at its own rank and modules: for saving what was
        trained."""
        slot = self.slot(name)
        member = self.members[name].adapter
        ranks = {p: _pattern(member.config.get("rank_pattern"), p, member.config["r"]) for p in member.scale}
        A = {p: self.A[p][slot, :r].detach().clone() for p, r in ranks.items()}
        B = {p: self.B[p][slot, :, :r].detach().clone() for p, r in ranks.items()}
        return Adapter(name, A, B, member.scale, member.config, member.samples, member.folder)


def zeros(*size, **options):
    """torch's own layout of a stack."""
    return torch.zeros(size, **options)


def alloc_B_of(model):
    """How a pool lays out B for this model: the model's own way, where it has one."""
    return getattr(model, "alloc_B", zeros)


def _light(adapter):
    light = copy.copy(adapter)
    light.A = {}
    light.B = {}
    return light
