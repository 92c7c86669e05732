"""What was trained and can't be right is refused when it is loaded, in one line."""

import json

import pytest
import torch

from common.files import InputError, read_safetensors, write_safetensors
from helpers_models import random_adapter, write_adapters
from methods.batch import set_methods
from methods.session import add_adapter, load_mole, retriever_of
from model import load_llama
from pool.adapters import linear_shapes, load_adapter, save_adapter
from pool.slots import Pool

Q0 = "model.layers.0.self_attn.q_proj"

# Values in dtype -----------------------------------------------------------------------------------


def one_value(tensors, key, value):
    """`tensors` in float32, one value of `key` replaced."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors[key].view(-1)[1] = value
    return tensors


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    ("value", "dtype"), [(1e6, "float16"), (65520.0, "float16"), (-3.4e38, "bfloat16"), (3.4e38, "bfloat16")]
)
def test_an_adapter_that_the_models_dtype_cannot_hold(small_model, tmp_path, part, value, dtype):
    """Finite in its file, it is Inf in the model: without a check after the cast every answer is
    <unk>."""
    [folder] = write_adapters(tmp_path, load_llama(small_model), ["ant"]).values()
    file = folder / "adapter_model.safetensors"
    key = f"{Q0}.{part}"
    tensors = one_value(read_safetensors(file)[0], f"base_model.model.{key}.weight", value)
    write_safetensors(file, tensors)
    assert not torch.tensor(value).to(getattr(torch, dtype)).isfinite()
    with pytest.raises(InputError, match=f"{file}: {key} holds 1 NaN or Inf values of .* in {dtype}"):
        load_mole(small_model, extra=[("ant", folder)], dtype=dtype)
    if abs(value) < 1e19:  # with 3.4e38 in B no norm could square what comes out, in any dtype
        assert load_mole(small_model, extra=[("ant", folder)], dtype="float32").pool.names == ["ant"]


@pytest.mark.parametrize(
    ("alpha", "dtype"), [(1e38, "float32"), (1e38, "bfloat16"), (140_000, "float16"), (1e20, "float32")]
)
def test_a_scale_that_overflows(small_model, tmp_path, alpha, dtype):
    """lora_alpha 1e38 is finite, and so is scale * B; the norm that squares what comes out is not.
    In float16 a scale of 70,000 is Inf by itself."""
    folder = tmp_path / "ant"
    save_adapter(random_adapter("ant", linear_shapes(load_llama(small_model)), 2, alpha), folder)
    with pytest.raises(InputError, match=f"ant/adapter_model.*lora_B times its scale .* with {dtype}"):
        load_mole(small_model, extra=[("ant", folder)], dtype=dtype)


def test_a_scale_that_makes_B_overflow(small_model, tmp_path):
    """Each of 60,000 and 2 is a float16; their product is not."""
    adapter = random_adapter("ant", linear_shapes(load_llama(small_model)), 2, 4)
    adapter.B[Q0][1, 1] = 60_000
    save_adapter(adapter, tmp_path / "ant")
    with pytest.raises(InputError, match=f"{Q0}.lora_B times its scale 2 reaches 1.2e.05"):
        load_mole(small_model, extra=[("ant", tmp_path / "ant")], dtype="float16")
    assert load_mole(small_model, extra=[("ant", tmp_path / "ant")], dtype="bfloat16").pool.names == ["ant"]


@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
@pytest.mark.parametrize("value", ["1e39", "1" + "0" * 400, "-1e400", "NaN"])
def test_an_alpha_that_float32_cannot_hold(small_model, tmp_path, field, value):
    """The scale is a float32: 1e39 would be Inf there, an integer of 400 digits an OverflowError."""
    folder = tmp_path / "ant"
    save_adapter(random_adapter("ant", linear_shapes(load_llama(small_model)), 2), folder)
    file = folder / "adapter_config.json"
    bad = value if field == "lora_alpha" else f'{{"q_proj": {value}}}'
    raw = json.loads(file.read_text()) | {field: "HERE"}
    file.write_text(json.dumps(raw).replace('"HERE"', bad))
    with pytest.raises(InputError, match=f"adapter_config.json: {field} is .* that float32 can hold"):
        load_adapter(folder)


def test_a_refused_adapter_leaves_the_pool_as_it_was(small_model, tmp_path):
    """Half of it in a slot, or another adapter put out for it, would answer the next request."""
    model = load_llama(small_model)
    folders = write_adapters(tmp_path, model, ["ant", "bee"])
    mole = load_mole(small_model, extra=folders.items(), dtype="float16", resident=1)
    bad = random_adapter("cat", mole.shapes, 3)
    bad.B[Q0][0, 0] = 1e6
    save_adapter(bad, tmp_path / "cat")
    mole.pool.need(["ant"])
    held = {path: stack.clone() for path, stack in mole.pool.A.items()}
    with pytest.raises(InputError, match="cat/adapter_model.safetensors"):
        add_adapter(mole, "cat", tmp_path / "cat")
    save_adapter(random_adapter("bee", mole.shapes, 3, alpha=1e38), folders["bee"])
    with pytest.raises(InputError, match="bee/adapter_model.safetensors"):
        mole.pool.need(["bee"])
    assert mole.pool.names == ["ant", "bee"] and mole.pool.resident == ["ant"]
    assert all(torch.equal(stack, held[path]) for path, stack in mole.pool.A.items())


def test_merged_weights_that_overflow(small_model, tmp_path):
    """A derived adapter has no file, but it has a name."""
    shapes = linear_shapes(load_llama(small_model))
    adapter = random_adapter("lorahub:fox", shapes, 2)
    adapter.A[Q0][0, 0] = float("inf")
    with pytest.raises(InputError, match=f"adapter lorahub:fox: {Q0}.lora_A holds 1 NaN or Inf"):
        Pool.of([adapter], shapes)


PARTS = {
    "gates/meteora_top2.safetensors": ("meteora_top2", f"{Q0}.gate.weight"),
    "gates/smear.safetensors": ("smear", f"{Q0}.gate.weight"),
    "gates/loraflow.safetensors": ("loraflow", f"{Q0}.gate.bias"),
    "router.safetensors": ("ramole", f"{Q0}.router_B.weight"),
}


@pytest.fixture
def parts(pool_with_every_part, tmp_path):
    """A pool with every part, to break: small parts are copied, adapters linked."""
    pool = tmp_path / "pool"
    (pool / "gates").mkdir(parents=True)
    for name in ("adapters", "baselines"):
        (pool / name).symlink_to(pool_with_every_part / name)
    for file in ("pool.json", *PARTS):
        (pool / file).write_bytes((pool_with_every_part / file).read_bytes())
    return pool


def use(small_model, pool, method, dtype="float32"):
    """Sets a batch of `method` up, which reads its part."""
    mole = load_mole(small_model, pool, dtype=dtype)
    set_methods(mole, [method], retrieved=[[("ant", 0.9), ("bee", 0.1)]])
    return mole


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (3.4e38, "bfloat16")])
def test_a_part_that_the_models_dtype_cannot_hold(small_model, parts, name, value, dtype):
    """A gate of Inf chooses by NaN: any adapter, without a word."""
    method, key = PARTS[name]
    tensors, metadata = read_safetensors(parts / name)
    write_safetensors(parts / name, one_value(tensors, key, value), metadata)
    use(small_model, parts, method)
    with pytest.raises(InputError, match=f"{name}: {key} holds 1 NaN or Inf values of .* in {dtype}"):
        use(small_model, parts, method, dtype)


@pytest.mark.parametrize("name", PARTS)
def test_whole_numbers_are_no_part(small_model, parts, name):
    """Gates of int8 are somebody's quantised ones without their scales: cast, they are noise."""
    method, key = PARTS[name]
    tensors, metadata = read_safetensors(parts / name)
    write_safetensors(parts / name, tensors | {key: tensors[key].to(torch.int8)}, metadata)
    with pytest.raises(InputError, match=f"{name}: {key} holds int8, expected float32"):
        use(small_model, parts, method)


@pytest.fixture
def retriever_file(parts, small_model):
    """The pool's retriever.safetensors, untuned."""
    from pool.retriever import save_retriever

    mole = load_mole(small_model, parts)
    file = parts / "retriever.safetensors"
    save_retriever(file, retriever_of(mole), mole.model, {})
    return file


@pytest.mark.parametrize("key", ["encoder.mean", "encoder.projection", "adapters"])
@pytest.mark.parametrize(
    ("dtype", "says"), [("int64", "holds int64"), ("float64", "holds 1 NaN or Inf values of .* in float32")]
)
def test_a_retriever_of_other_numbers(small_model, parts, retriever_file, key, dtype, says):
    """1e300 is finite in the file and Inf where it is used."""
    tensors, metadata = read_safetensors(retriever_file)
    bad = tensors[key].to(getattr(torch, dtype))
    bad.view(-1)[0] = 1e300 if dtype == "float64" else 1
    write_safetensors(retriever_file, tensors | {key: bad}, metadata)
    with pytest.raises(InputError, match=f"retriever.safetensors: {key} {says}"):
        retriever_of(load_mole(small_model, parts))
