"""What a method of choosing adapters is. A method is a file of this folder and a line in its table
(__init__.py).

A method says, for a request, which adapters its tokens use and how much. There are four ways, each
a class to derive from:

    FixedMixture   {adapter: weight}, the same for all tokens of the request
    Gated          a gate in each Linear chooses for each token (moe_lora.py: the protocol of gates)
    Merged         one adapter derived from others, which all tokens use with weight 1
    OwnLinears     Linears of its own: an edited copy of W, or one that merges anew for each request

An object is a method as somebody named it, with what the name says (adapter:NAME, meteora_top2).
Requests of different methods share a batch where these attach the same to the model: fixed mixtures
beside one kind of gate.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import InputError
from methods.session import Mole, Ranking, rank_by_text
from moe_lora import attach
from pool.adapters import Adapter
from pool.folder import PoolFolder
from pool.gate_files import GateFile
from pool.slots import Pool
from training.gates import GatesRun, GatesTraining


class Method:
    """A way to choose adapters; the attributes of its class describe it."""

    pattern = ""  # what its names look like; groups go to __init__
    names = ()  # as help and docs list them
    about = ""  # one line
    paper = ""  # arXiv number, where there is one; several with commas
    made_by = ""  # the command that makes its files
    decides = ""  # for what it chooses anew: "per request", "per token and Linear", ...

    needs_adapters = True  # without a pool it is an error
    retrieves = ""  # how it ranks adapters for each prompt: "by text", "by a forward pass", "at random"
    per_task = ""  # if the method has a name for each task: that name, with {} for the task
    is_ceiling = False  # each task with its own adapter, whatever is hidden from others
    has_task_adapter = False  # uses one task's adapter, or one that has learnt all tasks
    trained_on_pool = False  # knows the adapters that it was trained with, and no others
    gates_know_tasks = False  # its gates were trained with each task's own adapter as their label
    has_temperature = False  # its choice depends on the gate temperature
    answers_composites = True  # False: knows one task at a time
    follows_the_pool = False  # adapters may come and go without attaching it anew

    def __init__(self, name: str, top_k=2, *groups: str):
        """`top_k`: how many adapters a token uses, where the name leaves it open."""
        self.name = name
        self.top_k = top_k

    @classmethod
    def parse(cls, name: str, top_k=2) -> "Method | None":
        """The method, where `name` is one of its names, else None."""
        match = re.fullmatch(cls.pattern, name)
        return cls(name, top_k, *match.groups()) if match else None

    @property
    def key(self) -> tuple:
        """What it attaches to the model: methods with an equal key share a batch."""
        name = type(self).__name__
        raise AttributeError(f"{name} has no key: derive from FixedMixture, Gated, Merged or OwnLinears")

    def check(self, mole: Mole) -> None:
        """Raises InputError where the pool lacks a part that the method needs, naming the command
        that makes it. The adapters need not be loaded."""

    def check_adapters(self, mole: Mole) -> None:
        """Raises InputError where a part was made with other adapters; for those that are read anew
        by each request."""

    def retrieve(self, mole: Mole, prompts: list[str], ids, k: int, exclude: tuple) -> list[Ranking]:
        """A ranking of adapters for each prompt, whose token ids are `ids`; empty where the method
        retrieves nothing."""
        return [[] for _ in prompts]

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """Names of the adapters that have to be in slots for a request: those it retrieved."""
        return [name for name, _ in found]

    def weights(self, mole: Mole, found: Ranking, exclude: tuple) -> dict[str, float]:
        """{adapter: weight} of a request, empty where its mixture isn't fixed."""
        return {}

    def check_exclude(self, exclude: tuple) -> None:
        """Raises InputError where a request can't do without the adapters of `exclude`."""

    @classmethod
    def default(cls, mole: Mole, k: int, k_asked: bool) -> tuple[str, str] | None:
        """(name, why) where this method should run unasked, else None; `k_asked`: with this k alone."""
        return None

    def prepare(self, mole: Mole, requests: list[tuple]) -> None:
        """Called once a batch is attached: requests [(method, what it retrieved)] of all rows."""

    def need(self, path: Path | None, command: str) -> None:
        """Raises InputError unless the part `path` exists."""
        if not (path and path.exists()):
            found = path or "a pool folder with its parts"
            raise InputError(f"method {self.name}: needs {found}: python {command} makes it")


