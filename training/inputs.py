"""How trainers with a frozen base begin: the base, its tokenizer, the adapters of a pool, the data."""

import hashlib

import torch

from common.tokenizer import Tokenizer
from model import Llama
from pool.adapters import find_folder, linear_shapes
from pool.folder import PoolFolder, check_pool
from pool.load import load_base
from pool.slots import Pool, alloc_B_of
from tasks.folders import Example, Task


def load_frozen(args) -> tuple[Llama, Tokenizer]:
    """The base and its tokenizer; lowers --max_length to the base's context."""
    model = load_base(args.model, args.dtype, args.device)
    args.max_length = min(args.max_length, model.config.context)
    return model, Tokenizer(args.model)


def load_with_pool(
    args, known: PoolFolder, names: list[str], dtype: torch.dtype | None = None
) -> tuple[Llama, Tokenizer, Pool]:
    """The base, its tokenizer, and a pool of the adapters `names`, by default in the base's dtype.

    Raises InputError where the pool's adapters were trained on another base.
    """
    for name in names:
        find_folder(known.adapters[name])  # before the base is read
    model, tokenizer = load_frozen(args)
    check_pool(known, model, args, known.template)
    folders = {name: known.adapters[name] for name in names}
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
