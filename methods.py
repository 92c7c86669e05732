"""Method name -> how to set up the model for it, and which trained parts it needs.

A method decides which adapters the tokens of a request use. Those that mix adapters of the pool share one setup, so
that one batch may hold requests with different ones: none (base), one for all tokens (adapter:NAME), all alike
(uniform), or what gates say for each token (meteora, soft, loraflow, arrow). Those that merge parameters don't: a merge
of A and of B apart is one derived adapter for each request (average_ab, lorahub:TASK, lora_b, ...), a merge of the
products B A edits a copy of W (ties_ba, dare_ba), and smear merges anew for each request in every Linear.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from adapters import Pool, is_pool, linear_shapes, load_adapter, read_pool
from baselines import (
    MERGES,
    ArrowGate,
    MergedLinear,
    Prompt,
    SmearLinear,
    arrow_prototypes,
    loraflow_gates,
    lorahub,
    member_mask,
    merge,
    smear_routers,
)
from config import nearest
from files import InputError, read_json, warn
from model import DTYPES, load_llama
from moe_lora import GateFile, SampleGate, attach, detach, fixed_rows, meteora_gates, set_gates, swap
from tokenizer import Tokenizer

GATED = ("meteora", "soft", "loraflow", "smear")  # what train.py gates --kind trains
METHODS = ("base", "oracle", "adapter:NAME", "lora_f", "lora_b", "uniform", "average_ba", *MERGES, "lorahub:TASK",
           "arrow", *GATED, "meteora_top1", "meteora_top2")  # fmt: skip


@dataclass
class Mole:
    """A base with its tokenizer and a pool of adapters: what load() gives and everything else works on."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    pool: Pool | None = None
    folder: object = None  # the PoolFolder it came from, None without one
    template: str = "{prompt}"
    attached: tuple | None = None  # what is attached: the setup, options, adapters
    gates: list = field(default_factory=list)  # the SampleGates of the attached Linears
    prompt: Prompt = field(default_factory=Prompt)  # which tokens are the prompt's, for methods that decide from it
    own: dict = field(default_factory=dict)  # {method name: a gate of yours, or {module path: gate}}
    turn: int = 0  # how often set_methods was called: one batch at a time
    setting: int = 0  # how often force() was

    @property
    def eos_ids(self):
        """What ends a text: the model's EOS ids and the tokenizer's, which adapters are trained to end with."""
        return {*self.model.config.eos_token_ids, self.tokenizer.eos_id} - {None}

    @property
    def dtype(self):
        return self.model.model.embed_tokens.weight.dtype

    @property
    def device(self):
        return self.model.model.embed_tokens.weight.device


def load_mole(model, pool=None, extra=(), dtype="auto", device="auto"):
    """Model folder, pool folder (default: the model's own, where it is one) and extra {name: PEFT folder} -> Mole."""
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    base = load_llama(model, None if dtype == "auto" else DTYPES[dtype], device)
    tokenizer = Tokenizer(model)
    folder = read_pool(pool or model) if pool or is_pool(model) else None
    mole = Mole(base, tokenizer, folder=folder, template=folder.template if folder else "{prompt}")
    if folder and folder.fingerprint not in (None, base.fingerprint):
        warn(f"{folder.path}: its adapters were trained on another base than {model} (fingerprint differs)")
    folders = list(folder.adapters.items()) if folder else []
    for name, path in extra:
        if name in dict(folders):
            raise InputError(f"adapter name {name!r} twice: {dict(folders)[name]} and {path}")
        folders.append((name, Path(path)))
    if folders:
        shapes = linear_shapes(base)
        mole.pool = Pool.load(dict(folders), shapes, base.model.embed_tokens.weight.dtype, device)
        _check_base_names([member.adapter for member in mole.pool.members.values()], model)
    return mole


def _check_base_names(adapters, model):
    """The commonest mistake: an adapter for another base. Its config names the one it was made for."""
    strangers = {}
    for adapter in adapters:
        named = adapter.config.get("base_model_name_or_path")
        if named and Path(named).name.lower() != Path(model).resolve().name.lower():
            strangers.setdefault(named, []).append(adapter.name)
    for named, names in strangers.items():
        warn(f"made for base {named!r}, not {str(model)!r}: adapter {', '.join(names)}")


# Names --------------------------------------------------------------------------------------------------------------


def gate_file(mole, kind):
    """POOL/gates/KIND.safetensors, None without a pool folder."""
    return mole.folder.path / "gates" / f"{kind}.safetensors" if mole.folder else None


