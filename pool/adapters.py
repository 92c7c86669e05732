"""One LoRA adapter, and PEFT folders in and out.

An adapter is B A per adapted Linear, added as scale * B A x. It is loaded from its tensors; the
config gives the scales and is cross-checked, and every key is accounted for both ways: an adapter
that loads and silently does nothing is what this module makes impossible. What it can't represent
exactly (DoRA, biases, whole replaced modules, ...) it refuses by name.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from common.files import (
    InputError,
    hash_tensors,
    read_header,
    read_json,
    read_jsonl,
    read_safetensors,
    warn,
    write_json,
    write_jsonl,
    write_safetensors,
)
from common.options import nearest

TEMPLATE = "[INST] {prompt} [/INST]\n"  # MeteoRA's
PREFIX = "base_model.model."

# LoraConfig fields that change the mathematics where they are set: field -> what the refusal says.
REFUSED = {
    "fan_in_fan_out": "weights stored transposed (GPT-2's Conv1D)",
    "lora_bias": "bias tensors",
    "modules_to_save": "whole replaced modules, which cannot be gated",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "layer_replication": "replicated layers",
    "target_parameters": "adapted bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "velora_config": "VeLoRA",
    "arrow_config": "PEFT's Arrow router",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "lora_ga_config": "LoRA-GA, which changed the base itself: convert the adapter to plain LoRA first",
}
CHANGED_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # init_lora_weights that start from another base
HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *(
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "use_rslora",
    ),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}


@dataclass
class Adapter:
    """A[path] (r, i), B[path] (o, r), scale[path] for every adapted Linear; path is its module path
    in model.py."""

    name: str
    A: dict
    B: dict
    scale: dict
    config: dict
    samples: list = field(default_factory=list)  # prompts of its training data, for retrieval
    folder: Path | None = None

    def tensors(self):
        """{PEFT key: tensor}."""
        keys = {f"{PREFIX}{path}.lora_A.weight": a for path, a in self.A.items()}
        return keys | {f"{PREFIX}{path}.lora_B.weight": b for path, b in self.B.items()}

    @property
    def hash(self):
        """sha256 over the sorted (key, dtype, shape, bytes) and the scales: what gates are bound
        to."""
        return hash_tensors(self.tensors(), str(sorted(self.scale.items())))

    @property
    def rank(self):
        """The largest rank of its Linears."""
        return max(a.shape[0] for a in self.A.values())


def linear_shapes(model):
    """{module path: (o, i)} of the Linears of the blocks: what adapters can sit on. Call it before
    attach."""
    return {
        n: tuple(m.weight.shape)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and "layers." in n
    }


# PEFT folders -------------------------------------------------------------------------------------------------------


def load_adapter(folder, name=None, shapes=None, header=False, quiet=False):
    """A PEFT folder (or one whose single sub-folder is) -> Adapter. `shapes`: linear_shapes of the
    base, to check against. With `header` no data is read, A and B are on the meta device; then, and
    where `quiet`, nothing is warned of. Raises InputError for everything conventions refuse;
    nothing is half-loaded."""
    folder = _adapter_folder(Path(folder))
    file = folder / "adapter_model.safetensors"
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    _check_config(config, config_file)
    if not file.exists():
        if (folder / "adapter_model.bin").exists():
            raise InputError(f"{folder}: only adapter_model.bin, a pickle, which can run code when loaded; save it "
                             "again from PEFT with safe_serialization=True")  # fmt: skip
        raise InputError(f"{file}: missing")
    tensors = read_header(file) if header else read_safetensors(file)[0]
    A, B = _split_keys(tensors, file)
    scale = {path: _scale(config, config_file, path, A[path].shape[0]) for path in A}
    adapter = Adapter(name or folder.name, A, B, scale, config, folder=folder)
    if shapes is not None:
        _check_shapes(adapter, file, shapes)
        _check_targets(adapter, config_file, shapes)
    if not (header or quiet):
        for key in sorted(config.keys() - HARMLESS - REFUSED.keys()):
            if config[key]:
                warn(f"{config_file}: unknown field {key} = {config[key]!r}: ignored, a newer PEFT may mean something "
                     "by it")  # fmt: skip
        if not any(s and A[path].any() and B[path].any() for path, s in scale.items()):
            warn(f"{folder}: changes nothing: every lora_A, lora_B or scale is zero (saved before training?)")
    if (folder / "samples.jsonl").exists():
        adapter.samples = [row["prompt"] for row in read_jsonl(folder / "samples.jsonl", ("prompt",))]
    return adapter


def _adapter_folder(folder):
    if not folder.is_dir():
        raise InputError(f"{folder}: no such adapter folder")
    if (folder / "adapter_config.json").exists():
        return folder
    inside = [f.parent for f in sorted(folder.glob("*/adapter_config.json"))]
    if len(inside) == 1:
        return inside[0]
    found = f"{len(inside)} of its sub-folders hold one" if inside else "nor has a sub-folder"
    raise InputError(f"{folder}: holds no adapter_config.json, {found}: not a PEFT adapter")


def _check_config(config, file):
    def refuse(name, expected):
        raise InputError(f"{file}: {name} is {config.get(name)!r}, expected {expected}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float) if name == "lora_alpha" else int):
            refuse(name, "a number")
        if not math.isfinite(value):
            refuse(name, "a finite number")
    if config["r"] < 1:
        refuse("r", "at least 1")
    for name, meaning in REFUSED.items():
        if config.get(name):
            raise InputError(
                f"{file}: {name} is {config[name]!r}: {meaning}: not supported, only plain LoRA is"
            )
    if config.get("bias", "none") != "none":
        refuse("bias", "'none' (trained biases are not supported)")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        raise InputError(f"{file}: init_lora_weights is {init!r}, which changed the base itself: convert the adapter "
                         "to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)")  # fmt: skip
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, (int, float)) for v in pattern.values()):
            refuse(name, "an object of numbers")
        if not all(math.isfinite(v) for v in pattern.values()):
            refuse(name, "finite numbers")
        for key in pattern:
            _compile(key, file, name)
    for name, kind in (("target_modules", str), ("exclude_modules", str), ("layers_pattern", str),
                       ("layers_to_transform", int)):  # fmt: skip
        value = config.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, kind) for item in items):
            refuse(name, f"{'text' if kind is str else 'a number'} or a list of them")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            _compile(config[name], file, name)


def _compile(pattern, file, field_name):
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{file}: {field_name}: bad pattern {pattern!r}: {error}") from None


def _split_keys(tensors, file):
    """{PEFT key: tensor} -> A, B by module path. Accepts `.lora_A.default.weight` and keys without
    the prefix."""
    parts = {"lora_A": {}, "lora_B": {}}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_A|lora_B)(?:\.[^.]+)?\.weight", key)
        if not match or tensor.ndim != 2 or not tensor.is_floating_point():
            raise InputError(
                f"{file}: tensor {key} {tuple(tensor.shape)} is none of plain LoRA's lora_A, lora_B"
            )
        path = match[1].removeprefix(PREFIX)
        if path in parts[match[2]]:
            raise InputError(f"{file}: two tensors for {path}.{match[2]}: more than one adapter in the file")
        parts[match[2]][path] = tensor
    A = parts["lora_A"]
    B = parts["lora_B"]
    if not A and not B:
        raise InputError(f"{file}: holds no LoRA tensors")
    if lonely := sorted(A.keys() ^ B.keys()):
        have, lack = ("lora_A", "lora_B") if lonely[0] in A else ("lora_B", "lora_A")
        raise InputError(f"{file}: {lonely[0]} has {have} but no {lack} ({len(lonely)} modules like that)")
    for path in A:
        r, _ = A[path].shape
        _, r_b = B[path].shape
        if r != r_b or r == 0:
            raise InputError(
                f"{file}: {path}: lora_A has rank {r}, lora_B {r_b}; expected the same, at least 1"
            )
    return A, B


def _pattern(patterns, path, default):
    """PEFT's rule: a key matches whole or after a dot, first match wins."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _scale(config, file, path, rank):
    r = _pattern(config.get("rank_pattern"), path, config["r"])
    if r != rank:
        raise InputError(f"{file}: r is {r} for {path}, its lora_A has {rank} rows; expected the same number")
    alpha = _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _check_shapes(adapter, file, shapes):
    """Raises InputError unless every adapted module exists in the base with the same input and
    output sizes."""
    unknown = [path for path in adapter.A if path not in shapes]
    if unknown:
        layers = 1 + max((int(m[1]) for p in shapes if (m := re.search(r"layers\.(\d+)\.", p))), default=-1)
        deep = [int(m[1]) for p in unknown if (m := re.search(r"layers\.(\d+)\.", p)) and int(m[1]) >= layers]
        if deep:
            raise InputError(
                f"{file}: made for a deeper base: it adapts layer {max(deep)}, this one has {layers} layers"
            )
        raise InputError(
            f"{file}: {len(unknown)} of {len(adapter.A)} adapted modules are not Linears of this base's blocks, "
            f"first {unknown[0]}{nearest(unknown[0], shapes)}"
        )
    for path, a in adapter.A.items():
        got = (adapter.B[path].shape[0], a.shape[1])
        want = shapes[path]
        if got != want:
            raise InputError(
                f"{file}: {path} maps {got[1]} -> {got[0]}, this base's {want[1]} -> {want[0]} features"
            )


