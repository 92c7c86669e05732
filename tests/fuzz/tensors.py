"""Damage to safetensors files: header length, header JSON, offsets, dtypes, shapes, names, values."""

import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fuzz.values import HOSTILE, NUMBER_TEXTS, UTF8, damage_json, dump, json_value, text

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "f32", "", "X" * 300]
CASTS = [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]


def split(data: bytes) -> tuple[dict, bytes]:
    """(header, tensors' bytes) of a safetensors file. The library writes metadata in any order, here
    they are sorted: a case is the same in every copy of the world."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return header, data[8 + n :]


def join(header: str, body: bytes) -> bytes:
    """The file of a header's JSON text."""
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body


def sort_metadata(file: Path) -> None:
    """Writes the file again, its metadata in order."""
    header, body = split(file.read_bytes())
    file.write_bytes(join(json.dumps(header), body))


def damage_header(rng: random.Random, file: Path) -> tuple[str, bool]:
    """Damages the file's header so that it may no longer fit its tensors. (In words how; whether that
    may make a whole file of other content.)"""
    header, body = split(file.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.choice(["length", "json", "json", "dtype", "shape", "offsets", "name", "twice"])
    if kind == "length":
        data = file.read_bytes()
        n = rng.choice([0, 1, 2**63, 2**64 - 1, 10**9, len(data), int.from_bytes(data[:8], "little") - 1])
        file.write_bytes(n.to_bytes(8, "little") + data[8:])
        return f"header length {n}", False
    if kind == "json":
        written, done = damage_json(rng, header)
        file.write_bytes(join(written, body))
        return f"header: {done}", "swapped" in done or "__metadata__" in done
    entry = header[name]
    if kind == "dtype":
        entry["dtype"] = done = rng.choice(DTYPES)
    elif kind == "shape":
        shapes = [entry["shape"][::-1], [], [0], [-1], [2**63, 2], [2**32, 2**32], [1, *entry["shape"]]]
        entry["shape"] = done = rng.choice([*shapes, [0.5], ["2"], None, [10**30]])
    elif kind == "offsets":
        begin, end = entry["data_offsets"]
        other = header[rng.choice(names)]["data_offsets"]
        offsets = [[end, begin], [begin, end + 4], [begin - 4, end], other, [begin, begin], [0, 2**64], [1]]
        entry["data_offsets"] = done = rng.choice(offsets)
    elif kind == "name":
        done = rng.choice([name + ".x", name.upper(), *HOSTILE])
        header[done] = header.pop(name)
    else:
        done = ""
        header["@twice@"] = header[rng.choice(names)]
    file.write_bytes(join(json.dumps(header).replace("@twice@", name), body))
    return f"header: {kind} of {name} {done!r}", False


def damage_tensor(rng: random.Random, file: Path) -> tuple[str, bool]:
    """Writes a valid file in which a tensor has another name, shape, dtype or values, is missing or
    is one too many. (In words how; whether that makes a whole file of other content.)"""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(["missing", "extra", "name", "shape", "dtype", "value", "value", "swap", "none"])
    done = ""
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        done = rng.choice([name + ".x", rng.choice(UTF8), "model.layers.9.mlp.up_proj.weight"])
        tensors[done] = torch.ones(rng.choice([(), (2,), (3, 5)]))
    elif kind == "name":
        done = rng.choice(
            [name.replace("0", "9"), name.replace("weight", "bias"), name + "\x1b[2J", "A" * 300]
        )
        tensors[done] = tensors.pop(name)
    elif kind == "shape":
        tensors[name], done = _reshaped(rng, tensor)
    elif kind == "dtype":
        done = rng.choice(CASTS)
        tensors[name] = tensor.to(done)
    elif kind == "value":
        done = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e30, 1e-45, 0.0, 7.0])
        where = rng.randrange(max(1, tensor.numel()))
        if tensor.is_floating_point():
            tensor.view(-1)[where : where + 1] = done
    elif kind == "swap":
        done = rng.choice(sorted(tensors))
        tensors[name], tensors[done] = tensors[done].clone(), tensor.clone()
    else:
        tensors = {}
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file, metadata)
    sort_metadata(file)
    return f"{kind} of {name} {done}", kind in ("value", "swap", "dtype") or done == "transposed"


def _reshaped(rng, tensor):
    """(The tensor in another shape, in words how.)"""
    if tensor.dim() == 0:
        return tensor.repeat(3), "three instead of one"
    shapes = {
        "transposed": tensor.t() if tensor.dim() == 2 else tensor[:, None],
        "flat": tensor.reshape(-1),
        "one row less": tensor[:-1],
        "one row more": torch.cat([tensor, tensor[:1]]),
        "no rows": tensor[:0],
        "one number": tensor.sum(),
        "one dimension more": tensor[None],
        "half the columns": tensor[..., ::2],
    }
    how = rng.choice(sorted(shapes))
    return shapes[how], how


def damage_metadata(rng: random.Random, file: Path) -> tuple[str, str]:
    """Damages the file's metadata alone. (In words how; the key, or "all".)"""
    header, body = split(file.read_bytes())
    metadata = header.setdefault("__metadata__", {})
    key = rng.choice(sorted(metadata) or ["format"])
    kind = rng.choice(["text", "text", "number", "number", "json", "remove", "lines", "all"])
    if kind == "all":
        header["__metadata__"] = new = json_value(rng)
        key = "all"
    elif kind == "remove":
        metadata.pop(key, None)
        new = None
    else:
        lines = str(metadata.get(key, "")).split("\n")
        others = [lines[::-1], lines[:-1], [*lines, lines[0]], [*lines, "\x1b[2J"]]
        values = {"text": text(rng)[:100_000], "json": json_value(rng), "number": rng.choice(NUMBER_TEXTS)}
        values["lines"] = "\n".join(rng.choice(others))
        metadata[key] = new = values[kind]
    file.write_bytes(join(dump(header), body))
    return f"metadata {key} is {str(new)[:80]!r}", key
