"""Pool folders: pool.json, or a folder of PEFT folders without one."""

import re
from dataclasses import dataclass
from pathlib import Path

from common.files import InputError, read_json, write_json
from model import Llama
from pool.adapters import TEMPLATE, adapter_folders


@dataclass
class PoolFolder:
    """A pool folder: what its pool.json says, or, without one, the PEFT folders in it."""

    path: Path
    adapters: dict[str, Path]
    fingerprint: str | None = None
    template: str = "{prompt}"


def is_pool(path: Path | str) -> bool:
    """Whether a folder is a pool: it holds a pool.json or PEFT folders."""
    path = Path(path)
    return (path / "pool.json").exists() or bool(adapter_folders(path))


def read_pool(path: Path | str) -> PoolFolder:
    """Reads POOL/pool.json, or lists POOL's PEFT folders. Raises InputError if it has neither."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such pool folder")
    file = path / "pool.json"
    if not file.exists():
        folders = adapter_folders(path)
        if not folders:
            missing = "neither a pool.json nor PEFT adapter folders in it"
            raise InputError(f"{path}: not a pool: {missing}")
        return PoolFolder(path, {folder.name: folder for folder in folders})
    raw = read_json(file)
    names = raw.get("adapters")
    template = raw.get("template", TEMPLATE)
    if not isinstance(names, list) or not all(map(_is_folder_name, names)):
        expected = "expected a list of folder names under adapters/"
        raise InputError(f"{file}: adapters is {names!r}, {expected}")
    if len(set(names)) < len(names):
        twice = min(name for name in names if names.count(name) > 1)
        raise InputError(f"{file}: adapters lists a name twice: {twice}")
    if not isinstance(template, str) or "{prompt}" not in template:
        raise InputError(f"{file}: template is {template!r}, expected a text that holds {{prompt}}")
    folders = {name: path / "adapters" / name for name in names}
    return PoolFolder(path, folders, raw.get("base"), template)


def _is_folder_name(name):
    return isinstance(name, str) and re.fullmatch(r"[^/\\.][^/\\]*", name)


def write_pool(folder: PoolFolder) -> None:
    """Writes pool.json alone; save_adapter has written the adapters before."""
    raw = {
        "adapters": sorted(folder.adapters),
        "base": folder.fingerprint,
        "template": folder.template,
    }
    write_json(folder.path / "pool.json", raw)


def check_pool(folder: PoolFolder, model: Llama, args, template: str) -> None:
    """Raises InputError where a pool's adapters were trained on another base or with another template."""
    file = folder.path / "pool.json"
    if folder.fingerprint not in (None, model.fingerprint):
        raise InputError(f"{file}: trained on another base than {args.model} (fingerprint differs)")
    if folder.adapters and folder.template != template:
        raise InputError(f"{file}: template is {folder.template!r}, this run's {template!r}")
