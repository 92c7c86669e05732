"""The checksum that binds gates, router and retriever to their base."""

from hashlib import sha256, shake_128

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import InputError
from common.fingerprint import hash_bytes
from helpers_models import write_llama
from model import load_llama


def sum_of_rows(data):
    """hash_bytes()'s sums with Python's integers."""
    multipliers = shake_128(b"multipliers").digest(4096)
    sums = b""
    for row in range(0, len(data), 4096):
        total = 0
        words = data[row : row + 4096].ljust(4096, b"\0")
        for j in range(0, 4096, 8):
            m = int.from_bytes(multipliers[j : j + 8], "little") | 1
            total += m * int.from_bytes(words[j : j + 8], "little")
        sums += (total % 2**64).to_bytes(8, "little")
    return sums


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2048,), (2049,), (5, 1031)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fingerprint_is_the_documented_sum(shape, dtype):
    """Computed otherwise by another torch, byte order or thread count, it binds parts to nothing."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    data = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    want = sha256(f"w {dtype} {shape}\n".encode() + sum_of_rows(data)).digest()
    assert hash_bytes("w", tensor) == want


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2 * 5003 - 1), st.integers(0, 7))
def test_fingerprint_sees_every_bit(byte, bit):
    """One that reads a tensor's first 256 values lets a fine-tuned base pass for its parent."""
    tensor = torch.randn(5003, generator=torch.Generator().manual_seed(3)).bfloat16()
    changed = tensor.clone()
    changed.view(torch.uint8)[byte] ^= 1 << bit
    assert hash_bytes("w", changed) != hash_bytes("w", tensor)


def test_fingerprint_sees_order_names_shapes_and_dtypes():
    """A plain sum is the same where heads, rows, columns or whole tensors have changed places."""
    w = torch.randn(64, 97, generator=torch.Generator().manual_seed(3))
    rows = w[[1, 0, *range(2, 64)]]
    columns = w[:, [1, 0, *range(2, 97)]]
    far = torch.cat([w[32:], w[:32]])
    variants = [w, rows, columns, far, -w, w.view(97, 64), w.view(torch.int32), w[:63], w.double()]
    hashes = [hash_bytes("w", y) for y in variants] + [hash_bytes("v", w)]
    assert len(set(hashes)) == len(hashes)


def test_fingerprint_is_of_the_files_that_were_loaded(tmp_path):
    """Without it a base written over the one in memory binds gates to weights they never saw."""
    model = load_llama(write_llama(tmp_path / "m"))
    kept = load_llama(tmp_path / "m")
    first = kept.fingerprint()
    write_llama(tmp_path / "m", seed=1)
    with pytest.raises(InputError, match="model.safetensors: changed since the model was loaded"):
        model.fingerprint()
    assert kept.fingerprint() == first
