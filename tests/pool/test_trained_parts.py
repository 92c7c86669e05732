"""What was trained and can't be right is refused when it is loaded, in one line."""

import json

import pytest
import torch

from common.files import InputError, read_json, write_json
from common.options import check_bounds
from common.tensors import read_safetensors, write_safetensors
from evaluation.choose import seen_tasks
from helpers_models import load_mole, random_adapter, write_adapters
from methods.batch import set_methods
from methods.ramole import RouterRun
from methods.session import add_adapter, retriever_of
from model import load_llama
from pool.adapters import linear_shapes, load_adapter, save_adapter
from pool.folder import check_pool_base, read_pool
from pool.retriever import save_retriever
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


# Metadata -----------------------------------------------------------------------------------------

GATE = "gates/meteora_top2.safetensors"
WRONG = {
    "k 0": (GATE, {"k": "0"}, "k is 0, expected a whole number from 1 to 3"),
    "k 99": (GATE, {"k": "99"}, "k is 99"),
    "k of another file's name": (GATE, {"k": "3"}, "k is 3, expected 2 as its name says.*--top_k 2"),
    "k a power": (GATE, {"k": "²"}, "k is '²'"),
    "gates of before": (GATE, {"base": ""}, "written before.*train.py gates --top_k 2"),
    "gates of another base": (GATE, {"base": "f" * 32}, "trained on base ffffffffffff.*gates --top_k 2"),
    "a name twice": (GATE, {"names": "ant\nbee\nant"}, "lists a name twice: 'ant'"),
    "k of 5,000 digits": (GATE, {"k": "1" * 5000}, "k is '111.*1', expected a whole number from 1 to 3"),
    "k of another script": (GATE, {"k": "٣"}, "k is '٣', expected a whole number from 1 to 3"),
    "divisor 1e40": (
        "router.safetensors",
        {"divisor": "1e40"},
        "divisor is 1e40, expected a number from 1e-06",
    ),
    "scaled 2": ("router.safetensors", {"scaled": "2"}, "scaled is 2, expected a whole number from 0 to 1"),
    "a hash too few": (GATE, {"hashes": "0"}, "3 names and 1 hashes"),
    "smear of another base": ("gates/smear.safetensors", {"base": "f" * 32}, "trained on .*--kind smear"),
    "router of before": ("router.safetensors", {"base": "f" * 64}, "written before.*train.py router"),
    "divisor nan": ("router.safetensors", {"divisor": "nan"}, "divisor is 'nan', expected a number"),
    "divisor 0": ("router.safetensors", {"divisor": "0.0"}, "divisor is 0.0"),
    "divisor -1": ("router.safetensors", {"divisor": "-1.0"}, "divisor is -1.0"),
    "divisor inf": ("router.safetensors", {"divisor": "inf"}, "divisor is 'inf'"),
    "divisor a word": ("router.safetensors", {"divisor": "one"}, "divisor is 'one'"),
    "prior inf": ("router.safetensors", {"prior": "inf"}, "prior is 'inf'"),
    "prior nan": ("router.safetensors", {"prior": "nan"}, "prior is 'nan'"),
    "prior -1": ("router.safetensors", {"prior": "-0.1"}, "prior is -0.1"),
    "prior tiny": ("router.safetensors", {"prior": "1e-300"}, "prior is 1e-300"),
    "scaled a word": ("router.safetensors", {"scaled": "True"}, "scaled is 'True'"),
}
RETRIEVER = {
    "depth -1": ({"depth": "-1"}, "depth is -1, expected a whole number from 1 to 3"),
    "depth 0": ({"depth": "0"}, "depth is 0"),
    "depth beyond": ({"depth": "4"}, "depth is 4"),
    "depth a fraction": ({"depth": "1.5"}, "depth is '1.5'"),
    "max_length too large": ({"max_length": "1" + "0" * 30}, "max_length is 1000.*, expected a whole number"),
    "max_length 0": ({"max_length": "0"}, "max_length is 0"),
    "a name twice": ({"names": "ant\nbee\nant"}, "lists a name twice: 'ant'"),
    "of before": ({"base": "f" * 64}, "written before.*train.py retriever"),
    "of another base": ({"base": "f" * 32}, "trained on base ffffffffffff.*train.py retriever"),
}


@pytest.mark.parametrize(("name", "wrong", "says"), WRONG.values(), ids=WRONG)
def test_metadata_that_cannot_be_right(small_model, parts, name, wrong, says):
    """A k of 0 chooses nothing, a divisor of nan makes every weight NaN; gates, router and retriever
    of another base answer noise."""
    method = PARTS[name][0] if name in PARTS else "meteora_top2"
    tensors, metadata = read_safetensors(parts / name)
    use(small_model, parts, method)
    write_safetensors(parts / name, tensors, metadata | wrong)
    with pytest.raises(InputError, match=f"{name}: .*{says}"):
        use(small_model, parts, method)


