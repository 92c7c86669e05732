"""Pool folders: pool.json, or a folder of PEFT folders without one."""

import re
from dataclasses import dataclass
from pathlib import Path

from common.files import (
    InputError,
    read_json,
    write_json,
)
from pool.adapters import TEMPLATE


@dataclass
class PoolFolder:
    """What pool.json says, or a folder of PEFT folders without one; adapters is {name: folder}."""

    path: Path
    adapters: dict
    fingerprint: str | None = None
    template: str = "{prompt}"


def is_pool(path):
    """Whether a folder is one: by its pool.json, or by PEFT folders in it."""
    path = Path(path)
    return (path / "pool.json").exists() or any(path.glob("*/adapter_config.json"))


def read_pool(path):
    """Reads POOL/pool.json, or takes a folder of PEFT folders for a pool. Raises InputError where
    it is neither."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such pool folder")
    file = path / "pool.json"
    if not file.exists():
        found = sorted(f.parent for f in path.glob("*/adapter_config.json"))
        if not found:
            raise InputError(f"{path}: not a pool: neither a pool.json nor PEFT adapter folders in it")
        return PoolFolder(path, {f.name: f for f in found})
    raw = read_json(file)
    names = raw.get("adapters")
    template = raw.get("template", TEMPLATE)
    if not isinstance(names, list) or not all(
        isinstance(n, str) and re.fullmatch(r"[^/\\.][^/\\]*", n) for n in names
    ):
        raise InputError(f"{file}: adapters is {names!r}, expected a list of folder names under adapters/")
    if len(set(names)) < len(names):
        raise InputError(
            f"{file}: adapters lists a name twice: {sorted(n for n in names if names.count(n) > 1)[0]}"
        )
    if not isinstance(template, str) or "{prompt}" not in template:
        raise InputError(f"{file}: template is {template!r}, expected a text that holds {{prompt}}")
    return PoolFolder(path, {n: path / "adapters" / n for n in names}, raw.get("base"), template)


def write_pool(folder):
    """Writes pool.json of a PoolFolder; the adapters themselves are saved before it by
    save_adapter."""
    raw = {"adapters": sorted(folder.adapters), "base": folder.fingerprint, "template": folder.template}
    write_json(folder.path / "pool.json", raw)


def check_pool(known, model, args, template):
    """Raises InputError where a pool's adapters were made for another base or with another template
    than this run's."""
    if known.fingerprint not in (None, model.fingerprint):
        raise InputError(
            f"{known.path / 'pool.json'}: made for another base than {args.model} (fingerprint differs)"
        )
    if known.adapters and known.template != template:
        raise InputError(
            f"{known.path / 'pool.json'}: template is {known.template!r}, this run's {template!r}"
        )
