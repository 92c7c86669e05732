"""One LoRA adapter, and PEFT folders in and out.

An adapter is B A per adapted Linear, added as scale * B A x. It is loaded from its tensors; the
config gives the scales and is checked against the tensors, and every key of either must be used:
so no adapter loads and silently does nothing. What this module can't represent exactly (DoRA,
biases, whole replaced modules, ...) it refuses by name.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.fields import FLOAT32, Number, read_field
from common.files import InputError, read_json, read_jsonl, warn, write_json, write_jsonl
from common.printable import shown
from common.tensors import hash_tensors, read_header, read_safetensors, write_safetensors
from model import Llama
from pool.adapter_checks import by_pattern, check_shapes, check_targets

PREFIX = "base_model.model."

# LoraConfig fields that change the mathematics where they are set: {field: what the refusal says}.
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
RANK = Number(int, 1, 1_000_000)
LAYER = Number(int, 0, 1_000_000)
NEEDED = {"r": RANK, "lora_alpha": FLOAT32}  # fields that are read, and their kinds
OPTIONAL = {
    "lora_dropout": Number(float, 0, 1),  # for training alone, but PEFT refuses any other
    "use_rslora": bool,
    "rank_pattern": {str: RANK},
    "alpha_pattern": {str: FLOAT32},
    "target_modules": (str, [str]),
    "exclude_modules": (str, [str]),
    "layers_to_transform": (LAYER, [LAYER]),
    "layers_pattern": (str, [str]),
    "base_model_name_or_path": str,
}
# Values of init_lora_weights that change the base's own weights before training starts.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields that change nothing here, or that the checks below read.
HARMLESS = {
    *("task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "bias"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping"),
    *("rank_pattern", "alpha_pattern", "runtime_config", "ensure_weight_tying", "inference_mode"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
}


@dataclass
class Adapter:
    """A[path] (r, i), B[path] (o, r), scale[path] of each adapted Linear, by its module path."""

    name: str
    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    scale: dict[str, float]
    config: dict
    samples: list[str] = field(default_factory=list)  # prompts of its training data, for retrieval
    folder: Path | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """{PEFT key: tensor}."""
        keys = {f"{PREFIX}{path}.lora_A.weight": a for path, a in self.A.items()}
        return keys | {f"{PREFIX}{path}.lora_B.weight": b for path, b in self.B.items()}

    @property
    def hash(self) -> str:
        """sha256 over sorted (key, dtype, shape, bytes) and the scales; gates are bound to it."""
        return hash_tensors(self.tensors(), str(sorted(self.scale.items())))

    @property
    def rank(self) -> int:
        """The largest rank of its Linears."""
        return max(map(len, self.A.values()))


def linear_shapes(model: Llama) -> dict[str, tuple[int, int]]:
    """{module path: (o, i)} of the Linears that adapters can adapt. Call it before attach."""
    shapes = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in path:
            shapes[path] = tuple(module.weight.shape)
    return shapes


# PEFT folders -----------------------------------------------------------------------------------


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter that a PEFT folder holds."""
    names = ("adapter_config.json", "adapter_model.safetensors", "samples.jsonl")
    return [folder / name for name in names if (folder / name).exists()]


def adapter_folders(path: Path) -> list[Path]:
    """The PEFT folders directly inside a folder, sorted; not those whose names a dot begins."""
    return sorted(file.parent for file in path.glob("[!.]*/adapter_config.json"))


def load_adapter(
    folder: Path | str,
    name: str | None = None,
    shapes: dict[str, tuple[int, int]] | None = None,
    header: bool = False,
    quiet: bool = False,
) -> Adapter:
    """A PEFT folder, or a folder that holds just one, -> Adapter.

    `shapes`: linear_shapes of the base, to check against. With `header` no data is read: A and B
    are on the meta device. `header` and `quiet` suppress warnings. Raises InputError where the
    folder isn't plain LoRA or doesn't fit the base.
    """
    folder = peft_folder(folder)
    file = folder / "adapter_model.safetensors"
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    _check_config(config, config_file)
    if not file.exists():
        if (folder / "adapter_model.bin").exists():
            raise InputError(
                f"{folder}: only adapter_model.bin, a pickle, which can run code when loaded; "
                "save it again from PEFT with safe_serialization=True"
            )
        raise InputError(f"{file}: missing")
    tensors, metadata = read_header(file) if header else read_safetensors(file)
    A, B = _split_keys(tensors, file)
    scale = _scales(config, config_file, A)
    _check_saved_together(config, metadata, config_file)
    adapter = Adapter(name or folder.name, A, B, scale, config, folder=folder)
    if shapes is not None:
        check_shapes(adapter.A, adapter.B, file, shapes)
        check_targets(config, adapter.A.keys(), config_file, shapes)
    if not (header or quiet):
        for key in sorted(config.keys() - HARMLESS - REFUSED.keys()):
            if config[key]:
                where = f"{config_file}: unknown field {key} = {shown(config[key])}"
                warn(f"{where}: ignored, a newer PEFT may mean something by it")
        if not any(s and A[path].any() and B[path].any() for path, s in scale.items()):
            why = "every lora_A, lora_B or scale is zero (saved before training?)"
            warn(f"{folder}: changes nothing: {why}")
    samples = folder / "samples.jsonl"
    if samples.exists():
        adapter.samples = [row["prompt"] for row in read_jsonl(samples, ("prompt",))]
    return adapter


