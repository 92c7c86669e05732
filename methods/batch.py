"""Sets the model up for a batch: finds methods by name, retrieves, attaches, gives rows adapters."""

import re
from dataclasses import replace

import torch

from common.files import InputError
from common.options import nearest
from methods import CUSTOM, FALLBACK, METHODS
from methods.protocol import POOL, Gated, Merged, Method, OwnLinears
from methods.session import Mole, Ranking
from moe_lora import SampleGate, attach, detach, fixed_rows, set_gates
from pool.slots import Pool, alloc_B_of

# Names --------------------------------------------------------------------------------------------


def method_names() -> list[str]:
    """The names of all methods, as help and docs list them."""
    return [name for method in METHODS for name in method.names]


def split_methods(names: str) -> list[str]:
    """The methods of a list like base,mix:a=0.7,b=0.5,oracle, each once: a part b=0.5 belongs to the
    mix. Raises InputError where there is none."""
    methods = map(str.strip, re.split(r",(?![^,:]*=)", names))
    methods = list(dict.fromkeys(filter(None, methods)))
    if not methods:
        raise InputError("--methods names none")
    return methods


def named_methods(args) -> list[str]:
    """The methods of --method, and those of --mix as methods."""
    return args.method + [f"mix:{mixture}" for mixture in args.mix]


def listed_method(name: str, top_k=2) -> Method | None:
    """The Method of the table that `name` names, None where that depends on a pool's folders."""
    for kind in METHODS:
        if kind is not FALLBACK and (method := kind.parse(name, top_k)):
            return method
    return None


def find_method(mole: Mole, name: str, top_k=2) -> Method:
    """The Method `name`; `top_k` is the k of names that leave it open. Raises InputError where
    there is none."""
    if name in mole.custom_gates:
        return CUSTOM(name, top_k)
    if method := listed_method(name, top_k):
        return method
    method = FALLBACK.parse(name, top_k)
    folder = method.folder(mole) if method else None
    if name in FALLBACK.names or (folder and folder.is_dir()):
        return method
    hint = nearest(name, method_names()) or ", one of " + ", ".join(method_names())
    raise InputError(f"no method {name!r}{hint}")


def check_name(mole: Mole, name: str, top_k=2) -> Method:
    """The Method `name`. Raises InputError unless this pool has the parts for it; reads no weights:
    `mole` may be a find_mole()."""
    method = find_method(mole, name, top_k)
    if method.per_task:
        hint = f"name it, {method.per_task.format('NAME')}, or let eval.py"
        raise InputError(f"method {name} is another one for each task: {hint}")
    if method.needs_adapters and not (mole.pool and mole.pool.members):
        hint = "name a --pool or an --adapter NAME=DIR"
        raise InputError(f"method {name}: needs adapters, and there are none: {hint}")
    method.check(mole)
    return method


def check_method(mole: Mole, name: str, top_k=2) -> str:
    """check_name(), and that the parts were made with these adapters. Returns the name."""
    check_name(mole, name, top_k).check_adapters(mole)
    return name


def for_task(mole: Mole, name: str, task: str) -> str:
    """The method that scores `task`: some are another one for each task."""
    return find_method(mole, name).per_task.format(task) or name


def default_method(mole: Mole, k: int, k_asked=False) -> tuple[str, str]:
    """(The best method that the pool has the parts for, why, in words). `k_asked`: no gates of
    another k will do."""
    if not (mole.pool and mole.pool.members):
        return "base", "no adapters here"
    found = filter(None, (kind.default(mole, k, k_asked) for kind in METHODS))
    name, why = next(found)  # one adapter or several, there is a method for it
    many = len(mole.pool.names)
    return name, f"{many} adapters, {why}" if many > 1 else why


# Setting up ---------------------------------------------------------------------------------------


def retrieve(mole: Mole, names: list[str], prompts, k=3, exclude=(), ids=None) -> list[Ranking]:
    """A ranking for each row: the `k` adapters that its method retrieves for its prompt, without
    those of `exclude`; empty where the method retrieves none. `ids` are the prompts' token ids.
    Raises InputError."""
    found = {}
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        texts = [prompts[row] for row in rows]
        row_ids = ids and [ids[row] for row in rows]
        rankings = find_method(mole, name).retrieve(mole, texts, row_ids, k, exclude)
        found |= zip(rows, rankings, strict=True)
    return [found[row] for row in range(len(names))]


