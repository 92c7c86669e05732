"""What is written comes back the same, whatever it is: JSON, lines, tensors, options, configs."""

import json
import typing
from dataclasses import MISSING, fields, replace
from importlib import import_module
from types import UnionType

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from common.files import InputError, read_json, read_jsonl, read_text, write_json, write_jsonl, write_text
from common.llama_folder import read_config
from common.options import check_bounds, parse_args
from common.tensors import read_header, read_metadata, read_safetensors, write_safetensors
from helpers_hypothesis import few
from helpers_oracles import LlamaForCausalLM, transformers
from model import load_llama
from train import COMMANDS, KINDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose files each example writes anew."""
    return tmp_path_factory.mktemp("trips")


# Text and JSON ------------------------------------------------------------------------------------

TEXT = st.text() | st.text('\n\r\t\x00\x1b\x85\u2028\u2029\ufeff"\\ {}日🎉', max_size=9)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | FLOATS | TEXT
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3))
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "more": VALUES}), max_size=5)


def same(found, value):
    """Whether two JSON values are equal down to the types of their numbers: 1 is not 1.0 or True."""
    return repr(found) == repr(value)


@few(100)
@given(TEXT, st.dictionaries(TEXT, VALUES, max_size=3), ROWS)
@example("\ufeff", {"\ufeff": -0.0}, [{"prompt": "\u2028 \x1c \x85 \r", "more": 2**70}])
def test_text_and_json(folder, text, value, rows):
    """Without it some prompt, sample or name changes on its way through a file: a line separator of
    Unicode that cuts a line of JSON in two, a byte order mark that goes, a 1.0 that becomes 1."""
    write_text(folder / "a.txt", "x" + text)  # what begins as a web page does is refused on purpose
    assert read_text(folder / "a.txt") == "x" + text
    write_json(folder / "a.json", value)
    assert same(read_json(folder / "a.json"), value)
    assert same(json.loads((folder / "a.json").read_bytes()), value)
    write_jsonl(folder / "a.jsonl", rows)
    assert same(read_jsonl(folder / "a.jsonl", ["prompt"]), rows)
    write_jsonl(folder / "b.jsonl", read_jsonl(folder / "a.jsonl", []))
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()


HALVES = st.characters(categories=["Cs"])  # of surrogate pairs: no UTF-8, though JSON has \ud800


@few(30)
@given(HALVES, TEXT, TEXT, st.lists(VALUES, max_size=2))
def test_what_is_no_text(folder, half, before, after, others):
    """Without it a name that a file holds as \\ud800 is a traceback where it is written again, or
    takes the earlier file with it."""
    bad = before + half + after
    for name, write, value in (
        ("a.txt", write_text, bad),
        ("a.json", write_json, [*others, {bad: 1}]),
        ("a.jsonl", write_jsonl, [*others, {"prompt": bad}]),
    ):
        (folder / name).write_text("earlier")
        with pytest.raises(InputError, match=f"{name}: character [0-9]+ is .* half a surrogate pair"):
            write(folder / name, value)
        assert (folder / name).read_text() == "earlier"


# Tensors ------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@st.composite
def tensors(draw):
    """A tensor of any dtype, of any shape with sizes 0, 1 and primes, contiguous or not."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensor = (torch.randn(shape, generator=generator) * 50).to(draw(st.sampled_from(DTYPES)))
    return tensor.mT if len(shape) > 1 and draw(st.booleans()) else tensor


def same_tensors(found, tensors):
    """Whether names, dtypes, shapes and bytes are equal."""
    if found.keys() != tensors.keys():
        return False
    for name, tensor in tensors.items():
        other = found[name]
        if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            return False
        bits = [y.contiguous().view(-1).view(torch.uint8) for y in (other, tensor)]
        if not torch.equal(*bits):
            return False
    return True


@few(120)
@given(
    st.dictionaries(TEXT.filter(lambda name: name != "__metadata__"), tensors(), max_size=4),
    st.dictionaries(TEXT, TEXT, max_size=4),
)
def test_tensors(folder, named, metadata):
    """Without it a name with a quote or an emoji in it, an empty tensor or a transposed one is
    written so that this reader or another library's can't read it, or the bytes differ from save to
    save."""
    file = folder / "a.safetensors"
    write_safetensors(file, named, metadata)
    found, about = read_safetensors(file)
    assert same_tensors(found, named) and same_tensors(load_file(file), named)
    assert about == read_metadata(file) == {"format": "pt"} | metadata
    shapes = {name: tensor.shape for name, tensor in read_header(file)[0].items()}
    assert shapes == {name: tensor.shape for name, tensor in named.items()}
    write_safetensors(folder / "b.safetensors", found, about)
    assert same_tensors(read_safetensors(folder / "b.safetensors")[0], named)
    write_safetensors(folder / "b.safetensors", named, dict(reversed(metadata.items())))
    assert file.read_bytes() == (folder / "b.safetensors").read_bytes()


# Options ------------------------------------------------------------------------------------------

BENCHES = ["LayerBench", "DecodeBench", "PrefillBench", "TrainBench", "MethodsBench", "SplitBench",
           "CacheBench"]  # fmt: skip
OPTIONS = [import_module(name).Options for name in ("generate", "eval")]
OPTIONS += [getattr(import_module("bench"), name) for name in BENCHES]
OPTIONS += [cls for cls, *_ in COMMANDS.values()]
OPTIONS += [method.Run for method in KINDS.values() if method.Run not in OPTIONS]
ARGUMENT = st.text() | st.text("-=, \n\t'\"\\$*%@日", max_size=7)  # of a command line


