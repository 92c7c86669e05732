"""Whether an adapter fits a base: its modules and their features, and the modules its config names."""

import re
from collections.abc import Iterable, Set
from pathlib import Path

import torch

from common.files import InputError
from common.options import nearest
from common.patterns import match_patterns

Tensors = dict[str, torch.Tensor]  # {module path: A or B}
Shapes = dict[str, tuple[int, int]]  # {module path: (o, i)} of the base


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


def by_pattern(config: dict, name: str, default: float, paths: Iterable[str], file: Path) -> dict[str, float]:
    """{path: number}: rank_pattern's or alpha_pattern's value for the first key that matches."""
    paths = list(paths)
    pattern = config.get(name) or {}
    numbers = dict.fromkeys(paths, default)
    found = match_patterns(list(pattern), "key", paths, f"{file}: {name}")
    for value, matches in reversed([*zip(pattern.values(), found, strict=True)]):
        numbers.update({path: value for path, match in zip(paths, matches, strict=True) if match})
    return numbers


def _named_by(config, name, paths, file):
    """Those of `paths` that target_modules or exclude_modules names."""
    names = config.get(name) or []
    if name == "target_modules" and isinstance(names, str) and names.lower() == "all-linear":
        return set(paths)
    if isinstance(names, str):
        [matches] = match_patterns([names], "target", paths, f"{file}: {name}")
        return {path for path, match in zip(paths, matches, strict=True) if match}
    ends = tuple(f".{end}" for end in names)
    return {path for path in paths if f".{path}".endswith(ends)}


def _layers_by_pattern(config, paths, file):
    """{path: the number of its layer}, by the first layers_pattern that matches it."""
    patterns = config.get("layers_pattern") or "[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    layers = {}
    for matches in match_patterns(patterns, "layers", paths, f"{file}: layers_pattern"):
        for path, match in zip(paths, matches, strict=True):
            if match:
                layers.setdefault(path, _layer(match))  # a Llama's path holds one number
    return layers


def check_targets(config: dict, adapted: Set[str], file: Path, shapes: Shapes) -> None:
    """Raises InputError unless the modules that the config names are those that have tensors."""
    if config.get("target_modules") is None:
        raise InputError(f"{file}: target_modules is missing")
    paths = list(shapes)
    named = _named_by(config, "target_modules", paths, file)
    named -= _named_by(config, "exclude_modules", paths, file)
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers:
        layer_of = _layers_by_pattern(config, paths, file)
        targets = config["target_modules"]
        whole = targets if isinstance(targets, list) else []  # as in PEFT, a whole path needs no layer
        named = {path for path in named if path in whole or layer_of.get(path) in layers}
    problems = {
        "named by target_modules have no tensors": named - adapted,
        "not named by target_modules have tensors": adapted - named,
    }
    for problem, paths in problems.items():
        if paths:
            raise InputError(f"{file}: {len(paths)} modules {problem}, first {min(paths)}")
