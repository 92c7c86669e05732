"""Whether an adapter fits a base: its modules and their features, and the modules its config names."""

import re
from collections.abc import Set
from pathlib import Path

import torch

from common.files import InputError
from common.options import nearest

Tensors = dict[str, torch.Tensor]  # {module path: A or B}
Shapes = dict[str, tuple[int, int]]  # {module path: (o, i)} of the base


def compile_pattern(pattern: str, file: Path, field_name: str) -> None:
    """Raises InputError where a config's regular expression is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{file}: {field_name}: bad pattern {pattern!r}: {error}") from None


def check_shapes(A: Tensors, B: Tensors, file: Path, shapes: Shapes) -> None:
    """Raises InputError unless the base has every adapted module, with the same features."""
    unknown = [path for path in A if path not in shapes]
    if unknown:
        layers = 1 + max(map(_layer, shapes), default=-1)
        deepest = max(map(_layer, unknown))
        if deepest >= layers:
            found = f"it adapts layer {deepest}, this one has {layers} layers"
            raise InputError(f"{file}: trained on a deeper base: {found}")
        raise InputError(
            f"{file}: {len(unknown)} of {len(A)} adapted modules are not Linears of this "
            f"base's blocks, first {unknown[0]}{nearest(unknown[0], shapes)}"
        )
    for path, a in A.items():
        o = len(B[path])
        i = a.shape[1]
        if (o, i) != shapes[path]:
            base_o, base_i = shapes[path]
            maps = f"{path} maps {i} -> {o}, this base's {base_i} -> {base_o}"
            raise InputError(f"{file}: {maps} features")


def _layer(path):
    """The number of the layer that a module path names, -1 where it names none."""
    match = re.search(r"layers\.(\d+)\.", path)
    return int(match[1]) if match else -1


def check_targets(config: dict, adapted: Set[str], file: Path, shapes: Shapes) -> None:
    """Raises InputError unless the modules that the config names are those that have tensors."""
    targets = config.get("target_modules")
    excluded = config.get("exclude_modules")
    if targets is None:
        raise InputError(f"{file}: target_modules is missing")

    def matches(names, path):
        if isinstance(names, str):
            return names.lower() == "all-linear" or re.fullmatch(names, path)
        return any(path == name or path.endswith(f".{name}") for name in names or ())

    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    pattern = config.get("layers_pattern") or r"[^.]*"
    pattern = pattern if isinstance(pattern, str) else "|".join(pattern)
    compile_pattern(pattern, file, "layers_pattern")
    named = set()
    for path in shapes:
        if not matches(targets, path) or (excluded and matches(excluded, path)):
            continue
        layer = re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.", path) if layers else None
        if not layers or (layer and int(layer[1]) in layers):
            named.add(path)
    problems = {
        "named by target_modules have no tensors": named - adapted,
        "not named by target_modules have tensors": adapted - named,
    }
    for problem, paths in problems.items():
        if paths:
            raise InputError(f"{file}: {len(paths)} modules {problem}, first {min(paths)}")
