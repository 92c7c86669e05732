"""How trainers with a frozen base begin: the base, its tokenizer, the adapters of a pool, the data."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.files import InputError, say
from common.hub import find_folder
from common.template import TemplateOptions, asked_template, choose_template
from common.tokenizer import Tokenizer
from model import Llama
from pool.adapters import linear_shapes, peft_folder
from pool.folder import PoolFolder, check_pool_base, open_pool, write_pool
from pool.load import load_base, read_adapters
from pool.slots import Pool, alloc_B_of
from tasks.folders import Example, Task
from training.loop import required


@dataclass
class PoolOptions(TemplateOptions):
    """Options of the trainers that begin with a pool of adapters."""

    tasks: str = ""  # folder of task folders, or a file of {adapter, prompt, response} lines
    pool: str = ""  # pool with the adapters, or a folder of PEFT folders; gets what is trained
    adapter: list[str] = field(default_factory=list)  # NAME=DIR, a PEFT folder or hub name; repeatable


def named_pool(args: PoolOptions) -> PoolFolder:
    """The adapters of --pool and --adapter. Raises InputError."""
    return open_pool(required(args, "pool"), read_adapters(args.adapter))


def settle_template(known: PoolFolder, args, tokenizer: Tokenizer, default: str = "") -> None:
    """Sets known.template to the one that a run uses, and prints it. Raises InputError where the
    options ask for another than pool.json's, with which its adapters were trained."""
    asked = asked_template(args)
    if known.template and asked not in ("", known.template):
        file = known.path / "pool.json"
        raise InputError(f"{file}: template is {known.template!r}, this run's {asked!r}")
    known.template, source = choose_template(asked, known.template, tokenizer, default)
    say(f"template: {known.template!r} ({source})")


def keep_template(known: PoolFolder, model: Llama) -> None:
    """Writes a pool.json with the run's base and template, where the pool has none."""
    if not (known.path / "pool.json").exists():
        known.fingerprint = model.fingerprint()
        write_pool(known)


def load_frozen(args, known: PoolFolder, default: str = "") -> tuple[Llama, Tokenizer]:
    """The base and its tokenizer. Settles the template of the pool `known`, which is `default` where
    neither options nor pool.json name one, and lowers --max_length to the base's context. Raises
    InputError, also where the pool's adapters were trained on another base."""
    folder = find_folder(args.model, "model")
    tokenizer = Tokenizer(folder)
    settle_template(known, args, tokenizer, default)
    model = load_base(folder, args.dtype, args.device)
    check_pool_base(known, model)
    args.max_length = min(args.max_length, model.config.context)
    return model, tokenizer


def load_with_pool(
    args,
    known: PoolFolder,
    names: list[str],
    dtype: torch.dtype | None = None,
    more: dict[str, Path] | None = None,
) -> tuple[Llama, Tokenizer, Pool]:
    """The base, its tokenizer, and a pool of the adapters `names`, by default in the base's dtype.
    `more` {name: PEFT folder} are adapters from outside of the pool's folder.

    Raises InputError where the pool's adapters were trained on another base.
    """
    folders = {name: known.adapters[name] for name in names} | (more or {})
    for folder in folders.values():
        peft_folder(folder)  # before the base is read
    model, tokenizer = load_frozen(args, known)
    like = model.head_weight
    shapes = linear_shapes(model)
    pool = Pool.load(folders, shapes, dtype or like.dtype, like.device, alloc_B=alloc_B_of(model))
    return model, tokenizer, pool


def bound_to(model: Llama, pool: Pool) -> dict[str, str]:
    """{what: hash} that a run is bound to, for its Checkpoint: the base and each adapter."""
    adapters = {f"adapter {name}": pool.members[name].hash for name in pool.names}
    return {"base": model.fingerprint(), **adapters}


def data_of(tasks: dict[str, Task], examples: dict[str, list[Example]]) -> dict[str, str]:
    """{"data of TASK": hash} of the train splits, as they are and as `examples`, their tokens.

    So a resumed run notices another line as well as another template or tokenizer.
    """
    hashes = {}
    for name, task in tasks.items():
        digest = hashlib.sha256()
        for row in task.train:
            digest.update(repr((row["prompt"], row["response"])).encode())
        for example in examples[name]:
            digest.update(repr((example.n_prompt, example.ids)).encode())
        hashes[f"data of {name}"] = digest.hexdigest()
    return hashes
