"""A mixture as files that other programs load: one PEFT adapter, or the base with it merged in.

    sum_j w_j s_j B_j A_j = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

Concatenated along the rank, the adapters of a fixed mixture are one adapter, exactly; its rank is
the sum of theirs. A smaller rank is the best approximation of that rank in each Linear (truncated
SVD). A base of other weights W + B A needs no adapter at all, but rounds the sum to its own dtype.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.files import InputError, read_bytes, write_bytes, write_json
from common.tensors import cast_finite, write_safetensors
from model import Llama
from pool.adapters import Adapter
from pool.slots import Pool
from pool.stacks import common_base, factored_svd, unit_adapter

SHARD = 4 * 10**9  # bytes of tensors in a file, at most
# What a model folder holds besides its weights, config.json last: with it the folder is complete.
COPIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
COPIED += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")
COPIED += ("generation_config.json", "config.json")


def mixture_adapter(pool: Pool, weights: dict[str, float], name: str) -> Adapter:
    """sum_j w_j s_j B_j A_j of {adapter: w} as one Adapter of scale 1, in float32.

    A is what the adapters hold; w and s are multiplied in float64 and go into B with one rounding.
    A Linear has the summed rank of those adapters that adapt it. Raises InputError for an adapter
    that isn't in the pool.
    """
    A = {}
    B = {}
    for member, weight in weights.items():
        adapter = pool.adapter(member)
        for path, a in adapter.A.items():
            b = adapter.B[path].double() * (weight * adapter.scale[path])
            A.setdefault(path, []).append(a.float())
            B.setdefault(path, []).append(b.float())
    factors = {path: (torch.cat(A[path]), torch.cat(B[path], 1)) for path in A}
    return unit_adapter(name, factors, common_base(pool, weights))


def truncate(adapter: Adapter, r: int) -> tuple[Adapter, float, dict[str, float]]:
    """(The best Adapter of rank r or less in each Linear, the error of all Linears together, the
    error of each by its module path).

    An error is |D - D_r| / |D| in Frobenius norms, D = scale B A: sqrt(sum_{c > r} S_c^2 /
    sum_c S_c^2). D is never formed; singular values and errors are float64's.
    """
    factors = {}
    lost = {}
    whole = {}
    for path, a in adapter.A.items():
        U, S, Vh = factored_svd(a.double(), adapter.B[path].double() * adapter.scale[path])
        factors[path] = Vh[:r].float(), (U[:, :r] * S[:r]).float()
        lost[path] = float(S[r:].square().sum())
        whole[path] = float(S.square().sum())
    errors = {path: _relative(lost[path], whole[path]) for path in lost}
    base = adapter.config.get("base_model_name_or_path")
    shorter = unit_adapter(adapter.name, factors, base)
    return shorter, _relative(sum(lost.values()), sum(whole.values())), errors


def _relative(lost, whole):
    """sqrt(lost / whole), of zeros 0."""
    return (lost / whole) ** 0.5 if whole else 0.0


def cast_adapter(adapter: Adapter, dtype: torch.dtype, where: Path | str) -> Adapter:
    """A copy in `dtype`, without samples. Raises InputError where a value is not finite in it."""
    A = {}
    B = {}
    for path, a in adapter.A.items():
        A[path] = cast_finite(where, f"{path}.lora_A", a, dtype)
        B[path] = cast_finite(where, f"{path}.lora_B", adapter.B[path], dtype)
    return Adapter(adapter.name, A, B, adapter.scale, adapter.config)


# The base with a mixture in its weights -----------------------------------------------------------


def deltas_of(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yields (module path, scale B A (o, i) in float32), one Linear at a time."""
    for path, a in adapter.A.items():
        yield path, (adapter.B[path].float() * adapter.scale[path]) @ a.float()


def merge_into_base(model: Llama, deltas: Iterable[tuple[str, Tensor]], where: Path | str) -> None:
    """W + delta in place for each (module path, delta (o, i)), added in float32 and rounded once to
    the base's dtype. Nothing may be attached. Raises InputError where a weight overflows."""
    with torch.no_grad():
        for path, delta in deltas:
            W = model.get_submodule(path).weight
            W.copy_(cast_finite(where, f"{path}.weight", W.float() + delta.to(W.device), W.dtype))


def write_model(model: Llama, base: Path | str, folder: Path | str, shard: int = SHARD) -> None:
    """Writes a Hugging Face model folder: the model's weights in shards of at most `shard` bytes (a
    larger tensor has one to itself), the other files as they are in the folder `base`."""
    base = Path(base)
    folder = Path(folder)
    tensors = model.state_dict()  # a tied head is in it once, as the embedding
    shards = split_shards(tensors, shard)
    stored_in = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        stored_in |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": stored_in}
        write_json(folder / "model.safetensors.index.json", index)
    for name in COPIED:
        if (base / name).exists():
            write_bytes(folder / name, read_bytes(base / name))


def split_shards(tensors: dict[str, Tensor], shard: int) -> list[list[str]]:
    """The names of `tensors` in their order, cut where a file would exceed `shard` bytes."""
    shards = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def check_new_folder(folder: Path | str) -> None:
    """Raises InputError where `folder` is a file, or holds something."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--export {folder}: is a file, expected a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--export {folder}: is not empty, expected a new folder")