POOL = ("pool", None)  # what fixed mixtures attach: the pool, and one SampleGate for all Linears


class FixedMixture(Method):
    """weights() says how much each adapter weighs, for all tokens of a request."""

    decides = "fixed"
    key = POOL
    follows_the_pool = True


class Gated(Method):
    """gates() makes a gate for each Linear of the pool that they choose from."""

    decides = "per token and Linear"
    has_temperature = True

    @property
    def key(self) -> tuple:
        """The name identifies its gates."""
        return ("pool", self.name)

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """All adapters that the gates choose among."""
        return all_but(mole.pool, exclude)

    def pool_of(self, mole: Mole) -> Pool:
        """The pool that the gates choose from: mole.pool, or one computed from it."""
        return mole.pool

    def gates(self, mole: Mole, pool: Pool, temperature: float, exclude: tuple) -> dict[str, nn.Module]:
        """{module path: gate} for `pool`, which is that of pool_of(). The gates choose neither empty slots
        nor the adapters named in `exclude`: see member_mask()."""
        raise AttributeError(f"{type(self).__name__} has no gates()")

    @staticmethod
    def hooks(model, gates: dict[str, nn.Module]) -> list:
        """Adds the hooks on other modules of the model that attached gates need -> their handles."""
        return []


class ByText(Method):
    """Retrieves adapters for a prompt by its text."""

    made_by = "train.py retriever"
    decides = "per request"
    retrieves = "by text"

    def retrieve(self, mole: Mole, prompts: list[str], ids, k: int, exclude: tuple) -> list[Ranking]:
        """The k best of the pool's retriever."""
        return rank_by_text(mole, prompts, k, exclude)


class Trained(Method):
    """A method with a file POOL/gates/NAME.safetensors, from `train.py gates --kind KIND`."""

    kind = ""  # as --kind names it
    uses_top_k = False  # --top_k says how many adapters a token uses; else it uses all
    Run = GatesRun  # its options
    Training = GatesTraining  # its loss
    trains_adapters = False  # goes with --adapters_too
    trained_on_pool = True

    def check(self, mole: Mole) -> None:
        """The file has to be there."""
        self.need(self.file(mole), self.made_by)

    @property
    def file_name(self) -> str:
        """NAME."""
        return self.name

    def file(self, mole: Mole) -> Path | None:
        """POOL/gates/NAME.safetensors, None without a pool folder."""
        return mole.folder.path / "gates" / f"{self.file_name}.safetensors" if mole.folder else None

    @classmethod
    def run_name(cls, args) -> str:
        """What a run's gate file is called."""
        return cls.kind

    @classmethod
    def run_folder(cls, args) -> str:
        """What the run's own folder is called."""
        return f"gates_{cls.run_name(args)}"

    @classmethod
    def check_run(cls, args, names: list[str]) -> None:
        """Raises InputError for options that don't go with this kind; `names` are the adapters."""
        if args.adapters_too and not cls.trains_adapters:
            raise InputError(f"--kind {cls.kind} trains no adapters: leave out --adapters_too")
        if cls.uses_top_k and not 1 <= args.top_k <= len(names):
            expected = f"1 to {len(names)}, the adapters of {args.pool}"
            raise InputError(f"--top_k is {args.top_k}, expected {expected}")

    @classmethod
    def more_adapters(cls, known: PoolFolder, args) -> dict[str, Path]:
        """{name: PEFT folder} of adapters of no task, which join those of the pool `known`."""
        return {}

    @classmethod
    def kept(cls, args) -> dict[str, str]:
        """{key: text} of the file's metadata besides names, hashes, k and base (GateFile.metadata)."""
        return {}

    @classmethod
    def fit(cls, model, pool: Pool, examples: list, args) -> dict[str, nn.Module] | None:
        """{module path: gate} without gradient steps, where the options ask for that, else None."""
        return None

    @classmethod
    def training(cls, model, pool: Pool, args) -> GatesTraining:
        """Attaches new gates and returns what trains them."""
        raise AttributeError(f"{cls.__name__} has no training()")


