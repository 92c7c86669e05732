"""Method name -> how to set up the model for it, and which trained parts it needs.

A method decides which adapters the tokens of a request use. Those that mix adapters of the pool share one setup, so
that one batch may hold requests with different ones: none (base), one for all tokens (adapter:NAME), all alike
(uniform), what gates say for each token (meteora, soft, loraflow, arrow), or those retrieved for a request (retrieve):
the best of them (selection), all alike (mixture), by the size of what they make of the prompt (logo), or as RAMoLE's
router says for each token (ramole). Those that merge parameters don't: a merge of A and of B apart is one derived
adapter for each request (average_ab, lorahub:TASK, lora_b, fusion and adaptersoup of those retrieved), a merge of the
products B A edits a copy of W (ties_ba, dare_ba), and smear merges anew for each request in every Linear.
"""

import re
from dataclasses import dataclass, field, replace

import torch

from common.files import InputError, read_json, warn
from common.options import nearest
from common.tokenizer import Tokenizer
from methods.baselines import (
    MERGES,
    ArrowGate,
    Prompt,
    SmearLinear,
    arrow_prototypes,
    loraflow_gates,
    lorahub,
    member_mask,
    merge,
    merged_linear,
    smear_routers,
)
from methods.logo import logo
from methods.router import candidate_rows, load_routers, set_candidates
from moe_lora import (
    SampleGate,
    attach,
    attached,
    detach,
    fixed_rows,
    meteora_gates,
    set_gates,
    swap,
)
from pool.adapters import Pool, alloc_B_of, linear_shapes, load_adapter
from pool.gate_files import GateFile
from pool.load import load_base, load_pool
from pool.retriever import LlamaEncoder, Retriever, load_retriever

GATED = ("meteora", "soft", "loraflow", "smear")  # what train.py gates --kind trains, beside moe
RETRIEVED = ("selection", "mixture", "fusion", "adaptersoup", "ramole")
LOGO = ("logo", "logo_entropy")
METHODS = ("base", "oracle", "adapter:NAME", "lora_f", "lora_b", "uniform", "average_ba", *MERGES, "lorahub:TASK",
           "arrow", *GATED, "meteora_top1", "meteora_top2", "moe_top1", "moe_top3", *RETRIEVED, *LOGO)  # fmt: skip


