"""How trainers with a frozen base begin: the base, its tokenizer, and the adapters of a pool."""

import torch

from common.tokenizer import Tokenizer
from model import Llama
from pool.adapters import linear_shapes
from pool.folder import PoolFolder, check_pool
from pool.load import load_base
from pool.slots import Pool, alloc_B_of


def load_frozen(args) -> tuple[Llama, Tokenizer]:
    """The base and its tokenizer; lowers --max_length to the base's context."""
    model = load_base(args.model, args.dtype, args.device)
    args.max_length = min(args.max_length, model.config.max_position_embeddings)
    return model, Tokenizer(args.model)


def load_with_pool(
    args, known: PoolFolder, names: list[str], dtype: torch.dtype | None = None
) -> tuple[Llama, Tokenizer, Pool]:
    """The base, its tokenizer, and a pool of the adapters `names`, by default in the base's dtype.

    Raises InputError where the pool's adapters were trained on another base.
    """
    model, tokenizer = load_frozen(args)
    check_pool(known, model, args, known.template)
    folders = {name: known.adapters[name] for name in names}
    like = model.head_weight
    shapes = linear_shapes(model)
    pool = Pool.load(folders, shapes, dtype or like.dtype, like.device, alloc_B=alloc_B_of(model))
    return model, tokenizer, pool


def bound_to(model: Llama, pool: Pool) -> list[str]:
    """What a run is bound to, for its Checkpoint: each adapter's name and hash, and the base."""
    adapters = [f"{name} {pool.members[name].hash}" for name in pool.names]
    return [*adapters, f"base {model.fingerprint}"]