class TrainedGates(Trained, Gated):
    """A kind of gate, trained."""

    @staticmethod
    def new_gates(pool: Pool, k: int, temperature=1.0, known=None) -> dict[str, nn.Module]:
        """{module path: untrained gate}; `known` (e,) bool marks the slots that may be chosen."""
        raise AttributeError("a kind of trained gates has new_gates()")

    @classmethod
    def start_gates(cls, pool: Pool, args) -> dict[str, nn.Module]:
        """{module path: gate} that training starts with."""
        return cls.new_gates(pool, args.top_k, args.gate_temperature)

    @property
    def key(self) -> tuple:
        """The file's name identifies its gates."""
        return (POOL[0], self.file_name)

    def gates(self, mole: Mole, pool: Pool, temperature: float, exclude: tuple) -> dict[str, nn.Module]:
        """The file's gates: each adapter's row is copied to its slot in the pool."""
        rows = GateFile(self.file(mole), pool, mole.model.fingerprint(), exclude, self.made_by)
        return rows.fill(self.gates_of(rows, pool, temperature), mole.dtype)

    @classmethod
    def gates_of(cls, rows: GateFile, pool: Pool, temperature: float) -> dict[str, nn.Module]:
        """{module path: new gate}, into which the file's rows are then copied."""
        return cls.new_gates(pool, rows.k, temperature, rows.known)

    @classmethod
    def training(cls, model, pool: Pool, args) -> GatesTraining:
        """Attaches new gates and returns what trains them."""
        gates = cls.start_gates(pool, args)
        attach(model, pool, gates)
        cls.hooks(model, gates)
        return cls.Training(model, pool, gates, args)


class TopKGates(TrainedGates):
    """A kind of trained gate named KIND_topK, or KIND where --top_k says k."""

    uses_top_k = True

    def __init__(self, name: str, top_k: int, k: str | None):
        super().__init__(name, int(k or top_k))

    @property
    def file_name(self) -> str:
        """KIND_topK."""
        return f"{self.kind}_top{self.top_k}"

    @property
    def made_by(self) -> str:
        """The command for this k."""
        return f"train.py gates --kind {self.kind} --top_k {self.top_k}"

    @classmethod
    def run_name(cls, args) -> str:
        """KIND_topK."""
        return f"{cls.kind}_top{args.top_k}"


class Merged(Method):
    """merge() makes one adapter, which the request's tokens use with weight 1."""

    decides = "merged once"
    key = ("derived", None)

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """Those retrieved, else all but those of `exclude`."""
        return [name for name, _ in found] or all_but(mole.pool, exclude)

    def label(self, found: Ranking) -> str:
        """What the derived adapter is called: each set of retrieved ones has its own."""
        names = sorted(name for name, _ in found)
        return f"{self.name} of {', '.join(names)}" if names else self.name

    def merge(self, mole: Mole, found: Ranking, exclude: tuple) -> Adapter:
        """The Adapter."""
        raise AttributeError(f"{type(self).__name__} has no merge()")

    def weights(self, mole: Mole, found: Ranking, exclude: tuple) -> dict[str, float]:
        """The derived adapter, at weight 1."""
        return {self.label(found): 1.0}


class OwnLinears(Method):
    """attach() puts Linears of its own into the model; such a method has the batch to itself."""

    decides = "merged once"
    edits_W = False  # they are plain Linears of weight W + deltas(), whatever the prompt

    @property
    def key(self) -> tuple:
        """The name identifies its Linears."""
        return (self.name, None)

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """All but those of `exclude`."""
        return all_but(mole.pool, exclude)

    def attach(self, mole: Mole, backend: str, exclude: tuple) -> None:
        """Puts its Linears into the model; detach() takes them out."""
        raise AttributeError(f"{type(self).__name__} has no attach()")

    def deltas(self, mole: Mole, exclude: tuple) -> dict[str, Tensor]:
        """{module path: what is added to W (o, i)}, of a method that edits W."""
        raise AttributeError(f"{type(self).__name__} has no deltas()")


def all_but(pool: Pool, exclude: tuple) -> list[str]:
    """Names of the pool's adapters without those of `exclude`."""
    return [name for name in pool.names if name not in exclude]


def member_mask(pool: Pool, device=None, exclude=()) -> Tensor:
    """(capacity,) bool: the slots in use, but for the adapters of `exclude`."""
    mask = torch.zeros(pool.capacity, dtype=torch.bool, device=device)
    for name in pool.resident:
        mask[pool.slot(name)] = name not in exclude
    return mask
