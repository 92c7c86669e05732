"""A model with its tokenizer, its pool and what is attached to it: found first, then loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import torch

from common.files import warn
from common.hub import find_folder
from common.template import RAW, choose_template
from common.tokenizer import Tokenizer
from pool.adapters import Adapter, linear_shapes, load_adapter, peft_folder
from pool.folder import PoolFolder, find_pool
from pool.load import load_base, load_pool
from pool.retriever import LlamaEncoder, Retriever, load_retriever
from pool.slots import Member, Pool, alloc_B_of

Ranking = list[tuple[str, float]]  # retrieved adapters with their scores, the best first


class PromptMask:
    """Which tokens of a batch are the prompt's: mask (b, t) bool, None while decoding."""

    def __init__(self, mask: torch.Tensor | None = None):
        self.mask = mask


@dataclass
class Mole:
    """A base with its tokenizer and a pool of adapters: what load() gives."""

    model: torch.nn.Module | None  # None until load_weights()
    tokenizer: Tokenizer
    shapes: dict  # linear_shapes of the base
    pool: Pool | None = None
    folder: PoolFolder | None = None  # where it came from
    template: str = RAW  # how prompts are wrapped: common/template.py
    template_from: str = "as asked"  # who says so
    base_path: Path | None = None  # the base's folder
    base_name: str = ""  # the base as it was named, a folder or a hub name
    attached: tuple | None = None  # what is attached: the setup, options, adapters
    gates: list = field(default_factory=list)  # the SampleGates of the attached Linears
    hooks: list = field(default_factory=list)  # handles of the hooks that their gates need
    prompt: PromptMask = field(default_factory=PromptMask)  # for methods that decide from the prompt
    custom_gates: dict = field(default_factory=dict)  # {method: a gate of yours or {module path: gate}}
    embed: object = None  # a text encoder of yours for retrieval, texts -> (n, d)
    retriever: Retriever | None = None  # made where it is first asked for
    logo_usual: tuple | None = None  # LoGo's scores for everyday prompts
    router_version: int = -1  # the pool's version that RAMoLE's routers know
    batch_id: int = 0  # how often set_methods was called: one batch at a time
    slots_in_use: dict = field(default_factory=dict)  # {adapter: (slot, hash)} of the batch
    force_count: int = 0  # how often force_adapters() was called
    lock: RLock = field(default_factory=RLock)  # held while a batch is set up, and in each step

    @property
    def eos_ids(self) -> set[int]:
        """What ends a text: the model's EOS ids, and the tokenizer's, with which adapters train."""
        return {*self.model.config.eos_token_ids, self.tokenizer.eos_id} - {None}

    def slots(self, names: list[str]) -> dict[str, tuple]:
        """{adapter: (slot, hash)} of those of `names` that are in the pool."""
        members = self.pool.members if self.pool else {}
        return {name: (members[name].slot, members[name].hash) for name in names if name in members}

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.model.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.model.embed_tokens.weight.device


def find_mole(model, pool=None, extra=(), template="") -> Mole:
    """All of a Mole that takes no time: load_weights() reads the rest. Until then its pool has the
    adapters' names alone.

    `model` is a folder or a hub name, `pool` a folder (default: the model's own, where it is one),
    `extra` [(name, PEFT folder)], `template` how prompts are wrapped ("" =
    choose_template() decides). Raises InputError for what isn't there.
    """
    path = find_folder(model, "model")
    folder = find_pool(path, pool, extra)
    tokenizer = Tokenizer(path)
    template, template_from = choose_template(template, folder and folder.template, tokenizer)
    listed = Pool({}, capacity=0, rank=0)
    for name, where in folder.adapters.items() if folder else ():
        listed.members[name] = Member(None, None, Adapter(name, {}, {}, {}, {}, folder=peft_folder(where)))
    found = Mole(None, tokenizer, {}, listed, folder, template, template_from)
    found.base_path = path
    found.base_name = str(model)
    return found


def load_weights(mole: Mole, dtype="auto", device="auto", resident=0, fast=True) -> Mole:
    """Reads the base and the adapters of a find_mole(), at most `resident` of them in memory, 0 =
    all. `fast` False: plain, without what fast/ installs. Raises InputError."""
    mole.model = load_base(mole.base_path, dtype, device, fast)
    mole.shapes = linear_shapes(mole.model)
    mole.pool = load_pool(mole.model, mole.base_name, mole.folder, resident)
    return mole


def add_adapter(mole: Mole, name: str, folder) -> None:
    """One more adapter for a running model, from a PEFT folder or the hub's ORG/NAME[@REVISION];
    requests under way go on as they were. Raises InputError."""
    adapter = load_adapter(find_folder(folder, "adapter"), name, mole.shapes)
    with mole.lock:
        if mole.pool is None:
            mole.pool = Pool.of([adapter], mole.shapes, mole.dtype, mole.device, alloc_B_of(mole.model))
        else:
            mole.pool.add(adapter)


# Retrieving ---------------------------------------------------------------------------------------


def retriever_of(mole: Mole) -> Retriever:
    """The pool's retriever, up to date with the pool: POOL/retriever.safetensors or, untrained, the
    base's own hidden states; your `mole.embed` instead of both. Raises InputError."""
    file = mole.folder.path / "retriever.safetensors" if mole.folder else None
    if mole.embed and (mole.retriever is None or mole.retriever.embed is not mole.embed):
        mole.retriever = Retriever(mole.embed)
    elif mole.retriever is None and file and file.exists():
        mole.retriever, _ = load_retriever(file, mole.model, mole.tokenizer)
    elif mole.retriever is None:
        warn("no retriever.safetensors beside the adapters: the base's hidden states as they are "
             "rank them; python train.py retriever makes it")  # fmt: skip
        mole.retriever = Retriever(LlamaEncoder(mole.model, mole.tokenizer))
    members = mole.pool.members.items()
    mole.retriever.keep({name: member.adapter.samples for name, member in members})
    return mole.retriever


def rank_by_text(mole: Mole, prompts: list[str], k: int, exclude=()) -> list[Ranking]:
    """For each prompt the `k` best adapters without those of `exclude`. Raises InputError."""
    return retriever_of(mole)(list(prompts), k, exclude)