def peft_folder(folder: Path | str) -> Path:
    """The folder itself or the one in it that holds a PEFT adapter. Raises InputError where none does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such adapter folder")
    if (folder / "adapter_config.json").exists():
        return folder
    inside = adapter_folders(folder)
    if len(inside) == 1:
        return inside[0]
    found = f"{len(inside)} of its sub-folders hold one" if inside else "nor has a sub-folder"
    raise InputError(f"{folder}: holds no adapter_config.json, {found}: not a PEFT adapter")


def _check_config(config, file):
    def refuse(name, expected):
        raise InputError(f"{file}: {name} is {shown(config.get(name))}, expected {expected}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    for name, kind in NEEDED.items():
        read_field(file, config, name, kind)
    for name, kind in OPTIONAL.items():
        read_field(file, config, name, kind, None)
    for name, meaning in REFUSED.items():
        if config.get(name):
            found = f"{name} is {shown(config[name])}: {meaning}"
            raise InputError(f"{file}: {found}: not supported, only plain LoRA is")
    if config.get("bias", "none") != "none":
        refuse("bias", "'none' (trained biases are not supported)")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        raise InputError(
            f"{file}: init_lora_weights is {shown(init)}, which changed the base itself: convert the "
            "adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )


def _scale_fields(config):
    """The fields that give the scales and ranks, as text."""
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return json.dumps({name: config.get(name) or None for name in names})


def _check_saved_together(config, metadata, file):
    """Raises InputError where the tensors were saved by save_adapter with other scales."""
    saved = metadata.get("saved_with")
    if saved not in (None, _scale_fields(config)):
        why = "a save was interrupted, or the file edited: save or train the adapter again"
        raise InputError(f"{file}: found {_scale_fields(config)}, its tensors were saved with {saved}: {why}")


def _split_keys(tensors, file):
    """{PEFT key: tensor} -> A, B by module path; keys may lack PREFIX and may name an adapter."""
    parts = {"lora_A": {}, "lora_B": {}}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_A|lora_B)(?:\.[^.]+)?\.weight", key)
        if not match or tensor.ndim != 2 or not tensor.is_floating_point():
            found = f"tensor {key} {tuple(tensor.shape)}"
            raise InputError(f"{file}: {found} is none of plain LoRA's lora_A, lora_B")
        path, part = match.groups()
        path = path.removeprefix(PREFIX)
        if path in parts[part]:
            found = f"two tensors for {path}.{part}"
            raise InputError(f"{file}: {found}: more than one adapter in the file")
        parts[part][path] = tensor
    A, B = parts.values()
    if not A and not B:
        raise InputError(f"{file}: holds no LoRA tensors")
    if lonely := sorted(A.keys() ^ B.keys()):
        have, lack = ("lora_A", "lora_B") if lonely[0] in A else ("lora_B", "lora_A")
        found = f"{lonely[0]} has {have} but no {lack}"
        raise InputError(f"{file}: {found} ({len(lonely)} modules like that)")
    for path, a in A.items():
        r = a.shape[0]
        r_b = B[path].shape[1]
        if r != r_b or r == 0:
            found = f"lora_A has rank {r}, lora_B {r_b}"
            raise InputError(f"{file}: {path}: {found}; expected the same, at least 1")
    return A, B


def _scales(config, file, A):
    """{path: scale}. Raises InputError where A has another rank than the config says."""
    ranks = by_pattern(config, "rank_pattern", config["r"], A, file)
    alphas = by_pattern(config, "alpha_pattern", config["lora_alpha"], A, file)
    scales = {}
    for path, r in ranks.items():
        if r != len(A[path]):
            found = f"r is {r} for {path}, its lora_A has {len(A[path])} rows"
            raise InputError(f"{file}: {found}; expected the same number")
        scales[path] = alphas[path] / (math.sqrt(r) if config.get("use_rslora") else r)
    return scales


def save_adapter(adapter: Adapter, folder: Path | str) -> None:
    """Writes a folder that PEFT loads; samples.jsonl too where the adapter has samples.

    Each file is replaced at once, the folder is not: a kill after the first file leaves new tensors
    under the earlier config. So the tensors' metadata holds the config's scales, and load_adapter
    refuses other ones. PEFT's own files have no such metadata and load without this check.
    """
    folder = Path(folder)
    metadata = {"saved_with": _scale_fields(adapter.config)}
    write_safetensors(folder / "adapter_model.safetensors", adapter.tensors(), metadata)
    if adapter.samples or (folder / "samples.jsonl").exists():  # an earlier adapter's
        save_samples(folder, adapter.samples)
    write_json(folder / "adapter_config.json", adapter.config)


def save_samples(folder: Path, prompts: list[str]) -> None:
    """Writes the samples.jsonl of the adapter in `folder`."""
    write_jsonl(folder / "samples.jsonl", [{"prompt": prompt} for prompt in prompts])


def peft_config(r: int, alpha: float, dropout: float, targets: Iterable[str], base: str | None) -> dict:
    """The adapter_config.json of an adapter that this project trained or computed."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r,
        "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": sorted(targets),
        "bias": "none", "use_rslora": False, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True,
    }  # fmt: skip