def set_methods(
    mole: Mole,
    names: list[str],
    top_k=2,
    gate_temperature=1.0,
    backend="auto",
    retrieved: list[Ranking] | None = None,
    exclude=(),
) -> None:
    """Sets the model up for one batch: names[j] is row j's method, retrieved[j] what retrieve()
    found for it; none uses an adapter of `exclude`. Raises InputError for an unknown name, where a
    part is missing, naming the command that makes it, and for methods that can't share a batch."""
    for name in set(names):
        check_method(mole, name, top_k)
    if mole.pool is None:
        mole.batch_id += 1
        return
    methods = [find_method(mole, name, top_k) for name in names]
    requests = list(zip(methods, retrieved or [[]] * len(names), strict=True))
    needed = []
    for method, found in requests:
        check_request(mole, method, found, exclude)
        needed += method.in_memory(mole, found, exclude)
    shared = _shared(methods)
    mole.pool.need(needed)
    mole.batch_id += 1
    in_slots = shared.key[0] == POOL[0]  # what is merged is a copy: slots may change beneath it
    mole.slots_in_use = mole.slots(needed) if in_slots else {}
    pool = _attach(mole, shared, requests, gate_temperature, backend, tuple(sorted(exclude)))
    shared.prepare(mole, requests)
    choices = [method.weights(mole, found, exclude) for method, found in requests]
    idx, weight = fixed_rows(pool, choices)
    routed = torch.tensor([isinstance(method, Gated) for method in methods])
    set_gates(mole.gates, idx.to(mole.device), weight.to(mole.device), routed.to(mole.device))


def check_request(mole: Mole, method: Method, found: Ranking, exclude) -> None:
    """Raises InputError where a request lacks what it has to have."""
    if method.retrieves and not found:
        hint = "retrieve() comes before set_methods()"
        raise InputError(f"method {method.name}: nothing was retrieved for it: {hint}")
    method.check_exclude(exclude)
    if method.needs_adapters and not mole.pool.members.keys() - set(exclude):
        raise InputError(f"method {method.name}: every adapter is excluded")


def _shared(methods):
    """The method whose key all of a batch go with. Raises InputError where there is none."""
    kinds = {method.key: method for method in methods}
    gated = {key: method for key, method in kinds.items() if key[0] == POOL[0] and key != POOL}
    if gated:
        kinds.pop(POOL, None)  # fixed mixtures beside one kind of gate
    bare = not any(method.needs_adapters for method in methods if method.key == POOL)
    if bare and any(isinstance(method, Merged) for method in methods):
        kinds.pop(POOL, None)  # the base beside merged adapters
    first, *others = kinds.values()
    if others:
        both = f"{first.name} and {others[0].name}"
        raise InputError(f"one batch can't hold both {both}: they set the model up differently")
    return first


def _attach(mole, shared, requests, temperature, backend, exclude):
    """Attaches what the batch shares, unless it is attached just so already; returns the pool that
    rows choose from."""
    pool = mole.pool
    derived = {}
    for method, found in requests:
        if isinstance(method, Merged):
            derived[method.label(found)] = (method, found)
    members = {} if shared.follows_the_pool else mole.slots(pool.names)
    custom = id(mole.custom_gates.get(shared.name))
    key = (shared.key, custom, sorted(derived), shared.top_k, temperature, backend)
    key += (members, exclude, id(pool), len(pool.A))
    if mole.attached and mole.attached[0] == key:
        return mole.attached[1]
    detach(mole.model)
    for hook in mole.hooks:
        hook.remove()
    mole.attached = None
    mole.gates = []
    mole.hooks = []
    if isinstance(shared, OwnLinears):
        shared.attach(mole, backend, exclude)
    else:
        if isinstance(shared, Merged):
            merged = []
            for label, (method, found) in sorted(derived.items()):
                merged.append(replace(method.merge(mole, found, exclude), name=label))
            pool = Pool.of(merged, pool.shapes, mole.dtype, mole.device, alloc_B_of(mole.model))
        if isinstance(shared, Gated):
            pool = shared.pool_of(mole)
            inner = shared.gates(mole, pool, temperature, exclude)
            gates = {path: SampleGate(inner[path]) for path in pool.A}
        else:
            gates = dict.fromkeys(pool.A, SampleGate())
        attach(mole.model, pool, gates, backend)
        mole.gates = list(dict.fromkeys(gates.values()))
        mole.hooks = shared.hooks(mole.model, inner) if isinstance(shared, Gated) else []
    mole.attached = (key, pool)
    return pool


def force_adapters(mole: Mole, names: list) -> None:
    """Another adapter for each row from the next token on (None: the base), or a list of them for
    each token of the next forward; for a batch of methods adapter:NAME or base."""
    mole.force_count += 1
    each_token = bool(names) and isinstance(names[0], list)
    flat = sum(names, []) if each_token else names
    choices = [{name: 1.0} if name else {} for name in flat]
    idx, weight = fixed_rows(mole.pool, choices, mole.device)
    set_gates(mole.gates, idx, weight, each_token=each_token)
