"""Loads a Llama to be used: fast where fast/ is there, with the adapters of its pool; compiles it
where that pays."""

from pathlib import Path

from common.devices import DTYPES, find_device
from common.files import InputError, warn
from model import load_llama
from pool.adapters import linear_shapes
from pool.folder import is_pool, read_pool
from pool.slots import Pool, alloc_B_of

TINY = Path(__file__).resolve().parent.parent / "tiny"  # the embedded model


def load_base(folder, dtype="auto", device="auto", fast=True):
    """A model folder -> Llama, in a dtype (auto: the file's) and on a device (auto: cuda where
    there is one), made fast unless told not to. Raises InputError for bad input."""
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    model = load_llama(folder, DTYPES.get(dtype), find_device(device))
    return make_fast(model) if fast else model


def make_fast(model):
    """The Llama itself, made fast by fast/. With that folder deleted all runs, slower."""
    try:
        import fast
    except ModuleNotFoundError as error:
        if error.name != "fast":
            raise
        return model
    return fast.install(model)


def compile_blocks(model, asked, saves, costs):
    """Has the model run compiled blocks from now on where that is `asked` for (False: no longer)
    or, `asked` None, where it `saves` more seconds than the compiler `costs`."""
    on = saves > costs if asked is None else asked
    if not hasattr(model, "compile_blocks"):
        if asked:
            warn("--compile needs fast/, which is not here: going on without")
    elif on or asked is False:
        model.compile_blocks(on)


def load_pool(model, name, folder=None, extra=(), resident=0):
    """The adapters for a Llama -> (PoolFolder or None, Pool or None): those of the pool `folder`,
    by default the model folder `name` itself where it is one, and extra [(name, PEFT folder)]; at
    most `resident` of them in memory, 0 = all. Raises InputError."""
    known = read_pool(folder or name) if folder or is_pool(name) else None
    if known and known.fingerprint not in (None, model.fingerprint):
        warn(f"{known.path}: its adapters were trained on another base than {name} (fingerprint differs)")
    folders = dict(known.adapters) if known else {}
    for adapter, path in extra:
        if adapter in folders:
            raise InputError(f"adapter name {adapter!r} twice: {folders[adapter]} and {path}")
        folders[adapter] = Path(path)
    if not folders:
        return known, None
    like = model.head_weight
    pool = Pool.load(folders, linear_shapes(model), like.dtype, like.device, resident, alloc_B_of(model))
    _check_base_names([member.adapter for member in pool.members.values()], name)
    return known, pool


def _check_base_names(adapters, model):
    """The commonest mistake: an adapter for another base. Its config names the one it was trained
    with."""
    strangers = {}
    for adapter in adapters:
        named = adapter.config.get("base_model_name_or_path")
        if named and Path(named).name.lower() != Path(model).resolve().name.lower():
            strangers.setdefault(named, []).append(adapter.name)
    for named, names in strangers.items():
        warn(f"made for base {named!r}, not {str(model)!r}: adapter {', '.join(names)}")


def read_adapters(pairs):
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