@dataclass
class Mole:
    """A base with its tokenizer and a pool of adapters: what load() gives and everything else works on."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    shapes: dict  # linear_shapes of the base
    pool: Pool | None = None
    folder: object = None  # the PoolFolder it came from, None without one
    template: str = "{prompt}"
    attached: tuple | None = None  # what is attached: the setup, options, adapters
    gates: list = field(default_factory=list)  # the SampleGates of the attached Linears
    prompt: Prompt = field(default_factory=Prompt)  # which tokens are the prompt's, for methods that decide from it
    own: dict = field(default_factory=dict)  # {method name: a gate of yours, or {module path: gate}}
    embed: object = None  # a text encoder of yours for retrieval, texts -> (n, d)
    retriever: Retriever | None = None  # made where it is first asked for
    bound: int = -1  # the pool's version that RAMoLE's routers know
    turn: int = 0  # how often set_methods was called: one batch at a time
    using: dict = field(default_factory=dict)  # {adapter: (slot, hash)} that the batch chooses from
    setting: int = 0  # how often force() was

    @property
    def eos_ids(self):
        """What ends a text: the model's EOS ids and the tokenizer's, which adapters are trained to end with."""
        return {*self.model.config.eos_token_ids, self.tokenizer.eos_id} - {None}

    def slots(self, names):
        """{adapter: (slot, hash)} of those of `names` that are in the pool."""
        members = self.pool.members if self.pool else {}
        return {name: (members[name].slot, members[name].hash) for name in names if name in members}

    @property
    def dtype(self):
        return self.model.model.embed_tokens.weight.dtype

    @property
    def device(self):
        return self.model.model.embed_tokens.weight.device


def load_mole(model, pool=None, extra=(), dtype="auto", device="auto", resident=0, fast=True):
    """Model folder, pool folder (default: the model's own, where it is one) and extra [(name, PEFT folder)] -> Mole.
    `resident`: how many adapters are in memory at most, 0 = all. `fast` False: plain, without what fast/ installs."""
    base = load_base(model, dtype, device, fast)
    tokenizer = Tokenizer(model)
    shapes = linear_shapes(base)
    folder, adapters = load_pool(base, model, pool, extra, resident)
    return Mole(base, tokenizer, shapes, adapters, folder, folder.template if folder else "{prompt}")


def add_adapter(mole, name, folder):
    """One more adapter for a running model, from a PEFT folder; requests under way go on as they were. Raises
    InputError."""
    adapter = load_adapter(folder, name, mole.shapes)
    if mole.pool is None:
        mole.pool = Pool.of([adapter], mole.shapes, mole.dtype, mole.device, alloc_B_of(mole.model))
    else:
        mole.pool.add(adapter)


# Names --------------------------------------------------------------------------------------------------------------


def gate_file(mole, kind):
    """POOL/gates/KIND.safetensors, None without a pool folder."""
    return mole.folder.path / "gates" / f"{kind}.safetensors" if mole.folder else None


def default_method(mole, k):
    """The best method that the pool has the parts for, and why, in words."""
    if not (mole.pool and mole.pool.members):
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
    if name in mole.own or name in ("arrow", "soft", "loraflow", "ramole") or re.fullmatch(r"moe_top[1-9]\d*", name):
        return "pool", name
    if meteora := re.fullmatch(r"meteora(?:_top([1-9]\d*))?", name):
        return "pool", f"meteora_top{meteora[1] or top_k}"
    if name in ("base", "uniform", "average_ba", "selection", "mixture", *LOGO) or kind == "adapter":
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
        or re.fullmatch(r"(meteora|moe)_top[1-9]\d*", name)
    )
    if not known and not (baseline and baseline.is_dir()):
        raise InputError(f"no method {name!r}{nearest(name, METHODS) or ', one of ' + ', '.join(METHODS)}")
    if not (mole.pool and mole.pool.members):
        raise InputError(f"method {name}: needs adapters, and there are none: name a --pool or an --adapter NAME=DIR")
    if kind == "adapter":
        mole.pool.member(rest)
    if kind == "lorahub" and rest not in _lorahub_weights(mole):
        tasks = _lorahub_weights(mole)
        raise InputError(
            f"method {name}: no weights for {rest!r}{nearest(rest, tasks) or ', only for ' + ', '.join(tasks)}"
        )
    if name in ("lora_f", "lora_b"):
        _need(name, baseline, f"train.py adapters --joint {name}")
    gates = "smear" if name == "smear" else setup_of(mole, name, top_k)[1]
    if gates == "ramole":
        _need(name, folder and folder / "router.safetensors", "train.py router")
    elif gates and gates not in ("arrow", *mole.own):
        trained, _, k = gates.partition("_top")
        kind = "" if trained == "meteora" else f" --kind {trained}"
        _need(name, gate_file(mole, gates), f"train.py gates{kind}" + (f" --top_k {k}" if k else ""))
    return name


def _need(method, path, command):
    if not (path and path.exists()):
        raise InputError(f"method {method}: needs {path or 'a pool folder with its parts'}: python {command} makes it")


def _lorahub_weights(mole, ood=False):
    """{task: {adapter: weight}} of POOL/baselines/lorahub.json, or lorahub_ood.json, searched without each task's own
    adapter. Raises InputError where other adapters made it."""
    file = mole.folder.path / "baselines" / f"lorahub{'_ood' * ood}.json" if mole.folder else None
    _need("lorahub", file, "train.py lorahub" + " --ood" * ood)
    found = read_json(file)
    mole.pool.need(mole.pool.names)  # an adapter's hash is known when it was loaded
    if found.get("adapters") != {name: member.hash for name, member in sorted(mole.pool.members.items())}:
        raise InputError(f"{file}: made for other adapters than the pool's: python train.py lorahub makes it again")
    return found["weights"]


# Retrieving ---------------------------------------------------------------------------------------------------------


def retriever_of(mole):
    """The pool's retriever, up to date with the pool: POOL/retriever.safetensors or, untrained, the base's own hidden
    states; your `mole.embed` instead of both. Raises InputError."""
    file = mole.folder.path / "retriever.safetensors" if mole.folder else None
    if mole.embed and (mole.retriever is None or mole.retriever.embed is not mole.embed):
        mole.retriever = Retriever(mole.embed)
    elif mole.retriever is None and file and file.exists():
        mole.retriever, _ = load_retriever(file, mole.model, mole.tokenizer)
    elif mole.retriever is None:
        warn("no retriever.safetensors beside the adapters: the base's hidden states as they are rank them; "
             "python train.py retriever makes it")  # fmt: skip
        mole.retriever = Retriever(LlamaEncoder(mole.model, mole.tokenizer))
    mole.retriever.keep({name: member.adapter.samples for name, member in mole.pool.members.items()})
    return mole.retriever


def retrieve(mole, names, prompts, k=3, exclude=(), ids=None):
    """[(adapter, score), ...] for each row, the best first: the `k` that its method retrieves for its prompt, without
    those of `exclude`; none where the method retrieves none. adaptersoup's are one set for all its prompts, logo's
    scores come from one forward pass of the prompts' token ids `ids`. Raises InputError."""
    found = [[] for _ in names]
    by_text = [j for j, name in enumerate(names) if name in RETRIEVED]
    if by_text:
        retriever = retriever_of(mole)
        for j, pairs in zip(by_text, retriever([prompts[j] for j in by_text], k, exclude), strict=True):
            found[j] = pairs
        if soup := [j for j in by_text if names[j] == "adaptersoup"]:
            mean = retriever.embed([prompts[j] for j in soup]).mean(0, keepdim=True)
            for j in soup:
                found[j] = retriever.nearest(mean, k, exclude)[0]
    for method in {name for name in names if name in LOGO}:
        rows = [j for j, name in enumerate(names) if name == method]
        for j, pairs in zip(rows, logo(mole, [ids[j] for j in rows], k, exclude, method), strict=True):
            found[j] = pairs
    return found


# Setting up ---------------------------------------------------------------------------------------------------------


def set_methods(mole, names, top_k=2, gate_temperature=1.0, backend="auto", retrieved=None, exclude=()):
    """Sets the model up for one batch: names[j] is row j's method, retrieved[j] what retrieve() found for it; none uses
    an adapter of `exclude`. Raises InputError for an unknown name, where a part is missing, naming the
    command that makes it, and for methods that can't share a batch."""
    for name in set(names):
        check_method(mole, name, top_k)
    if mole.pool is None:
        mole.turn += 1
        return
    rows = list(zip(names, retrieved or [[] for _ in names], strict=True))
    for name, found in rows:
        if name in (*RETRIEVED, *LOGO) and not found:
            raise InputError(f"method {name}: nothing was retrieved for it: retrieve() comes before set_methods()")
        if not mole.pool.members.keys() - set(exclude) and name != "base" and not name.startswith("adapter:"):
            raise InputError(f"method {name}: every adapter is excluded")
        if name in [f"adapter:{adapter}" for adapter in exclude]:
            raise InputError(f"method {name}: that adapter is excluded")
        if name in mole.own and exclude:
            raise InputError(f"method {name}: a gate of your own chooses among all adapters, {exclude[0]!r} too")
    setup, part = _shared_setup(mole, names, top_k)
    needed = _needed(mole, rows, setup, part, exclude)
    mole.pool.need(needed)
    mole.turn += 1
    mole.using = mole.slots(needed) if setup == "pool" else {}  # what is merged is there already
    pool = _attach(mole, setup, part, rows, top_k, gate_temperature, backend, tuple(sorted(exclude)))
    if part == "ramole":
        _set_candidates(mole, [found if name == "ramole" else [] for name, found in rows])
    choices = [_choice(name, found, pool, setup, exclude) for name, found in rows]
    idx, weight = fixed_rows(pool, choices, mole.device)
    routed = torch.tensor([setup_of(mole, name, top_k) == (setup, part) and part is not None for name in names])
    set_gates(mole.gates, idx, weight, routed.to(mole.device))


def _shared_setup(mole, names, top_k):
    """The (setup, part) that all of `names` go with. Raises InputError where there is none."""
    setups = {setup_of(mole, name, top_k): name for name in names if name != "base"} or {("pool", None): "base"}
    if sum(key[0] == "pool" for key in setups) > 1:  # methods with fixed mixtures beside one kind of gate
        setups.pop(("pool", None), None)
    (setup, part), first = next(iter(setups.items()))
    clash = [name for key, name in setups.items() if key != (setup, part)]
    clash += ["base"] if "base" in names and setup not in ("pool", "derived") else []
    if clash:
        raise InputError(f"one batch can't hold both {first} and {clash[0]}: they set the model up differently")
    return setup, part


def _needed(mole, rows, setup, part, exclude):
    """Names of the adapters that have to be in memory for a batch; the others may stay on disk."""
    found = [adapter for name, pairs in rows for adapter, _ in pairs[: 1 if name == "selection" else None]]
    named = [name.partition(":")[2] for name, _ in rows if name.startswith("adapter:")]
    whole = (
        setup == "pool"
        and part not in (None, "ramole")
        or any(name in ("uniform", "average_ba", "smear", *MERGES) or name.startswith("lorahub:") for name, _ in rows)
    )
    return [*found, *named, *(name for name in mole.pool.names if whole and name not in exclude)]


def _label(name, found):
    """What a derived adapter is called: of retrieved ones there is another for each set."""
    return f"{name} of {', '.join(sorted(adapter for adapter, _ in found))}" if found else name


def _choice(name, found, pool, setup, exclude):
    """{adapter: weight} of a method whose mixture is fixed; empty for the base and where gates decide."""
    if name in ("uniform", "average_ba"):
        used = [adapter for adapter in pool.names if adapter not in exclude]
        return {adapter: 1 / len(used) for adapter in used}
    if name.startswith("adapter:"):
        return {name.partition(":")[2]: 1.0}
    if name == "selection":
        return {found[0][0]: 1.0}
    if name == "mixture":
        return {adapter: 1 / len(found) for adapter, _ in found}
    if name in LOGO:
        total = sum(score for _, score in found) or 1.0
        return {adapter: score / total for adapter, score in found}
    return {_label(name, found): 1.0} if setup == "derived" and name != "base" else {}


def _set_candidates(mole, retrieved):
    """Gives RAMoLE's routers the batch's candidates, and the adapters that are in the slots now."""
    routers = {path: linear.gate.inner for path, linear in attached(mole.model).items()}
    if mole.bound != mole.pool.version:
        for path, router in routers.items():
            router.bind(mole.pool.B[path], mole.pool.scale[path])
        mole.bound = mole.pool.version
    k = max([1, *map(len, retrieved)])
    prior = next(iter(routers.values())).prior
    set_candidates(routers.values(), *candidate_rows(mole.pool, retrieved, k, prior, mole.device))


def force(mole, names):
    """Another adapter for each row from the next token on (None: the base), or a list of them for each token of the
    next forward; for a batch of methods adapter:NAME or base."""
    mole.setting += 1
    flat = names if not names or not isinstance(names[0], list) else [name for row in names for name in row]
    idx, weight = fixed_rows(mole.pool, [{name: 1.0} if name else {} for name in flat], mole.device)
    set_gates(mole.gates, idx, weight, each_token=flat is not names)


def _attach(mole, setup, part, rows, k, temperature, backend, exclude):
    """Attaches what the setup needs, unless it is attached just so already; returns the pool that rows choose from."""
    derived = (
        {_label(name, found): (name, found) for name, found in rows if name != "base"} if setup == "derived" else {}
    )
    fixed = setup == "pool" and part in (None, "ramole")  # these take adapters as they come and go
    members = () if fixed else tuple((name, m.slot, m.hash) for name, m in mole.pool.members.items())
    key = (setup, part, id(mole.own.get(part)), tuple(sorted(derived)), k, temperature, backend, members, exclude,
           id(mole.pool), len(mole.pool.A))  # fmt: skip
    if mole.attached and mole.attached[0] == key:
        return mole.attached[1]
    pool, gates = mole.pool, dict.fromkeys(mole.pool.A, SampleGate())
    detach(mole.model)
    mole.attached, mole.gates = None, []
    if setup == "smear":
        rows = GateFile(gate_file(mole, "smear"), pool, exclude)
        routers = rows.fill(smear_routers(pool, mole.prompt, rows.known), mole.dtype)
        attach(mole.model, pool, routers, backend, make=SmearLinear)
    elif setup in ("ties_ba", "dare_ba"):
        for path, delta in merge(pool, setup, exclude=exclude).items():
            swap(mole.model, path, merged_linear(mole.model.get_submodule(path), delta))
    else:
        if setup == "derived":
            made = [replace(_derive(mole, *derived[label], exclude), name=label) for label in sorted(derived)]
            pool = Pool.of(made, mole.pool.shapes, mole.dtype, mole.device, alloc_B_of(mole.model))
            gates = dict.fromkeys(pool.A, SampleGate())
        elif part:
            inner = _trained_gates(mole, part, k, temperature, exclude)
            gates = {path: SampleGate(inner[path]) for path in pool.A}
        attach(mole.model, pool, gates, backend)
        mole.gates = list(dict.fromkeys(gates.values()))
    mole.attached = (key, pool)
    return pool


def _derive(mole, name, found, exclude):
    """The one adapter that method `name` runs every token through."""
    if found:
        return merge(mole.pool, "average_ab", names=[adapter for adapter, _ in found])
    if name in MERGES:
        return merge(mole.pool, name, exclude=exclude)
    if name.startswith("lorahub:"):
        task = name.partition(":")[2]
        weights = _lorahub_weights(mole, task in exclude).get(task, {})
        return lorahub(mole.pool, {adapter: w for adapter, w in weights.items() if adapter not in exclude})
    return load_adapter(mole.folder.path / "baselines" / name, name, mole.shapes)


def new_gates(kind, pool, k, temperature=1.0, known=None):
    """{module path: untrained gate} of a kind that mixes adapters: meteora, moe, soft (moe with k = e) or loraflow."""
    if kind == "loraflow":
        return loraflow_gates(pool, known)
    return meteora_gates(pool, pool.capacity if kind == "soft" else k, temperature, known, full=kind == "moe")


def _trained_gates(mole, part, k, temperature, exclude):
    """{module path: gate}: yours as you left them, arrow's from the adapters, the others from the pool's files."""
    pool = mole.pool
    if part in mole.own:
        own = mole.own[part]
        return own if isinstance(own, dict) else dict.fromkeys(pool.A, own)
    if part == "ramole":
        mole.bound = pool.version
        return load_routers(mole.folder.path / "router.safetensors", pool, mole.model, mole.dtype)
    if part == "arrow":
        prototypes = {path: arrow_prototypes(pool.A[path], pool.B[path]).to(mole.dtype) for path in pool.A}
        known = member_mask(pool, mole.device, exclude)
        return {path: ArrowGate(v, k, temperature, known) for path, v in prototypes.items()}
    rows = GateFile(gate_file(mole, part), pool, exclude)
    return rows.fill(new_gates(part.partition("_")[0], pool, rows.k, temperature, rows.known), mole.dtype)