@pytest.mark.parametrize(("wrong", "says"), RETRIEVER.values(), ids=RETRIEVER)
def test_a_retrievers_metadata(small_model, parts, retriever_file, wrong, says):
    """A depth of -1 would take all blocks but one, without a word."""
    tensors, metadata = read_safetensors(retriever_file)
    write_safetensors(retriever_file, tensors, metadata | wrong)
    with pytest.raises(InputError, match=f"retriever.safetensors: .*{says}"):
        retriever_of(load_mole(small_model, parts))


@pytest.mark.parametrize(
    "projection", [torch.zeros(0, 44), torch.zeros(44), torch.zeros(3, 2), torch.tensor(1.0)]
)
def test_a_projection_of_another_shape(small_model, parts, retriever_file, projection):
    """Without rows all scores are 0, and whichever adapters come first are retrieved."""
    tensors, metadata = read_safetensors(retriever_file)
    write_safetensors(retriever_file, tensors | {"encoder.projection": projection}, metadata)
    with pytest.raises(InputError, match=r"encoder.projection is \(.*expected \(d, 44\) with d above 0"):
        retriever_of(load_mole(small_model, parts))


def test_a_router_of_scalars(small_model, parts):
    """A shape of nothing is a wrong shape, not an IndexError."""
    tensors, metadata = read_safetensors(parts / "router.safetensors")
    bad = {f"{Q0}.router_A.weight": torch.tensor(1.0)}
    write_safetensors(parts / "router.safetensors", tensors | bad, metadata)
    with pytest.raises(InputError, match=rf"{Q0}: expected router_A .* found \[\(\)"):
        use(small_model, parts, "ramole")


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"fox": {"ant": float("nan")}}, "fox: the weight of ant is nan"),
        ({"fox": {"ant": float("-inf")}}, "fox: the weight of ant is -inf"),
        ({"fox": {"ant": 10**400}}, "fox: the weight of ant is 1000"),
        ({"fox": {"ant": "1"}}, "fox: the weight of ant is '1'"),
        ({"fox": {"ant": None}}, "fox: the weight of ant is None, expected a number that float32 can hold"),
        ({"fox": {"ant": True}}, "fox: the weight of ant is True"),
        ({"fox": {"eel": 1.0}}, "fox: expected a weight for some of its adapters"),
        ({"fox": [1.0]}, "weights is .*expected an object of objects"),
        ([1.0], "weights is .*, expected an object of objects"),
        (None, "weights is .*, expected an object of objects"),
    ],
)
def test_lorahub_weights(small_model, parts, pool_with_every_part, weights, says):
    """A NaN weight makes every answer of its task <unk>."""
    (parts / "baselines").unlink()
    raw = read_json(pool_with_every_part / "baselines" / "lorahub.json")
    write_json(parts / "baselines" / "lorahub.json", raw | {"weights": weights})
    with pytest.raises(InputError, match=f"lorahub.json: {says}.*train.py lorahub searches again"):
        use(small_model, parts, "lorahub:fox")


@pytest.mark.parametrize("double", ['"ant": 0.5', '"ant": null'])
def test_lorahub_weighs_an_adapter_twice(small_model, parts, pool_with_every_part, double):
    """Without it the last of the two weights counts, and nobody is told of the first."""
    (parts / "baselines").unlink()
    text = (pool_with_every_part / "baselines" / "lorahub.json").read_text()
    before, after = text.split('"weights"')
    (parts / "baselines").mkdir()
    file = parts / "baselines" / "lorahub.json"
    file.write_text(before + '"weights"' + after.replace('"ant":', f'{double}, "ant":', 1))
    with pytest.raises(InputError, match=f"^{file}: bad JSON: lists a name twice: 'ant'$"):
        use(small_model, parts, "lorahub:fox")


@pytest.mark.parametrize("name", ["router.safetensors", "retriever.safetensors"])
def test_a_task_that_was_seen_twice(small_model, parts, retriever_file, name):
    """Without it a list of tasks that was put together by hand, with one task for another, hides the
    wrong tasks from --unseen."""
    tensors, metadata = read_safetensors(parts / name)
    mole = load_mole(small_model, parts)
    write_safetensors(parts / name, tensors, metadata | {"tasks": "ant\nbee"})
    assert {"ant", "bee"} <= seen_tasks(mole)
    write_safetensors(parts / name, tensors, metadata | {"tasks": "ant\nbee\nant"})
    with pytest.raises(InputError, match=f"^{parts / name}: lists a name twice: 'ant'$"):
        seen_tasks(mole)


def test_a_pool_of_before(small_model, parts, capsys):
    """Its adapters may be right: loading says how to bind them, training refuses."""
    write_json(parts / "pool.json", read_json(parts / "pool.json") | {"base": "f" * 64})
    model = load_mole(small_model, parts).model
    assert f'write "base": "{model.fingerprint()}" there' in capsys.readouterr().err
    with pytest.raises(InputError, match="pool.json: written before.*train.py adapters"):
        check_pool_base(read_pool(parts), model)


@pytest.mark.parametrize("option", ["divisor", "prior"])
def test_a_router_is_not_trained_with_what_is_refused(option):
    """What train.py writes has to be read again."""
    with pytest.raises(InputError, match=f"--{option} is 1e-09, expected 0 or a number from 1e-06"):
        check_bounds(RouterRun(model="", **{option: 1e-9}))