def _check_targets(adapter, file, shapes):
    """Raises InputError where the modules that the config names are not those that have tensors."""
    config, targets, excluded = (
        adapter.config,
        *map(adapter.config.get, ("target_modules", "exclude_modules")),
    )
    if targets is None:
        raise InputError(f"{file}: target_modules is missing")

    def matches(names, path):
        if isinstance(names, str):
            return names.lower() == "all-linear" or re.fullmatch(names, path)
        return any(path == n or path.endswith(f".{n}") for n in names or ())

    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    pattern = patterns if isinstance(patterns, str) else "|".join(patterns)
    _compile(pattern, file, "layers_pattern")
    named = {p for p in shapes if matches(targets, p) and not (excluded and matches(excluded, p))}
    if layers:
        found = {p: re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.", p) for p in named}
        named = {p for p, m in found.items() if m and int(m[1]) in layers}
    for paths, says in ((named - adapter.A.keys(), "no tensors"), (adapter.A.keys() - named, "tensors")):
        if paths:
            named_by = "named by" if says == "no tensors" else "not named by"
            raise InputError(
                f"{file}: {len(paths)} modules {named_by} target_modules have {says}, first {sorted(paths)[0]}"
            )


def save_adapter(adapter, folder):
    """Writes a folder that PEFT loads, tensors byte-equal, and samples.jsonl where the adapter has
    samples."""
    folder = Path(folder)
    write_safetensors(folder / "adapter_model.safetensors", adapter.tensors())
    if adapter.samples:
        write_jsonl(folder / "samples.jsonl", [{"prompt": prompt} for prompt in adapter.samples])
    write_json(folder / "adapter_config.json", adapter.config)


def peft_config(r, alpha, dropout, targets, base):
    """The adapter_config.json of a plain LoRA of ours."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r, "lora_alpha": alpha,
        "lora_dropout": dropout, "target_modules": sorted(targets), "bias": "none", "use_rslora": False,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip
