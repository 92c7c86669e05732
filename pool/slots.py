"""The slots of a pool: named adapters of mixed rank and mixed targets, stacked for the kernels."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.devices import check_memory
from common.fields import LARGEST
from common.files import InputError, warn
from common.options import nearest
from common.progress import track
from common.tensors import cast_finite, dtype_name
from model import Llama
from pool.adapter_checks import by_pattern
from pool.adapters import Adapter, load_adapter
from pool.recency import Recency


@dataclass
class Member:
    """What a pool knows of an adapter."""

    slot: int | None  # None: on disk only
    hash: str | None  # None: never loaded so far
    adapter: Adapter  # without its tensors: name, scales, config, samples, folder


class Pool:
    """Named adapters in slots: A[path] (e, r, i), B[path] (e, o, r), scale[path] (e,).

    Smaller ranks are zero-padded to `rank`, modules that an adapter lacks are zero. add() and
    remove() write in place, so whatever holds the tensors (a Linear, a compiled block) sees the
    change. Their shape changes only with more slots or a larger rank. Outputs never depend on
    which slot an adapter got.

    `alloc_B(e, o, r, dtype=, device=)` makes a zero B in a memory layout of its choice.

    A pool with a `limit` never has more slots than that. Further members stay on disk until need()
    asks for them; then those that were needed longest ago leave their slots. `version` counts the
    changes of what is in the slots.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        capacity: int,
        rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        alloc_B: Callable[..., torch.Tensor] | None = None,
    ):
        what = f"{capacity} adapters of rank {rank}"
        check_memory(what, pool_bytes(shapes, capacity, rank, dtype), device)
        self.shapes = shapes
        self.capacity = capacity
        self.rank = rank
        self.members = {}
        self.limit = None
        self.version = 0
        self._used = Recency()  # names of those in slots, and of those that need() brings into some
        self.alloc_B = alloc_B or zeros
        self.A = {}
        self.B = {}
        self.scale = {}
        for path, (o, i) in shapes.items():
            self.A[path] = torch.zeros(capacity, rank, i, dtype=dtype, device=device)
            self.B[path] = self.alloc_B(capacity, o, rank, dtype=dtype, device=device)
            self.scale[path] = torch.zeros(capacity, device=device)

    @classmethod
    def of(
        cls,
        adapters: list[Adapter],
        shapes: dict[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        alloc_B: Callable[..., torch.Tensor] | None = None,
    ) -> "Pool":
        """A pool just large enough, for the Linears that at least one of the adapters adapts."""
        pool = cls._for(adapters, shapes, dtype, device, alloc_B)
        for adapter in adapters:
            pool.add(adapter)
        return pool

    @classmethod
    def load(
        cls,
        folders: dict[str, Path],
        shapes: dict[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        resident: int = 0,
        alloc_B: Callable[..., torch.Tensor] | None = None,
    ) -> "Pool":
        """The same from {name: PEFT folder}; one adapter at a time is in memory beside the pool.
        `resident`, where it isn't 0, is the pool's limit: the other adapters are left on disk."""
        headers = [load_adapter(path, name, shapes, header=True) for name, path in folders.items()]
        capacity = min(resident or len(headers), len(headers))
        pool = cls._for(headers, shapes, dtype, device, alloc_B, capacity)
        pool.limit = resident or None
        for adapter in headers:
            pool.members[adapter.name] = Member(None, None, without_tensors(adapter))
        pool.need(list(folders)[: pool.capacity])
        return pool

    @classmethod
    def _for(cls, adapters, shapes, dtype, device, alloc_B, capacity=0):
        used = set()
        for adapter in adapters:
            used |= adapter.A.keys()
        shapes = {path: shape for path, shape in shapes.items() if path in used}
        rank = max(adapter.rank for adapter in adapters)
        return cls(shapes, capacity or len(adapters), rank, dtype, device, alloc_B)

    @property
    def names(self) -> list[str]:
        """Adapter names in the order of their slots, then those on disk."""

        def order(name):
            slot = self.members[name].slot
            return math.inf if slot is None else slot

        return sorted(self.members, key=order)

    @property
    def resident(self) -> list[str]:
        """Names of the adapters that are in slots, those needed longest ago first."""
        members = self.members
        return [n for n in self._used if n in members and members[n].slot is not None]

    def member(self, name: str) -> Member:
        """The Member `name`. Raises InputError with the nearest names."""
        if name not in self.members:
            hint = nearest(name, self.members) or (": " + ", ".join(self.names[:50]))
            raise InputError(f"no adapter {name!r} in the pool{hint}")
        return self.members[name]

    def slot(self, name: str) -> int:
        """The slot of adapter `name`, loaded from disk if it has none. Raises InputError."""
        if self.member(name).slot is None:
            self.need([name])
        return self.members[name].slot

    def need(self, names: Iterable[str]) -> None:
        """Brings all of `names` into slots at once; where there is no room, those needed longest
        ago leave. Raises InputError for more names than slots, before anything is changed."""
        names = list(dict.fromkeys(names))
        for name in names:
            self.member(name)
        count = len(names) + len([n for n in self.resident if n not in names and not self._can_leave(n)])
        if count > self.capacity:
            found = f"{count} adapters are needed at once, {self.capacity} fit"
            raise InputError(f"{found}: --resident {count}")
        for name in names:
            self._used.need(name)  # so that none of them leaves for another
        missing = [name for name in names if self.members[name].slot is None]
        for name in track(missing, "adapters loaded"):
            self._load(name)

    def _load(self, name):
        """Reads an adapter that is on disk alone into a slot."""
        before = self.members[name]
        quiet = before.hash is not None  # it was loaded before, with its warnings
        adapter = load_adapter(before.adapter.folder, name, self.shapes, quiet=quiet)
        self._check_values(adapter)
        if before.hash not in (None, adapter.hash):
            found = f"{before.hash[:12]} when it was loaded, now {adapter.hash[:12]}"
            warn(f"{adapter.folder}: adapter {name} has changed on disk: {found}: going on with the new one")
        if adapter.rank > self.rank:
            self._grow(self.capacity, adapter.rank)
        slot = self._fill(self._free_slot(), adapter)
        self.members[name] = Member(slot, adapter.hash, without_tensors(adapter))

    def add(self, adapter: Adapter) -> int | None:
        """Puts the adapter into a free slot and returns the slot; raises capacity or rank where
        needed. Where the limit is reached the adapter stays on disk, and None is returned. Raises
        InputError where it isn't on disk."""
        if adapter.name in self.members:
            raise InputError(self._how_it_differs(adapter))
        full = len(self.resident) >= self.capacity
        slot = None
        larger = min(max(2 * self.capacity, 4), self.limit or math.inf) if full else self.capacity
        waits = full and larger == self.capacity
        if waits and not adapter.folder:
            taken = f"all {self.capacity} slots are taken"
            raise InputError(f"adapter {adapter.name}: {taken}, and no folder to wait in")
        self._check_values(adapter)
        self._cover(adapter)
        if adapter.rank > self.rank or larger > self.capacity:
            self._grow(larger, max(self.rank, adapter.rank))
        if not waits:
            slot = self._fill(self._free_slot(), adapter)
            self._used.need(adapter.name)
        self.members[adapter.name] = Member(slot, adapter.hash, without_tensors(adapter))
        return slot

    def _how_it_differs(self, adapter):
        """One line: whether the member of an adapter's name is the same, and how to replace it."""
        member = self.members[adapter.name]
        first = member.adapter.folder
        name = repr(adapter.name)
        was = member.hash or load_adapter(first, adapter.name, quiet=True).hash
        if was == adapter.hash:
            return f"adapter {name} is here already: {adapter.folder} holds the same as {first}"
        found = f"here it is {was[:12]} of {first}, and {adapter.folder} holds {adapter.hash[:12]}"
        return f"adapter {name} differs: {found}: to replace it, first /remove {adapter.name}, then /add it"

    def _cover(self, adapter):
        """Adds stacks for Linears that no adapter has adapted so far. Holders of the other stacks
        don't see these: they are new tensors."""
        like = next(iter(self.A.values()))
        shapes = {}
        for path, a in adapter.A.items():
            if path not in self.A:
                shapes[path] = (len(adapter.B[path]), a.shape[1])
        more = Pool(shapes, self.capacity, self.rank, like.dtype, like.device, self.alloc_B)
        self.shapes.update(shapes)
        self.A.update(more.A)
        self.B.update(more.B)
        self.scale.update(more.scale)

    def _free_slot(self):
        """A slot without an adapter; where there is none, one that is on disk leaves, of these the one
        that was needed longest ago."""
        free = set(range(self.capacity)) - {member.slot for member in self.members.values()}
        if not free:
            free = {self._empty(self._used.leaver(self._can_leave))}
        return min(free)

    def _can_leave(self, name):
        """Whether an adapter has a slot that it can leave: what was computed in memory would be lost."""
        member = self.members.get(name)
        return member is not None and member.slot is not None and member.adapter.folder is not None

    def _check_values(self, adapter):
        """Raises InputError unless A, B and scale * B are finite in the pool's dtype, and scale * B so
        small that the next norm can square it in float32."""
        dtype = next(iter(self.A.values())).dtype
        limit = min(torch.finfo(dtype).max, LARGEST**0.5)
        file = f"adapter {adapter.name}"
        if adapter.folder:
            file = adapter.folder / "adapter_model.safetensors"
        for path, a in adapter.A.items():
            scale = adapter.scale[path]
            cast_finite(file, f"{path}.lora_A", a, dtype)
            b = cast_finite(file, f"{path}.lora_B", adapter.B[path], dtype)
            largest = abs(scale) * max(1.0, float(b.abs().max()))  # kernels use scale by itself, too
            if not largest <= limit:
                found = f"{path}.lora_B times its scale {scale:g} reaches {largest:.3g}"
                raise InputError(f"{file}: {found}, more than {limit:.3g} with {dtype_name(dtype)}")

    def _fill(self, slot, adapter):
        for path, a in adapter.A.items():
            r = len(a)
            self.A[path][slot, :r] = a
            self.B[path][slot, :, :r] = adapter.B[path]
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
        self._used.forget(name)
        self.version += 1
        return slot

    def remove(self, name: str) -> None:
        """Removes an adapter from the pool. Raises InputError where there is none of that name."""
        if self.member(name).slot is not None:
            self._empty(name)
        del self.members[name]

    def _grow(self, capacity, rank):
        """Makes the stacks larger under the same tensor objects, so that their holders follow."""
        bigger = self._larger(capacity, rank)
        for path in self.A:
            self.A[path].data = bigger.A[path]
            self.B[path].data = bigger.B[path]
            self.scale[path].data = bigger.scale[path]
        self.capacity = capacity
        self.rank = rank

    def _larger(self, capacity, rank):
        """A Pool of these sizes whose first slots hold what is in this one's; it has no members."""
        like = next(iter(self.A.values()))
        bigger = Pool(dict(self.shapes), capacity, rank, like.dtype, like.device, self.alloc_B)
        for path in self.A:
            bigger.A[path][: self.capacity, : self.rank] = self.A[path]
            bigger.B[path][: self.capacity, :, : self.rank] = self.B[path]
            bigger.scale[path][: self.capacity] = self.scale[path]
        return bigger

    def joined_by(self, adapters: list[Adapter]) -> "Pool":
        """A copy in which `adapters` have joined; the others keep their slots. Raises InputError."""
        rank = max([self.rank, *(adapter.rank for adapter in adapters)])
        joined = self._larger(self.capacity + len(adapters), rank)
        joined.members = {name: replace(member) for name, member in self.members.items()}
        joined.need(self.resident)
        for adapter in adapters:
            joined.add(adapter)
        return joined

    def adapter(self, name: str) -> Adapter:
        """A copy of the adapter as its slot holds it now, without padding; for saving it."""
        slot = self.slot(name)
        member = self.members[name].adapter
        config = member.config
        A = {}
        B = {}
        ranks = by_pattern(config, "rank_pattern", config["r"], member.scale, member.folder)
        for path, r in ranks.items():
            A[path] = self.A[path][slot, :r].detach().clone()
            B[path] = self.B[path][slot, :, :r].detach().clone()
        return Adapter(name, A, B, member.scale, config, member.samples, member.folder)


def pool_bytes(shapes: dict[str, tuple[int, int]], capacity: int, rank: int, dtype: torch.dtype) -> int:
    """How many bytes a pool's A and B have."""
    return capacity * rank * sum(o + i for o, i in shapes.values()) * dtype.itemsize


def zeros(*size: int, **options) -> torch.Tensor:
    """A zero stack in torch's default memory layout."""
    return torch.zeros(size, **options)


def alloc_B_of(model: Llama) -> Callable[..., torch.Tensor]:
    """The function by which a pool allocates B for this model: the model's alloc_B, or zeros."""
    return getattr(model, "alloc_B", zeros)


def without_tensors(adapter: Adapter) -> Adapter:
    """A copy of the adapter with its name, scales, config, samples and folder alone."""
    return replace(adapter, A={}, B={})
