"""Loads a Llama with the adapters of its pool, makes it fast where fast/ is there, and compiles it
where that pays."""

from collections.abc import Iterable
from pathlib import Path

import torch

from common.devices import DTYPES, find_device
from common.files import InputError, warn
from common.hub import base_name, find_folder
from model import Llama, load_llama
from pool.adapters import linear_shapes
from pool.folder import PoolFolder, check_adapter_name, check_pool_base
from pool.slots import Pool, alloc_B_of

TINY = Path(__file__).resolve().parent.parent / "tiny"  # the embedded model


def load_base(folder: Path | str, dtype: str = "auto", device: str = "auto", fast: bool = True) -> Llama:
    """A model folder -> Llama. dtype auto is the file's, device auto is cuda where there is one.
    Raises InputError for bad input."""
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    model = load_llama(folder, DTYPES.get(dtype), find_device(device))
    return make_fast(model) if fast else model


def make_fast(model: Llama) -> Llama:
    """Installs fast/ in a Llama and returns it; where that folder is deleted, changes nothing."""
    try:
        import fast
    except ModuleNotFoundError as error:
        if error.name != "fast":
            raise
        return model
    return fast.install(model)


def compile_blocks(model: Llama, asked: bool | None, saves: float, costs: float) -> None:
    """Switches compiled blocks on or off as `asked`. Where `asked` is None, they are switched on if
    that `saves` more seconds than the compiler `costs`."""
    on = saves > costs if asked is None else asked
    if not hasattr(model, "compile_blocks"):
        if asked:
            warn("--compile needs fast/, which is not here: going on without")
    elif on or asked is False:
        model.compile_blocks(on)


def load_pool(
    model: Llama,
    name: Path | str,
    folder: PoolFolder | None,
    resident: int = 0,
    dtype: torch.dtype | None = None,
) -> Pool | None:
    """Loads the adapters of `folder` for the base, which was loaded from `name`; None where there
    are none. At most `resident` of them are in memory at a time, 0: all. Their dtype is by default
    the base's. Warns of adapters that were trained on another base. Raises InputError.
    """
    if folder is None or not folder.adapters:
        return None
    try:
        check_pool_base(folder, model)
    except InputError as error:
        warn(str(error))
    like = model.head_weight
    shapes = linear_shapes(model)
    dtype = dtype or like.dtype
    pool = Pool.load(folder.adapters, shapes, dtype, like.device, resident, alloc_B_of(model))
    _check_base_names(pool, name)
    return pool


def _check_base_names(pool, model):
    """Warns of the commonest mistake: an adapter whose config names another base than `model`."""
    strangers = {}
    for name, member in pool.members.items():
        named = member.adapter.config.get("base_model_name_or_path")
        if named and Path(named).name.lower() != Path(base_name(model)).name.lower():
            strangers.setdefault(named, []).append(name)
    for named, names in strangers.items():
        warn(f"trained on base {named!r}, not {str(model)!r}: adapter {', '.join(names)}")


def read_adapters(pairs: Iterable[str]) -> list[tuple[str, Path]]:
    """["NAME=DIR", ...] -> [(name, folder), ...]; DIR may be a name on the hub. Raises InputError."""
    named = []
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--adapter is {pair!r}, expected NAME=DIR")
        check_adapter_name(name, "--adapter")
        if name in dict(named):
            raise InputError(f"adapter name {name!r} twice: {dict(named)[name]} and {folder}")
        named.append((name, folder))
    return [(name, find_folder(folder, "adapter")) for name, folder in named]