def values_of(hint):
    """Values of an option's type; None is an option that is not given."""
    kind = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if isinstance(kind, UnionType):
        return st.one_of(map(values_of, typing.get_args(kind)))
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return st.lists(ARGUMENT, min_size=1, max_size=3)
    numbers = {int: st.integers(0, 99) | st.integers(), float: st.floats(0, 1) | st.floats(-1e6, 1e6)}
    return (numbers | {bool: st.booleans(), str: ARGUMENT, type(None): st.none()})[kind]


def is_within(args, name, value):
    """Whether the bounds beside the option allow the value."""
    try:
        check_bounds(replace(args, **{name: value}))
    except InputError:
        return False
    return True


@st.composite
def options(draw):
    """(class, values of some of its options within their bounds, all of those that it needs)."""
    cls = draw(st.sampled_from(OPTIONS))
    hints = typing.get_type_hints(cls, include_extras=True)
    needed = [field.name for field in fields(cls) if field.default is field.default_factory is MISSING]
    usual = cls(**dict.fromkeys(needed, ""))
    given = {}
    for name in hints:
        if name in needed or draw(st.booleans()):
            values = values_of(hints[name]).filter(lambda value: is_within(usual, name, value))
            given[name] = draw(values)
    return cls, {name: value for name, value in given.items() if value is not None}


def command_line(values):
    """{field: value} -> the command line that says the same."""
    line = []
    for name, value in values.items():
        option = f"--{name.rstrip('_')}"
        if isinstance(value, bool):
            line.append(option if value else option.replace("--", "--no-", 1))
        else:
            several = value if isinstance(value, list) else [value]
            line += [f"{option}={one}" for one in several]
    return line


@few(100)
@given(options())
def test_options(asked):
    """Without it a prompt with a dash or a line break, a negative or tiny number, or an option of a
    name that begins another's reaches the program as something else than what was typed."""
    cls, values = asked
    args = cls(**values)
    assert parse_args(cls, command_line(values)) == args
    check_bounds(args)


# config.json --------------------------------------------------------------------------------------

STRETCH = st.sampled_from([1, 1.0, 1.7, 2, 3.3])
ROPES = {
    "default": {},
    "linear": {"factor": STRETCH},
    "dynamic": {"factor": STRETCH},
    "llama3": {
        "factor": STRETCH,
        "low_freq_factor": st.sampled_from([1, 1.3]),
        "high_freq_factor": st.sampled_from([4, 5.5]),
        "original_max_position_embeddings": st.sampled_from([5, 7]),
    },
}
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


@st.composite
def configs(draw):
    """(fields of transformers' LlamaConfig, RoPE fields, the layout that these are written in)."""
    key_heads = draw(st.sampled_from([1, 2, 3]))
    heads = key_heads * draw(st.sampled_from([1, 2, 3, 5]))
    head_dim = draw(st.sampled_from([None, 2, 6, 10]))
    sizes = {
        "vocab_size": draw(st.sampled_from([29, 53])),
        "hidden_size": heads * draw(st.sampled_from([4, 14])),  # transformers wants a multiple
        "intermediate_size": draw(st.sampled_from([1, 23, 31])),
        "num_hidden_layers": draw(st.sampled_from([1, 2, 3])),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([None, key_heads])),
        "max_position_embeddings": draw(st.sampled_from([11, 97])),
        "rms_norm_eps": draw(st.floats(1e-8, 0.5)),
    }
    if head_dim:
        sizes["head_dim"] = head_dim
    flags = {name: draw(st.booleans()) for name in FLAGS}
    index = st.integers(0, 28)
    ids = {"eos_token_id": draw(st.none() | index | st.lists(index, min_size=1, max_size=3))}
    kinds = ROPES.keys() - {"dynamic"} if head_dim == 2 else ROPES  # which divides by head_dim - 2
    kind = draw(st.sampled_from(sorted(kinds)))
    rope = {"rope_type": kind, "rope_theta": draw(st.floats(10, 1e7))}
    rope |= {name: draw(values) for name, values in ROPES[kind].items()}
    return sizes | flags | ids, rope, draw(st.sampled_from(["new", "rope_type", "type"]))


def write_rope(file, rope, layout):
    """Writes the RoPE fields as the layout has them: of transformers 5, or of 4 and before with
    `rope_type` or the older `type`."""
    raw = json.loads(file.read_text())
    assert raw.pop("rope_parameters").items() >= rope.items()
    if layout == "new":
        raw["rope_parameters"] = rope
    else:
        old = {layout if name == "rope_type" else name: value for name, value in rope.items()}
        raw["rope_theta"] = old.pop("rope_theta")
        raw["rope_scaling"] = None if rope["rope_type"] == "default" else old
    file.write_text(json.dumps(raw))


@few(60)
@given(configs(), st.integers(0, 999))
def test_configs(tmp_path_factory, drawn, seed):
    """Without it fields that are read right one at a time are wrong together, or in a form that
    transformers writes and no test here does: the folder is transformers' own."""
    sizes, rope, layout = drawn
    folder = tmp_path_factory.mktemp("config")
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope, bos_token_id=None, pad_token_id=None)
    theirs = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, param in theirs.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        param.data = 1 + 0.1 * noise if "norm" in name else noise * 0.15
    theirs.save_pretrained(folder)
    write_rope(folder / "config.json", rope, layout)

    eos = sizes["eos_token_id"]
    expected = {name: sizes[name] for name in sizes if name != "eos_token_id"} | {
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    }
    found = read_config(folder)
    assert found["rope"].items() >= rope.items()
    assert {name: value for name, value in found.items() if name != "rope"} == expected

    ids = torch.randint(0, sizes["vocab_size"], (2, 13), generator=generator)
    again = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_llama(folder)
    with torch.no_grad():
        for other in (theirs, again):
            torch.testing.assert_close(ours(ids), other(ids).logits, rtol=1e-5, atol=1e-5)