def default_method(mole, k):
    """The best method that the pool has the parts for, and why, in words."""
    if mole.pool is None:
        return "base", "no adapters here"
    many = f"{len(mole.pool.names)} adapters"
    gates = sorted(mole.folder.path.glob("gates/meteora_top[1-9].safetensors")) if mole.folder else []
    for file in [gate_file(mole, f"meteora_top{k}"), *gates] if gates else []:
        if file.exists():
            found = file.stem.removeprefix("meteora_top")
            name = "meteora" if found == str(k) else file.stem
            return name, f"{many}, top-{found} gates from gates/{file.name}"
    if len(mole.pool.names) == 1:
        return f"adapter:{mole.pool.names[0]}", "the only one"
    return "uniform", f"{many} and no gates: python train.py gates makes them"


def for_task(method, task):
    """The method that scores `task`: oracle and lorahub are another one for each task."""
    return {"oracle": f"adapter:{task}", "lorahub": f"lorahub:{task}"}.get(method, method)


def setup_of(mole, name, top_k):
    """(setup, part): what the model needs for method `name`. Only methods of one setup fit into a batch."""
    kind = name.partition(":")[0]
    if name in mole.own or name in ("arrow", "soft", "loraflow"):
        return "pool", name
    if meteora := re.fullmatch(r"meteora(?:_top([1-9]\d*))?", name):
        return "pool", f"meteora_top{meteora[1] or top_k}"
    if name in ("base", "uniform", "average_ba") or kind == "adapter":
        return "pool", None
    if name in ("ties_ba", "dare_ba", "smear"):
        return name, None
    return "derived", None


def check_method(mole, name, top_k=2):
    """Raises InputError unless `name` is a method that this pool has the parts for. Returns it."""
    kind, _, rest = name.partition(":")
    if name == "base":
        return name
    if name in ("oracle", "lorahub"):
        example = for_task(name, "NAME")
        raise InputError(f"method {name} is another one for each task: name it, {example}, or let eval.py")
    fixed = {*METHODS} - {"adapter:NAME", "lorahub:TASK"}
    folder = mole.folder.path if mole.folder else None
    baseline = folder / "baselines" / name if folder and re.fullmatch(r"[\w-]+", name) else None
    known = (
        name in fixed
        or name in mole.own
        or (kind in ("adapter", "lorahub") and rest)
        or re.fullmatch(r"meteora_top[1-9]\d*", name)
    )
    if not known and not (baseline and baseline.is_dir()):
        raise InputError(f"no method {name!r}{nearest(name, METHODS) or ', one of ' + ', '.join(METHODS)}")
    if mole.pool is None:
        raise InputError(f"method {name}: needs adapters, and there are none: name a --pool or an --adapter NAME=DIR")
    if kind == "adapter":
        mole.pool.slot(rest)
    if kind == "lorahub" and rest not in _lorahub_weights(mole):
        tasks = _lorahub_weights(mole)
        raise InputError(
            f"method {name}: no weights for {rest!r}{nearest(rest, tasks) or ', only for ' + ', '.join(tasks)}"
        )
    if name in ("lora_f", "lora_b"):
        _need(name, baseline, f"train.py adapters --joint {name}")
    gates = "smear" if name == "smear" else setup_of(mole, name, top_k)[1]
    if gates and gates not in ("arrow", *mole.own):
        k = gates.partition("_top")[2]
        command = f"train.py gates --top_k {k}" if k else f"train.py gates --kind {gates}"
        _need(name, gate_file(mole, gates), command)
    return name


def _need(method, path, command):
    if not (path and path.exists()):
        raise InputError(f"method {method}: needs {path or 'a pool folder with its parts'}: python {command} makes it")


def _lorahub_weights(mole):
    """{task: {adapter: weight}} of POOL/baselines/lorahub.json. Raises InputError where other adapters made it."""
    file = mole.folder.path / "baselines" / "lorahub.json" if mole.folder else None
    _need("lorahub", file, "train.py lorahub")
    found = read_json(file)
    if found.get("adapters") != {name: member.hash for name, member in sorted(mole.pool.members.items())}:
        raise InputError(f"{file}: made for other adapters than the pool's: python train.py lorahub makes it again")
    return found["weights"]


# Setting up ---------------------------------------------------------------------------------------------------------


def set_methods(mole, names, top_k=2, gate_temperature=1.0, spelling="auto"):
    """Sets the model up for one batch: names[j] is row j's method. Raises InputError for an unknown name, where a
    part is missing, naming the command that makes it, and for methods that can't share a batch."""
    for name in set(names):
        check_method(mole, name, top_k)
    mole.turn += 1
    if mole.pool is None:
        return
    setups = {setup_of(mole, name, top_k): name for name in names if name != "base"} or {("pool", None): "base"}
    if sum(key[0] == "pool" for key in setups) > 1:  # methods with fixed mixtures beside one kind of gate
        setups.pop(("pool", None), None)
    (setup, part), first = next(iter(setups.items()))
    if mole.model.model.compiled_step and (setup == "smear" or part == "loraflow"):
        raise InputError(f"method {first}: its Linears share weights, compiled blocks can't: --no-compile")
    clash = [name for key, name in setups.items() if key != (setup, part)]
    clash += ["base"] if "base" in names and setup not in ("pool", "derived") else []
    if clash:
        raise InputError(f"one batch can't hold both {first} and {clash[0]}: they set the model up differently")
    pool = _attach(mole, setup, part, names, top_k, gate_temperature, spelling)
    choices = [_choice(name, pool, setup) for name in names]
    idx, weight = fixed_rows(pool, choices, mole.device)
    routed = torch.tensor([setup_of(mole, name, top_k) == (setup, part) and part is not None for name in names])
    set_gates(mole.gates, idx, weight, routed.to(mole.device), compiled=mole.model.model.compiled_step)


