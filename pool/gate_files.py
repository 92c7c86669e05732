"""Files of trained gates: a row for each adapter they were trained with, joined to the pool by name
and hash."""

import torch

from common.files import InputError, read_safetensors, warn, write_safetensors
from moe_lora import meteora_gates


def parameters_of(gates):
    """{module path: gate} -> {'PATH.gate.NAME': parameter}, every first axis the pool's slots."""
    return {
        f"{path}.gate.{n}": p for path, gate in gates.items() for n, p in gate.named_parameters(recurse=False)
    }


def save_gates(file, gates, pool, k, names):
    """gates {module path: gate} -> a file of their parameters, rows in the order of `names`, bound
    to name and hash."""
    slots = [pool.slot(name) for name in names]
    hashes = [pool.members[name].hash for name in names]
    tensors = {key: param[slots] for key, param in parameters_of(gates).items()}
    write_safetensors(file, tensors, {"names": "\n".join(names), "hashes": "\n".join(hashes), "k": str(k)})


class GateFile:
    """A gate file, its rows joined to a pool's slots by name and hash: `k`, and `known` (e,) bool,
    slots with a row.

    A row whose adapter is missing or has changed is an InputError that lists them all; an adapter
    without a row is never chosen, with one warning, nor is one of `exclude`, which may stay on
    disk. None that could be chosen is an InputError too.
    """

    def __init__(self, file, pool, exclude=()):
        self.file = file
        self.tensors, metadata = read_safetensors(file)
        if not {"names", "hashes", "k"} <= metadata.keys() or not metadata["k"].isdigit():
            raise InputError(f"{file}: metadata lacks names, hashes or k: not a gate file of this project")
        names = metadata["names"].split("\n")
        hashes = metadata["hashes"].split("\n")
        self.rows = [row for row, name in enumerate(names) if name not in exclude]
        pool.need([names[row] for row in self.rows if names[row] in pool.members])
        wrong = []
        for name, digest in [(names[row], hashes[row]) for row in self.rows if row < len(hashes)]:
            if name not in pool.members:
                wrong.append(f"{name} (missing from the pool)")
            elif pool.members[name].hash != digest:
                wrong.append(
                    f"{name} (trained with {digest[:12]}, the pool's is {pool.members[name].hash[:12]})"
                )
        if wrong or len(names) != len(hashes):
            raise InputError(f"{file}: made for other adapters: {', '.join(wrong)}; train the gates again")
        if strangers := [n for n in pool.names if n not in names]:
            warn(f"{file} has no row for {', '.join(strangers)}: never chosen by these gates")
        if not self.rows:
            raise InputError(f"{file}: all its adapters are excluded")
        self.slots = torch.tensor([pool.slot(names[row]) for row in self.rows])
        self.count = len(names)
        self.k = int(metadata["k"])
        device = next(iter(pool.A.values())).device
        self.known = torch.zeros(pool.capacity, dtype=torch.bool, device=device)
        self.known[self.slots] = True

    def fill(self, gates, dtype=torch.float32):
        """Gives {module path: gate} the file's rows, in `dtype`. Raises InputError where a tensor
        is missing or of the wrong shape."""
        for key, param in parameters_of(gates).items():
            want = (self.count, *param.shape[1:])
            if key not in self.tensors or tuple(self.tensors[key].shape) != want:
                found = tuple(self.tensors[key].shape) if key in self.tensors else "nothing"
                raise InputError(f"{self.file}: {key}: expected {want}, found {found}")
            param.data = torch.zeros(param.shape, dtype=dtype, device=param.device)
            param.data[self.slots] = self.tensors[key][self.rows].to(param.device, dtype)
            param.requires_grad_(False)
        return gates


def load_gates(file, pool, temperature=1.0, dtype=torch.float32, k=None):
    """A file of MeteoRA's gates -> {module path: MeteoraGate}; see GateFile."""
    rows = GateFile(file, pool)
    return rows.fill(meteora_gates(pool, k or rows.k, temperature, rows.known), dtype)
