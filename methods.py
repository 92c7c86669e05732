"""Method name -> how to set up the model for it, and which trained parts it needs.

A method decides, for each request, which adapters its tokens use: none (base), one for all (adapter:NAME), all alike
(uniform), or the k that MeteoRA's gates pick for each token and Linear (meteora, meteora_topK). One batch may mix
them: each row has its own.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapters import Pool, is_pool, linear_shapes, load_adapter, read_pool
from config import nearest
from files import InputError, warn
from model import DTYPES, load_llama
from moe_lora import SampleGate, attach, detach, fixed_rows, load_gates
from tokenizer import Tokenizer

METHODS = ("base", "adapter:NAME", "uniform", "meteora")


@dataclass
class Mole:
    """A base with its tokenizer and a pool of adapters: what load() gives and everything else works on."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    pool: Pool | None = None
    folder: object = None  # the PoolFolder it came from, None without one
    template: str = "{prompt}"
    attached: tuple | None = None  # what is attached: gate file, temperature, spelling, adapters
    gates: list = field(default_factory=list)  # the SampleGates of the attached Linears
    turn: int = 0  # how often set_methods was called: one batch at a time

    @property
    def eos_ids(self):
        """What ends a text: the model's EOS ids and the tokenizer's, which adapters are trained to end with."""
        return {*self.model.config.eos_token_ids, self.tokenizer.eos_id} - {None}


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
        loaded = [load_adapter(path, name, shapes) for name, path in folders]
        _check_base_names(loaded, model)
        mole.pool = Pool.of(loaded, shapes, base.model.embed_tokens.weight.dtype, device)
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


def gate_file(mole, k):
    return mole.folder.path / "gates" / f"meteora_top{k}.safetensors" if mole.folder else None


def default_method(mole, k):
    """The best method that the pool has the parts for, and why, in words."""
    if mole.pool is None:
        return "base", "no adapters here"
    many = f"{len(mole.pool.names)} adapters"
    gates = sorted(mole.folder.path.glob("gates/meteora_top[1-9].safetensors")) if mole.folder else []
    for file in [gate_file(mole, k), *gates] if gates else []:
        if file.exists():
            found = file.stem.removeprefix("meteora_top")
            name = "meteora" if found == str(k) else file.stem
            return name, f"{many}, top-{found} gates from gates/{file.name}"
    if len(mole.pool.names) == 1:
        return f"adapter:{mole.pool.names[0]}", "the only one"
    return "uniform", f"{many} and no gates: python train.py gates makes them"


def gates_of(name, top_k):
    """The k of the gates that method `name` uses (`meteora` those of --top_k), None where it uses none."""
    return int(name.partition("_top")[2] or top_k) if name.startswith("meteora") else None


def check_method(mole, name, top_k=2):
    """Raises InputError unless `name` is a method that this pool has the parts for. Returns it."""
    kind, _, rest = name.partition(":")
    if name == "base":
        return name
    if not (kind == "adapter" and rest) and name != "uniform" and not re.fullmatch(r"meteora(_top[1-9]\d*)?", name):
        raise InputError(f"no method {name!r}{nearest(name, METHODS) or ', one of ' + ', '.join(METHODS)}")
    if mole.pool is None:
        raise InputError(f"method {name}: needs adapters, and there are none: name a --pool or an --adapter NAME=DIR")
    if kind == "adapter":
        mole.pool.slot(rest)
    k = gates_of(name, top_k)
    if k and not (mole.folder and gate_file(mole, k).exists()):
        where = gate_file(mole, k) if mole.folder else "a pool folder with gates"
        raise InputError(f"method {name}: needs {where}: python train.py gates --top_k {k} makes it")
    return name


# Setting up ---------------------------------------------------------------------------------------------------------


def set_methods(mole, names, top_k=2, gate_temperature=1.0, spelling="auto"):
    """Sets the model up for one batch: names[j] is row j's method. Raises InputError for an unknown name, and where
    gates are needed that are missing, naming the command that makes them."""
    for name in names:
        check_method(mole, name, top_k)
    mole.turn += 1
    if mole.pool is None:
        return
    ks = {gates_of(name, top_k) for name in names} - {None}
    if len(ks) > 1:
        raise InputError(f"one batch takes one kind of gate, found top-{' and top-'.join(map(str, sorted(ks)))}")
    _attach(mole, next(iter(ks), None), gate_temperature, spelling)
    choices = []
    for name in names:
        one = {name.partition(":")[2]: 1.0} if name.startswith("adapter:") else {}
        every = {n: 1 / len(mole.pool.names) for n in mole.pool.names}
        choices.append(every if name == "uniform" else one)
    device = mole.model.model.embed_tokens.weight.device
    idx, weight = fixed_rows(mole.pool, choices, device)
    routed = torch.tensor([name.startswith("meteora") for name in names], device=device)
    for gate in mole.gates:
        gate.set(idx, weight, routed)


def _attach(mole, k, temperature, spelling):
    """Attaches the pool with top-k gates (k None: without), unless it is attached just so already."""
    file = gate_file(mole, k) if k else None
    members = tuple((name, m.slot, m.hash) for name, m in mole.pool.members.items())
    key = (file, temperature, spelling, members)
    if mole.attached == key:
        return
    if k:
        inner = load_gates(file, mole.pool, temperature, mole.model.model.embed_tokens.weight.dtype)
        gates = {path: SampleGate(inner[path]) for path in mole.pool.A}
    else:
        gates = dict.fromkeys(mole.pool.A, SampleGate())
    detach(mole.model)
    attach(mole.model, mole.pool, gates, spelling)
    mole.gates, mole.attached = list(dict.fromkeys(gates.values())), key