def _choice(name, pool, setup):
    """{adapter: weight} of a method whose mixture is fixed; empty for the base and where gates decide."""
    if name in ("uniform", "average_ba"):
        return {adapter: 1 / len(pool.names) for adapter in pool.names}
    if name.startswith("adapter:"):
        return {name.partition(":")[2]: 1.0}
    return {name: 1.0} if setup == "derived" and name != "base" else {}


def force(mole, names):
    """Another adapter for each row from the next token on (None: the base), or a list of them for each token of the
    next forward; for a batch of methods adapter:NAME or base."""
    mole.setting += 1
    flat = names if not names or not isinstance(names[0], list) else [name for row in names for name in row]
    idx, weight = fixed_rows(mole.pool, [{name: 1.0} if name else {} for name in flat], mole.device)
    set_gates(mole.gates, idx, weight, each_token=flat is not names, compiled=mole.model.model.compiled_step)


def _attach(mole, setup, part, names, k, temperature, spelling):
    """Attaches what the setup needs, unless it is attached just so already; returns the pool that rows choose from."""
    members = tuple((name, m.slot, m.hash) for name, m in mole.pool.members.items())
    derived = tuple(sorted({name for name in names if name != "base"})) if setup == "derived" else ()
    key = (setup, part, id(mole.own.get(part)), derived, k, temperature, spelling, members)
    if mole.attached and mole.attached[0] == key:
        return mole.attached[1]
    pool, gates = mole.pool, dict.fromkeys(mole.pool.A, SampleGate())
    detach(mole.model)
    mole.attached, mole.gates = None, []
    if setup == "smear":
        rows = GateFile(gate_file(mole, "smear"), pool)
        routers = rows.fill(smear_routers(pool, mole.prompt, rows.known), mole.dtype)
        attach(mole.model, pool, routers, spelling, make=SmearLinear)
    elif setup in ("ties_ba", "dare_ba"):
        for path, delta in merge(pool, setup).items():
            swap(mole.model, path, MergedLinear(mole.model.get_submodule(path), delta))
    else:
        if setup == "derived":
            pool = Pool.of([_derive(mole, name) for name in derived], mole.pool.shapes, mole.dtype, mole.device)
            gates = dict.fromkeys(pool.A, SampleGate())
        elif part:
            inner = _trained_gates(mole, part, k, temperature)
            gates = {path: SampleGate(inner[path]) for path in pool.A}
        attach(mole.model, pool, gates, spelling)
        mole.gates = list(dict.fromkeys(gates.values()))
    mole.attached = (key, pool)
    return pool


def _derive(mole, name):
    """The one adapter that method `name` runs every token through."""
    if name in MERGES:
        return merge(mole.pool, name)
    if name.startswith("lorahub:"):
        return replace(lorahub(mole.pool, _lorahub_weights(mole)[name.partition(":")[2]]), name=name)
    return load_adapter(mole.folder.path / "baselines" / name, name, linear_shapes(mole.model))


def new_gates(kind, pool, k, temperature=1.0, known=None):
    """{module path: untrained gate} of a kind that mixes adapters: meteora, soft (k = e) or loraflow."""
    if kind == "loraflow":
        return loraflow_gates(pool, known)
    return meteora_gates(pool, k if kind == "meteora" else pool.capacity, temperature, known)


def _trained_gates(mole, part, k, temperature):
    """{module path: gate}: yours as you left them, arrow's from the adapters, the others from the pool's gate file."""
    pool = mole.pool
    if part in mole.own:
        own = mole.own[part]
        return own if isinstance(own, dict) else dict.fromkeys(pool.A, own)
    if part == "arrow":
        prototypes = {path: arrow_prototypes(pool.A[path], pool.B[path]).to(mole.dtype) for path in pool.A}
        return {path: ArrowGate(v, k, temperature, member_mask(pool, mole.device)) for path, v in prototypes.items()}
    rows = GateFile(gate_file(mole, part), pool)
    return rows.fill(new_gates(part.partition("_")[0], pool, rows.k, temperature, rows.known), mole.dtype)
