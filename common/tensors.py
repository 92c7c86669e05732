"""Reads, checks, writes and hashes safetensors files."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.files import InputError, check_regular, foreign_format, parse_json, write_bytes

LARGEST_HEADER = 100_000_000  # bytes; the library's own limit


def _check_header(path):
    """Raises InputError unless the file has as many bytes as its safetensors header promises."""
    check_regular(path)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(512)
            begin = 8 + int.from_bytes(head[:8], "little")
            found = f"{size} bytes present"
            # By chance a header's length may begin as a pickle does, but then { follows it.
            plausible = begin <= size and head[8:9] == b"{"
            if not plausible and (stranger := foreign_format(head)):
                raise InputError(f"{path}: is {stranger}")
            if size < 8 or begin > size:
                raise InputError(f"{path}: truncated: {found}, its header alone promises {begin}")
            if begin > LARGEST_HEADER:
                raise InputError(
                    f"{path}: its header has {begin - 8} bytes, expected at most {LARGEST_HEADER}"
                )
            file.seek(8)
            text = file.read(begin - 8).decode("utf-8", "replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    header = parse_json(text, f"{path} (header)", once=True)
    promised = begin
    try:
        header.pop("__metadata__", None)
        for tensor in header.values():
            promised = max(promised, begin + tensor["data_offsets"][1])
    except (AttributeError, TypeError, KeyError, IndexError):
        problem = "not a safetensors file: its header doesn't list tensors"
        raise InputError(f"{path}: {problem}") from None
    if promised != size:
        raise InputError(f"{path}: truncated or damaged: {found}, its header promises {promised}")


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[safe_open]:
    """An open safetensors file (keys(), get_tensor(name), metadata()), its size checked first."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: {error}") from None


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """({name: tensor}, {metadata key: string}). Raises InputError for a NaN or Inf."""
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata() or {}
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors, metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, {} where it has none."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


def read_header(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """read_safetensors with tensors on the meta device: shapes alone, no data is read."""
    tensors = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensors[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
        return tensors, file.metadata() or {}


def check_finite(path: str | Path, name: str, tensor: torch.Tensor) -> None:
    """Raises InputError for a NaN or Inf, which can give finite wrong logits (silu(-inf) = 0)."""
    if tensor.is_floating_point() and tensor.numel():
        try:
            wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch compares no float8
        except NotImplementedError:  # torch converts no float4
            raise _wrong_dtype(path, name, tensor) from None
        low, high = torch.aminmax(wide)  # both NaN if one value is; no copy is made
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(wide)).sum())
            found = f"{bad} NaN or Inf values of {tensor.numel()} in {dtype_name(tensor.dtype)}"
            raise InputError(f"{path}: {name} holds {found}")


def cast_finite(path: str | Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in the dtype that it will be used in. Raises InputError where it holds whole numbers,
    and where it is not finite after the cast: 1e6 is Inf in float16."""
    if not tensor.is_floating_point():
        raise _wrong_dtype(path, name, tensor)
    cast = tensor.to(dtype)
    check_finite(path, name, cast)
    return cast


def _wrong_dtype(path, name, tensor):
    found = dtype_name(tensor.dtype)
    return InputError(f"{path}: {name} holds {found}, expected float32, bfloat16 or float16")


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def write_safetensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file that PEFT and transformers read; the same bytes each time."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = memoryview(save(tensors, {"format": "pt"} | (metadata or {})))
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:begin]))
    metadata = header["__metadata__"]
    header["__metadata__"] = dict(sorted(metadata.items()))  # save()'s order varies by process
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(path, len(text).to_bytes(8, "little"), text, data[begin:])


def hash_tensors(tensors: dict[str, torch.Tensor], extra: str = "") -> str:
    """sha256 over the sorted (key, dtype, shape, bytes) of `tensors`, and over `extra`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(extra.encode())
    return digest.hexdigest()
