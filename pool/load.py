"""Loads a Llama with the adapters of its pool, makes it fast where fast/ is there, and compiles it
where that pays."""

from collections.abc import Iterable
from pathlib import Path

from common.devices import DTYPES, find_device
from common.files import InputError, warn
from model import Llama, load_llama
from pool.adapters import find_folder, linear_shapes
from pool.folder import PoolFolder, check_pool_base, is_pool, read_pool
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


def find_adapters(
    name: Path | str, folder: Path | str | None = None, extra: Iterable[tuple[str, Path | str]] = ()
) -> tuple[PoolFolder | None, dict[str, Path]]:
    """(The pool `folder`, {adapter: PEFT folder} of its adapters and those of `extra`).

    Without `folder` the model folder `name` is the pool, where it is one. Reads no weights, so that
    a wrong name is refused at once. Raises InputError.
    """
    pool_folder = read_pool(folder or name) if folder or is_pool(name) else None
    folders = dict(pool_folder.adapters) if pool_folder else {}
    for adapter, path in extra:
        if adapter in folders:
            raise InputError(f"adapter name {adapter!r} twice: {folders[adapter]} and {path}")
        folders[adapter] = Path(path)
    for path in folders.values():
        find_folder(path)
    return pool_folder, folders


def load_pool(
    model: Llama,
    name: Path | str,
    pool_folder: PoolFolder | None,
    folders: dict[str, Path],
    resident: int = 0,
) -> Pool | None:
    """Loads what find_adapters() found into the pool of a `model` called `name`, at most `resident`
    adapters in memory at a time, 0: all. None where there are no adapters. Raises InputError."""
    if pool_folder:
        try:
            check_pool_base(pool_folder, model)
        except InputError as error:
            warn(str(error))
    if not folders:
        return None
    like = model.head_weight
    shapes = linear_shapes(model)
    pool = Pool.load(folders, shapes, like.dtype, like.device, resident, alloc_B_of(model))
    _check_base_names(pool, name)
    return pool


def _check_base_names(pool, model):
    """Warns of the commonest mistake: an adapter whose config names another base than `model`."""
    strangers = {}
    for name, member in pool.members.items():
        named = member.adapter.config.get("base_model_name_or_path")
        if named and Path(named).name.lower() != Path(model).resolve().name.lower():
            strangers.setdefault(named, []).append(name)
    for named, names in strangers.items():
        warn(f"trained on base {named!r}, not {str(model)!r}: adapter {', '.join(names)}")


def read_adapters(pairs: Iterable[str]) -> list[tuple[str, str]]:
    """["NAME=DIR", ...] -> [(name, folder), ...]. Raises InputError."""
    named = []
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--adapter is {pair!r}, expected NAME=DIR")
        if name in dict(named):
            raise InputError(f"adapter name {name!r} twice: {dict(named)[name]} and {folder}")
        named.append((name, folder))
    return named
