"""The fingerprint of a model's weights, which binds gates, routers and retrievers to their base."""

import contextlib
import hashlib
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from common.files import InputError
from common.progress import track
from common.tensors import open_safetensors


def file_state(file: Path) -> tuple[int, int, int]:
    """What tells a file from one that was written over it: inode, bytes, nanoseconds of the change."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def hash_weights(stored_in: dict[str, tuple[Path, tuple, str]]) -> str:
    """128 bits, in hex, of the sha256 over hash_bytes() of all of a model's tensors, in the order
    of their names: {name: (file, its file_state() when the model was loaded, name in the file)}.
    Raises InputError where a file has changed since."""
    digest = hashlib.sha256()
    opened = {}
    with contextlib.ExitStack() as stack:
        for name, (file, state, stored) in track(sorted(stored_in.items()), "tensors hashed"):
            if file not in opened:
                if not file.exists() or file_state(file) != state:
                    raise InputError(f"{file}: changed since the model was loaded from it; load it again")
                opened[file] = stack.enter_context(open_safetensors(file))
            digest.update(hash_bytes(name, opened[file].get_tensor(stored)))
    return digest.hexdigest()[:32]


def hash_bytes(name: str, tensor: torch.Tensor) -> bytes:
    """sha256 over a tensor's name, dtype, shape and, instead of its bytes, a sum for each 4 KiB.

    Of 512 words x_j of 64 bits that is the sum of m_j x_j modulo 2^64, the m_j odd: no change of a
    single word is lost, nor, but by a chance of one in 2^64, that of several or of their order. An
    even number of the words' top bits may change within 4 KiB unseen: against mistakes that is
    enough, against an attacker it is not. sha256 over all bytes takes six times as long (LOG.md).
    """
    raw = tensor.reshape(-1).view(torch.uint8)
    rest = len(raw) % 4096
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for part in (raw[: len(raw) - rest], F.pad(raw[len(raw) - rest :], (0, -rest % 4096))):
        if len(part):
            words = part.view(torch.int64).view(-1, 512)
            digest.update(torch.mv(words, _multipliers()).numpy())
    return digest.digest()


@cache
def _multipliers():
    """512 odd numbers of 64 bits without a pattern, the same everywhere."""
    data = bytearray(hashlib.shake_128(b"multipliers").digest(512 * 8))
    return torch.frombuffer(data, dtype=torch.int64) | 1
