"""Files of trained gates and routers: what is bound to which adapters, or to the base alone.

Gates hold a row for each adapter that they were trained with, joined to the pool's slots by name and hash. Routers know
no adapters.
"""

import torch

from common.files import InputError, read_safetensors, warn, write_safetensors
from moe_lora import RouterLoRA, meteora_gates


def parameters_of(gates):
    """{module path: gate} -> {'PATH.gate.NAME': parameter}, every first axis the pool's slots."""
    return {f"{path}.gate.{n}": p for path, gate in gates.items() for n, p in gate.named_parameters(recurse=False)}


def save_gates(file, gates, pool, k, names):
    """gates {module path: gate} -> a file of their parameters, rows in the order of `names`, bound to name and hash."""
    slots = [pool.slot(name) for name in names]
    hashes = [pool.members[name].hash for name in names]
    tensors = {key: param[slots] for key, param in parameters_of(gates).items()}
    write_safetensors(file, tensors, {"names": "\n".join(names), "hashes": "\n".join(hashes), "k": str(k)})


class GateFile:
    """A gate file, its rows joined to a pool's slots by name and hash: `k`, and `known` (e,) bool, slots with a row.

    A row whose adapter is missing or has changed is an InputError that lists them all; an adapter without a row is
    never chosen, with one warning, nor is one of `exclude`, which may stay on disk. None that could be chosen is an
    InputError too.
    """

    def __init__(self, file, pool, exclude=()):
        self.file = file
        self.tensors, metadata = read_safetensors(file)
        if not {"names", "hashes", "k"} <= metadata.keys() or not metadata["k"].isdigit():
            raise InputError(f"{file}: metadata lacks names, hashes or k: not a gate file of this project")
        names, hashes = metadata["names"].split("\n"), metadata["hashes"].split("\n")
        self.rows = [row for row, name in enumerate(names) if name not in exclude]
        pool.need([names[row] for row in self.rows if names[row] in pool.members])
        wrong = []
        for name, digest in [(names[row], hashes[row]) for row in self.rows if row < len(hashes)]:
            if name not in pool.members:
                wrong.append(f"{name} (missing from the pool)")
            elif pool.members[name].hash != digest:
                wrong.append(f"{name} (trained with {digest[:12]}, the pool's is {pool.members[name].hash[:12]})")
        if wrong or len(names) != len(hashes):
            raise InputError(f"{file}: made for other adapters: {', '.join(wrong)}; train the gates again")
        if strangers := [n for n in pool.names if n not in names]:
            warn(f"{file} has no row for {', '.join(strangers)}: never chosen by these gates")
        if not self.rows:
            raise InputError(f"{file}: all its adapters are excluded")
        self.slots, self.count = torch.tensor([pool.slot(names[row]) for row in self.rows]), len(names)
        self.k, device = int(metadata["k"]), next(iter(pool.A.values())).device
        self.known = torch.zeros(pool.capacity, dtype=torch.bool, device=device)
        self.known[self.slots] = True

    def fill(self, gates, dtype=torch.float32):
        """Gives {module path: gate} the file's rows, in `dtype`. Raises InputError where a tensor is missing or of the
        wrong shape."""
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


def save_routers(file, routers, model, about):
    """{module path: RouterLoRA} -> POOL/router.safetensors, bound to the base alone. `about` {key: text}: how it was
    trained."""
    tensors = {f"{path}.router_{n}.weight": getattr(r, n).detach() for path, r in routers.items() for n in "AB"}
    first = next(iter(routers.values()))
    how = {"divisor": repr(float(first.divisor)), "scaled": str(int(first.scaled)), "prior": repr(float(first.prior))}
    write_safetensors(file, tensors, {"base": model.fingerprint, **how, **about})


def load_routers(file, pool, model, dtype=torch.float32):
    """File -> {module path: RouterLoRA} for the pool's Linears. Raises InputError where it was made for another base or
    lacks one of them."""
    tensors, metadata = read_safetensors(file)
    if lacks := {"base", "divisor", "scaled", "prior"} - metadata.keys():
        raise InputError(f"{file}: metadata lacks {', '.join(sorted(lacks))}: not a router of this project")
    if metadata["base"] != model.fingerprint:
        raise InputError(f"{file}: made for base {metadata['base'][:12]}, this one is {model.fingerprint[:12]}: "
                         "python train.py router makes one for it")  # fmt: skip
    routers = {}
    for path, A in pool.A.items():
        parts = [tensors.get(f"{path}.router_{n}.weight") for n in "AB"]
        i, o = A.shape[2], pool.B[path].shape[1]
        found = [None if part is None else tuple(part.shape) for part in parts]
        if None in found or found != [(found[0][0], i), (o, found[0][0])]:
            raise InputError(f"{file}: {path}: expected router_A (r, {i}) and router_B ({o}, r), found {found}")
        A_r, B_r = (part.to(A.device, dtype) for part in parts)
        how = float(metadata["divisor"]), metadata["scaled"] == "1", float(metadata["prior"])
        routers[path] = RouterLoRA(A_r, B_r, *how)
        routers[path].requires_grad_(False).eval().bind(pool.B[path], pool.scale[path])
    return routers
