"""Files of trained gates: one row for each adapter they were trained with.

The rows are matched to the pool's slots by the adapters' names and hashes.
"""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from common.fields import Number, parse_number
from common.files import InputError, warn_once
from common.tensors import cast_finite, read_safetensors, write_safetensors
from moe_lora import MeteoraGate, meteora_gates
from pool.folder import check_base, check_twice
from pool.slots import Pool


def parameters_of(gates: dict[str, nn.Module], e: int) -> dict[str, nn.Parameter]:
    """{module path: gate} -> {'PATH.gate.NAME': parameter}. A file keeps a row for each adapter, so
    the first axis of every parameter is the pool's e slots. Raises InputError for another."""
    parameters = {}
    for path, gate in gates.items():
        for name, param in gate.named_parameters():
            key = f"{path}.gate.{name}"
            if param.shape[:1] != (e,):
                found = f"{key} is {tuple(param.shape)}, expected a first axis of {e}, the pool's slots"
                raise InputError(f"{found}: a gate file keeps a row for each adapter")
            parameters[key] = param
    return parameters


def save_gates(
    file: Path | str,
    gates: dict[str, nn.Module],
    pool: Pool,
    k: int,
    names: list[str],
    base: str,
    about: dict[str, str] | None = None,
) -> None:
    """Writes the parameters of {module path: gate}, one row for each of `names`, in that order,
    bound to these adapters and to the base of fingerprint `base`. `about`: further metadata."""
    slots = list(map(pool.slot, names))
    hashes = [pool.members[name].hash for name in names]
    tensors = {key: param[slots] for key, param in parameters_of(gates, pool.capacity).items()}
    metadata = {"names": "\n".join(names), "hashes": "\n".join(hashes), "k": str(k)}
    metadata["base"] = base
    write_safetensors(file, tensors, metadata | (about or {}))


class GateFile:
    """A gate file whose rows are matched to a pool's slots: `k`, `metadata`, and `known` (e,) bool, True
    for a slot that has a row.

    Raises InputError where the gates were trained on another base than that of the fingerprint
    `base`, where adapters of rows are missing or have changed (it lists them), and where no adapter
    could be chosen; `command` trains such gates again. An adapter without a row is never chosen;
    one warning names all of these. An adapter of `exclude` is never chosen either, and may stay on
    disk.
    """

    def __init__(
        self,
        file: Path | str,
        pool: Pool,
        base: str,
        exclude: Collection[str] = (),
        command: str = "train.py gates",
    ):
        self.file = file
        again = f"python {command} trains them again"
        self.tensors, metadata = read_safetensors(file)
        self.metadata = metadata
        if not {"names", "hashes", "k"} <= metadata.keys():
            found = "metadata lacks names, hashes or k"
            raise InputError(f"{file}: {found}: not a gate file of this project")
        names = metadata["names"].split("\n")
        hashes = metadata["hashes"].split("\n")
        if len(names) != len(hashes):
            found = f"{len(names)} names and {len(hashes)} hashes"
            raise InputError(f"{file}: {found}, expected as many of each: {again}")
        check_twice(file, names)
        check_base(file, metadata.get("base", ""), base, again)
        self.k = parse_number(f"{file}: k", metadata["k"], Number(int, 1, len(names)))
        named = re.fullmatch(r".*_top(\d+)", Path(file).stem)
        if named and self.k != int(named[1]):
            raise InputError(f"{file}: k is {self.k}, expected {named[1]} as its name says: {again}")
        self.rows = [row for row, name in enumerate(names) if name not in exclude]
        chosen = [names[row] for row in self.rows]
        pool.need([name for name in chosen if name in pool.members])
        wrong = []
        for name, digest in zip(names, hashes, strict=True):
            if name in exclude:
                continue
            if name not in pool.members:
                wrong.append(f"{name} (missing from the pool)")
            elif pool.members[name].hash != digest:
                found = pool.members[name].hash
                wrong.append(f"{name} (trained with {digest[:12]}, the pool's is {found[:12]})")
        if wrong:
            listed = ", ".join(wrong)
            raise InputError(f"{file}: trained with other adapters: {listed}: {again}")
        if strangers := [name for name in pool.names if name not in names]:
            warn_once(f"{file} has no row for {', '.join(strangers)}: never chosen by these gates")
        if not self.rows:
            raise InputError(f"{file}: all its adapters are excluded")
        self.slots = torch.tensor(list(map(pool.slot, chosen)))
        self.count = len(names)
        device = next(iter(pool.A.values())).device
        self.known = torch.zeros(pool.capacity, dtype=torch.bool, device=device)
        self.known[self.slots] = True

    def fill(self, gates: dict[str, nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
        """Copies the file's rows into {module path: gate}, in `dtype`, and returns the gates.
        Raises InputError where a tensor is missing or has the wrong shape."""
        for key, param in parameters_of(gates, len(self.known)).items():
            want = (self.count, *param.shape[1:])
            if key not in self.tensors or tuple(self.tensors[key].shape) != want:
                found = tuple(self.tensors[key].shape) if key in self.tensors else "nothing"
                raise InputError(f"{self.file}: {key}: expected {want}, found {found}")
            rows = cast_finite(self.file, key, self.tensors[key][self.rows], dtype)
            param.data = torch.zeros(param.shape, dtype=dtype, device=param.device)
            param.data[self.slots] = rows.to(param.device)
            param.requires_grad_(False)
        return gates


def load_gates(
    file: Path | str,
    pool: Pool,
    base: str,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    k: int | None = None,
) -> dict[str, MeteoraGate]:
    """A file of MeteoRA's gates -> {module path: MeteoraGate}; see GateFile."""
    gate_file = GateFile(file, pool, base)
    gates = meteora_gates(pool, k or gate_file.k, temperature, gate_file.known)
    return gate_file.fill(gates, dtype)
