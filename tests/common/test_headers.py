"""Safetensors headers whose parts contradict each other: one line that names the file."""

import json
import re

import pytest
import torch

from common.files import InputError
from common.tensors import cast_finite, read_header, read_metadata, read_safetensors

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


TWICE = {
    "v": '{"v": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}, ',
    "names": '{"__metadata__": {"names": "ant", "names": "bee"}, ',
}


@pytest.mark.parametrize("name", TWICE)
def test_a_name_twice(tmp_path, name):
    """Without it the library keeps the last of them: a tensor of another shape, another adapter's row."""
    file = tmp_path / "w.safetensors"
    good = {"v": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    assert read_safetensors(write(file, good))[0]["v"].shape == (2, 3)
    text = (TWICE[name] + json.dumps(good)[1:]).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + DATA)
    for read in (read_safetensors, read_header, read_metadata):
        with pytest.raises(InputError, match=f"w.safetensors .header.: .*lists a name twice: '{name}'$"):
            read(file)


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
    """float4 passes the library, and torch can do nothing with it; float6 torch doesn't know."""
    said = {"F4": "w holds float4.*, expected float32, bfloat16 or float16", "F6_E2M3": "F6_E2M3"}
    said |= {"F6_E3M2": "F6_E3M2", "F5": "F5"}
    for dtype, words in said.items():
        bits = 6 if dtype.startswith("F6") else 4
        fp = {"w": {"dtype": dtype, "shape": [24 * 8 // bits], "data_offsets": [0, 24]}}
        with pytest.raises(InputError, match=f"w.safetensors: .*{words}"):
            read_safetensors(write(tmp_path / "w.safetensors", fp))


FLOAT8 = ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"]
WHOLE_NUMBERS = ["BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "C64"]


@pytest.mark.parametrize("dtype", [*FLOAT8, "F64", "F32", "F16", "BF16", *WHOLE_NUMBERS])
def test_every_other_dtype(tmp_path, dtype):
    """Without it a dtype that torch reads but can't compare, such as float8, is a traceback from the
    check for NaN; and whole or complex numbers become weights."""
    size = 1 if dtype in FLOAT8 or dtype == "BOOL" else int(re.search(r"\d+", dtype)[0]) // 8
    file = write(
        tmp_path / "w.safetensors",
        {"w": {"dtype": dtype, "shape": [24 // size], "data_offsets": [0, 24]}},
        DATA,
    )
    tensor = read_safetensors(file)[0]["w"]
    if dtype in WHOLE_NUMBERS:
        with pytest.raises(InputError, match=f"^{file}: w holds .*, expected float32, bfloat16 or float16$"):
            cast_finite(file, "w", tensor, torch.float32)
    else:
        assert cast_finite(file, "w", tensor, torch.float32).shape == (24 // size,)
