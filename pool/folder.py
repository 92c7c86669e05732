"""Pool folders: pool.json with adapters/, or just PEFT folders; checks of what lies beside them."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.fields import read_field
from common.files import InputError, read_json, write_json
from common.printable import printable, shown
from common.template import TEMPLATE, check_template
from model import Llama
from pool.adapters import adapter_folders


@dataclass
class PoolFolder:
    """A pool folder: what its pool.json says, or, without one, the PEFT folders in it."""

    path: Path
    adapters: dict[str, Path]
    fingerprint: str | None = None
    template: str | None = None  # None: nothing says how its adapters were trained


def is_pool(path: Path | str) -> bool:
    """Whether a folder is a pool: it holds a pool.json or PEFT folders."""
    path = Path(path)
    return (path / "pool.json").exists() or bool(adapter_folders(path))


def read_pool(path: Path | str) -> PoolFolder:
    """POOL/pool.json with the adapters that it lists; where it lists none, or there is no such file,
    the PEFT folders in POOL. Raises InputError if it has neither."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such pool folder")
    file = path / "pool.json"
    if not file.exists():
        folders = _plain_folders(path)
        if not folders:
            missing = "neither a pool.json nor PEFT adapter folders in it"
            raise InputError(f"{path}: not a pool: {missing}")
        return PoolFolder(path, folders)
    raw = read_json(file)
    names = read_field(file, raw, "adapters", [str], [])
    template = raw.get("template", TEMPLATE)
    if template is not None:
        check_template(template, f"{file}")
    if strange := [name for name in names if not is_folder_name(name)]:
        found = f"adapters holds {shown(strange[0])}"
        raise InputError(f"{file}: {found}, expected folder names under adapters/")
    check_twice(file, names)
    folders = {name: path / "adapters" / name for name in names}
    if raw.get("adapters") is None:
        folders = _plain_folders(path)
    return PoolFolder(path, folders, read_field(file, raw, "base", str, None), template)


def _plain_folders(path):
    """{adapter: its folder} of the PEFT folders in `path`."""
    folders = {folder.name: folder for folder in adapter_folders(path)}
    for name in folders:
        check_adapter_name(name, path)
    return folders


def is_folder_name(name: object) -> bool:
    """Whether an adapter of this name can have a folder: a name without slashes that no dot begins."""
    return _is_name(name) and re.fullmatch(r"[^/\\.][^/\\]*", name)


def _is_name(name):
    """Whether an adapter can have this name: a text of 1 to 255 characters, none hidden."""
    return isinstance(name, str) and name != "" and printable(name, 255) == name


def check_adapter_name(name: object, where: str | Path, what: str = "adapter") -> None:
    """Raises InputError, which begins with `where`, where a name is too long or holds hidden
    characters. `what` has the name: an adapter, or a task, as both have the same."""
    if not _is_name(name):
        expected = "1 to 255 characters, none hidden"
        raise InputError(f"{where}: {what} name is {shown(name)}, expected {expected}")


def check_twice(file: Path | str, names: list[str]) -> None:
    """Raises InputError where a file lists a name twice: one of the two would be lost unseen."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{file}: lists a name twice: {shown(min(twice))}")


def open_pool(path: Path | str, extra: Iterable[tuple[str, Path | str]] = ()) -> PoolFolder:
    """The pool `path` and the adapters of `extra`, [(name, PEFT folder)]; with some, the folder may be
    new. Raises InputError where it is no pool, and for a name that is there twice."""
    path = Path(path)
    extra = list(extra)
    is_new = bool(extra) and not is_pool(path) and (path.is_dir() or not path.exists())
    folder = PoolFolder(path, {}) if is_new else read_pool(path)
    for name, where in extra:
        check_adapter_name(name, where)
        if name in folder.adapters:
            raise InputError(f"adapter name {name!r} twice: {folder.adapters[name]} and {where}")
        folder.adapters[name] = Path(where)
    return folder


def find_pool(
    model: Path | str, pool: Path | str | None = None, extra: Iterable[tuple[str, Path | str]] = ()
) -> PoolFolder | None:
    """open_pool() of `pool`, by default of the model folder; None where that is no pool and there is
    nothing in `extra`."""
    extra = list(extra)
    return open_pool(pool or model, extra) if pool or extra or is_pool(model) else None


def write_pool(folder: PoolFolder) -> None:
    """Writes pool.json alone: the base, the template and, where they are in POOL/adapters, the
    adapters, which save_adapter has written before."""
    raw = {"base": folder.fingerprint, "template": folder.template}
    inside = folder.path / "adapters"
    listed = sorted(name for name, path in folder.adapters.items() if path == inside / name)
    if listed:
        raw = {"adapters": listed, **raw}
    write_json(folder.path / "pool.json", raw)


def check_base(file: Path | str, found: str, fingerprint: str, remedy: str) -> None:
    """Raises InputError where what a file holds is bound to another base than that of
    `fingerprint`; `found` is the fingerprint in the file, "" where it has none."""
    if found == fingerprint:
        return
    known = f"trained on base {found[:12]}, this one is {fingerprint[:12]}"
    if len(found) != len(fingerprint):
        known = "written before fingerprints of 128 bits, so that its base isn't known"
    raise InputError(f"{file}: {known}: {remedy}")


def check_pool_base(folder: PoolFolder, model: Llama) -> None:
    """Raises InputError where pool.json names another base than `model`."""
    if folder.fingerprint is None:
        return
    file = folder.path / "pool.json"
    fingerprint = model.fingerprint()
    remedy = "python train.py adapters trains adapters for this one; if these were trained on it, write "
    remedy += f'"base": "{fingerprint}" there'
    check_base(file, folder.fingerprint, fingerprint, remedy)
