"""Safetensors headers whose parts contradict each other: one line that names the file."""

import json

import pytest

from common.files import InputError
from common.tensors import read_header, read_safetensors

DATA = bytes(24)
GOOD = {
    "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "w": {"dtype": "I16", "shape": [2, 4], "data_offsets": [8, 24]},
}
W = {
    "dtype of another size": {"dtype": "F32"},
    "no such dtype": {"dtype": "F33"},
    "dtype a number": {"dtype": 5},
    "dtype a list": {"dtype": ["I16"]},
    "shape too small": {"shape": [2, 3]},
    "shape below 0": {"shape": [-2, -4]},
    "shape huge": {"shape": [10**30]},
    "shape that overflows": {"shape": [2**40, 2**40]},
    "shape of fractions": {"shape": [2.0, 4.0]},
    "shape a text": {"shape": "2"},
    "shape true": {"shape": [True, 8]},
    "offsets that overlap": {"data_offsets": [4, 24]},
    "offsets with a gap": {"data_offsets": [12, 24]},
    "offsets below 0": {"data_offsets": [-8, 24]},
    "offsets huge": {"data_offsets": [8, 10**30]},
    "offsets infinite": {"data_offsets": [8, 1e400]},
    "offsets the other way": {"data_offsets": [24, 8]},
    "offsets of fractions": {"data_offsets": [8.0, 24.0]},
    "offsets texts": {"data_offsets": ["8", "24"]},
    "three offsets": {"data_offsets": [8, 16, 24]},
    "no offsets": {"data_offsets": None},
}
WHOLE = {
    "metadata of numbers": GOOD | {"__metadata__": {"k": 1}},
    "metadata a text": GOOD | {"__metadata__": "k"},
    "metadata half a surrogate pair": GOOD | {"__metadata__": {"k": "\ud800"}},
    "name half a surrogate pair": GOOD | {"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [24, 24]}},
    "a list": [GOOD],
    "a number": 10**30,
    "a tensor is a number": GOOD | {"x": 1e400},
}
HEADERS = {name: GOOD | {"w": GOOD["w"] | change} for name, change in W.items()} | WHOLE


def write(path, header, data=DATA):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("read", [read_safetensors, read_header])
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_contradicts_itself(tmp_path, name, read):
    """Without it the bytes of one tensor are read as another's, or a huge size is allocated."""
    assert read(write(tmp_path / "good.safetensors", GOOD))[0].keys() == GOOD.keys()
    with pytest.raises(InputError, match="^.*bad.safetensors( .header.)?: .+$"):
        read(write(tmp_path / "bad.safetensors", HEADERS[name]))


def test_a_long_header(tmp_path):
    """Without it a file that promises a header of 10 GB is read into memory as one text."""
    file = tmp_path / "w.safetensors"
    file.write_bytes((10**10).to_bytes(8, "little") + b"{")
    with pytest.raises(
        InputError, match=f"truncated: 9 bytes present, its header alone promises {10**10 + 8}"
    ):
        read_safetensors(file)
    with open(file, "r+b") as sparse:
        sparse.truncate(10**10 + 99)
    with pytest.raises(InputError, match=f"its header has {10**10} bytes, expected at most 100000000"):
        read_safetensors(file)


def test_a_dtype_that_torch_cannot_convert(tmp_path):
    """float4 passes the library, and torch can do nothing with it."""
    fp4 = {"w": {"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}}
    with pytest.raises(InputError, match="w holds float4.*, expected float32, bfloat16 or float16"):
        read_safetensors(write(tmp_path / "w.safetensors", fp4))
