"""Any adapter, any names, any order: what is saved from a pool comes back as it was, here and in
PEFT."""

import copy
import math
import re

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from common.tensors import read_metadata
from common.tokenizer import Tokenizer
from helpers_hypothesis import few
from helpers_models import random_adapter
from helpers_oracles import LlamaForCausalLM, peft
from methods import METHODS
from methods.fixed import Mix
from methods.ramole import RouterLoRA, load_routers, save_routers
from model import load_llama
from moe_lora import MeteoraGate
from pool.adapters import Adapter, linear_shapes, load_adapter, peft_config, save_adapter
from pool.folder import PoolFolder, is_folder_name, read_pool, write_pool
from pool.gate_files import load_gates, save_gates
from pool.retriever import LlamaEncoder, Retriever, load_retriever, save_retriever
from pool.slots import Pool

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATHS = [f"model.layers.{j}.self_attn.{name}" for j in range(3) for name in SEVEN[:4]]
PATHS += [f"model.layers.{j}.mlp.{name}" for j in range(3) for name in SEVEN[4:]]
RANKS = st.sampled_from([1, 2, 3, 5, 7])
ALPHAS = st.sampled_from([0, 1, 7, -3]) | st.floats(-1e3, 1e3)
TEXT = st.text(max_size=9) | st.text('\n\r\x00\x1b\u2028\ufeff"\\{}ß🎉', max_size=5)
# Of adapters: anything that can be a folder's name and is shown as it is.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
LETTERS = st.characters(exclude_categories=HIDDEN, exclude_characters="/\\", codec="utf-8")
NAME = st.text(LETTERS | st.sampled_from(" =,:.+-@'\"*[]日🎉"), min_size=1, max_size=13).filter(
    is_folder_name
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose files each example writes anew."""
    return tmp_path_factory.mktemp("trips")


@pytest.fixture(scope="module")
def base(small_model):
    """transformers' reading of the small model and our own."""
    return LlamaForCausalLM.from_pretrained(small_model, dtype=torch.float32), load_llama(small_model)


@pytest.fixture(scope="module")
def shapes(base):
    return linear_shapes(base[1])


def noise(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found, expected):
    """Whether two dicts hold the same tensors, to the byte."""
    return found.keys() == expected.keys() and all(
        found[key].dtype == y.dtype and torch.equal(found[key], y) for key, y in expected.items()
    )


# Adapters -----------------------------------------------------------------------------------------


@st.composite
def adapters(draw, shapes):
    """An Adapter of any Linears, with any rank and alpha for each, as one list or one pattern."""
    paths = draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=7, unique=True))
    ranks = {path: draw(RANKS) for path in paths}
    alphas = {path: draw(ALPHAS) for path in paths}
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    root = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    some = draw(RANKS)
    alpha = draw(ALPHAS)
    config = peft_config(some, alpha, draw(st.floats(0, 0.9)), paths, draw(st.none() | TEXT))
    if draw(st.booleans()):
        config["target_modules"] = "|".join(map(re.escape, draw(st.permutations(paths))))
    config["use_rslora"] = root
    # A pattern may match a whole path or its end; what no pattern names has the config's own.
    key = (lambda path: re.escape(path)) if draw(st.booleans()) else (lambda path: path)
    config["rank_pattern"] = {key(path): r for path, r in ranks.items() if r != some}
    config["alpha_pattern"] = {key(path): a for path, a in alphas.items() if a != alpha}
    A = {}
    B = {}
    scale = {}
    for j, (path, r) in enumerate(ranks.items()):
        o, i = shapes[path]
        A[path] = noise(r, i, seed=seed + 2 * j, dtype=dtype)
        B[path] = noise(o, r, seed=seed + 2 * j + 1, dtype=dtype)
        scale[path] = alphas[path] / (math.sqrt(r) if root else r)
    return Adapter("ours", A, B, scale, config, draw(st.lists(TEXT, max_size=3)))


def in_peft(base, folder, dtype):
    """{module path: (A, B, scale)} as PEFT reads a folder."""
    model = copy.deepcopy(base).to(dtype)
    model = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return loras(model)


def loras(model):
    """{module path: (A, B, scale)} of a PEFT model."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            found[path] = (A, B, module.scaling["default"])
    return found


@few(25)
@given(data=st.data())
def test_any_adapter(base, shapes, folder, data):
    """Without it a rank, an alpha or a sample of some form is lost or another on its way through a
    folder, in this reader or in PEFT's: the adapter answers a little wrong, or its gates refuse it."""
    adapter = data.draw(adapters(shapes))
    save_adapter(adapter, folder / "ours")
    again = load_adapter(folder / "ours", shapes=shapes, quiet=True)
    assert same(again.A, adapter.A) and same(again.B, adapter.B)
    assert again.scale == adapter.scale and again.hash == adapter.hash
    assert again.config == adapter.config and again.samples == adapter.samples
    dtype = next(iter(adapter.A.values())).dtype
    theirs = in_peft(base[0], folder / "ours", dtype)
    assert theirs.keys() == adapter.A.keys()
    for path, (A, B, scale) in theirs.items():
        assert torch.equal(A, adapter.A[path]) and torch.equal(B, adapter.B[path])
        assert scale == adapter.scale[path]
    save_adapter(again, folder / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "ours" / name).read_bytes() == (folder / "again" / name).read_bytes()


SUFFIXES = [*SEVEN, "mlp.up_proj", "layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
REGEXES = [r".*layers\.[02]\..*", r"model\.layers\.1\.mlp\.(up|down)_proj", r".*\.(q|k)_proj|.*mlp.*"]
PATTERNS = [*SUFFIXES, r"layers\.[01]\.mlp\..*", r".*_proj", "proj", r"^model\.layers\.2\..*", r"(q|o)_proj"]


def patterns(values):
    """Sorted as PEFT writes them: another order gives other matches before it is saved than after."""
    drawn = st.dictionaries(st.sampled_from(PATTERNS), values, max_size=4)
    return drawn.map(lambda found: dict(sorted(found.items())))


@st.composite
def peft_configs(draw):
    """Any plain LoraConfig that names some of the Linears."""
    named = st.lists(st.sampled_from(SUFFIXES), min_size=1, max_size=4, unique=True)
    config = {
        "r": draw(RANKS),
        "lora_alpha": draw(ALPHAS),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(named | st.sampled_from([*REGEXES, "all-linear"])),
        "exclude_modules": draw(st.none() | named | st.sampled_from(REGEXES)),
        "rank_pattern": draw(patterns(RANKS)),
        "alpha_pattern": draw(patterns(ALPHAS)),
    }
    if isinstance(config["target_modules"], list) and draw(st.booleans()):
        layers = st.integers(0, 2)
        config["layers_to_transform"] = draw(layers | st.lists(layers, max_size=3, unique=True))
        if draw(st.booleans()):
            config["layers_pattern"] = draw(st.sampled_from(["layers", ["layers"], ["h", "layers"], []]))
    return config


@few(40)
@given(config=peft_configs(), seed=st.integers(0, 2**31))
def test_any_adapter_of_peft(base, shapes, folder, config, seed):
    """Without it patterns, exclusions and layers that are read right one at a time give another
    Linear, rank or scale together."""
    try:
        model = peft.LoraConfig(task_type="CAUSAL_LM", **config)
        model = peft.get_peft_model(copy.deepcopy(base[0]), model, autocast_adapter_dtype=False)
    except ValueError:  # nothing is left to adapt
        assume(False)
    for j, (name, param) in enumerate(model.named_parameters()):
        if "lora_" in name:
            param.data = noise(*param.shape, seed=seed + j)
    model.save_pretrained(folder / "theirs", save_embedding_layers=False)
    adapter = load_adapter(folder / "theirs", shapes=shapes, quiet=True)
    theirs = loras(model)
    assert adapter.A.keys() == theirs.keys()
    for path, (A, B, scale) in theirs.items():
        assert torch.equal(adapter.A[path], A) and torch.equal(adapter.B[path], B)
        assert adapter.scale[path] == scale


# Pool folders -------------------------------------------------------------------------------------

TEMPLATES = st.none() | st.just("chat") | st.tuples(TEXT, TEXT).map("{prompt}".join)
BASES = st.none() | st.text("0123456789abcdef", min_size=32, max_size=32)


@few(60)
@given(names=st.lists(NAME, max_size=5, unique=True), base=BASES, template=TEMPLATES, inside=st.booleans())
@example(names=["a ", " a", "a", "ß=🎉, x", "[*]"], base=None, template="{prompt}", inside=True)
@example(names=["a ", " a", "[a-z]*", "a:b"], base=None, template=None, inside=False)
def test_any_pool_folder(tmp_path_factory, names, base, template, inside):
    """Without it a name with a space, a dot or a bracket is another adapter, or none, when the pool
    is read again."""
    path = tmp_path_factory.mktemp("pool")
    folders = {name: (path / "adapters" if inside else path) / name for name in names}
    for name in folders:
        folders[name].mkdir(parents=True)
        (folders[name] / "adapter_config.json").write_text("{}")
    pool = PoolFolder(path, folders, base, template)
    write_pool(pool)
    assert read_pool(path) == pool
    before = (path / "pool.json").read_bytes()
    write_pool(read_pool(path))
    assert (path / "pool.json").read_bytes() == before


@few(100)
@given(weights=st.dictionaries(NAME, st.floats(-1e6, 1e6), min_size=1, max_size=4))
@example(weights={"a=b": 1.0, "ß 🎉": -0.5, "mix:x": 1e-5})
def test_any_name_in_a_method(weights):
    """Without it an adapter whose name has a '=' or a colon can't be asked for."""
    for name in weights:
        found = [kind.parse(f"adapter:{name}") for kind in METHODS]
        assert [method.mixture for method in found if method] == [{name: 1.0}]
    assume(all("," not in name and name == name.strip() for name in weights))  # what separates them
    text = ",".join(f"{name}={weight!r}" for name, weight in weights.items())
    assert Mix.parse(f"mix:{text}").mixture == weights


# Trained parts ------------------------------------------------------------------------------------

MANY = ["ant", "bee=2", "cat ß", "dog, too", "eel", "🎉"]
SOME = st.lists(st.sampled_from(MANY), min_size=1, unique=True)


@pytest.fixture(scope="module")
def many(shapes, tmp_path_factory):
    """{name: PEFT folder} of six small adapters of several ranks."""
    folders = {}
    for j, name in enumerate(MANY):
        folders[name] = tmp_path_factory.mktemp("many") / name
        adapter = random_adapter(name, shapes, (2, 3, 5, 1)[j % 4], seed=j, targets=["k_proj", "up_proj"])
        adapter.samples = [f"the {name}", "the quick fox"]
        save_adapter(adapter, folders[name])
    return folders


@few(30)
@given(data=st.data())
def test_gates_find_their_adapters(shapes, many, folder, data):
    """Without it the rows of a gate file are another adapter's in a pool of another order or size:
    every token asks its neighbour's adapter."""
    rows = data.draw(SOME)  # of the file, in its order
    first = [*rows, *data.draw(SOME.map(lambda names: [n for n in names if n not in rows]))]
    first = Pool.load({name: many[name] for name in data.draw(st.permutations(first))}, shapes)
    oracle = {}  # (path, name) -> the row that the gates have for the adapter
    gates = {}
    for j, (path, A) in enumerate(first.A.items()):
        weight = noise(first.capacity, A.shape[2], seed=j)
        oracle |= {(path, name): weight[first.slot(name)] for name in first.names}
        gates[path] = MeteoraGate(weight, 1, 1.0)
    k = data.draw(st.integers(1, len(rows)))
    file = folder / "gates.safetensors"
    save_gates(file, gates, first, k, rows, "f" * 32)

    second = [*rows, *data.draw(SOME.map(lambda names: [n for n in names if n not in rows]))]
    second = data.draw(st.permutations(second))
    resident = data.draw(st.just(0) | st.integers(len(rows), len(second) + 1))
    second = Pool.load({name: many[name] for name in second}, shapes, resident=resident)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    found = load_gates(file, second, "f" * 32, dtype=dtype)
    assert found.keys() == gates.keys() and int(read_metadata(file)["k"]) == k
    known = [slot in {second.members[name].slot for name in rows} for slot in range(second.capacity)]
    for path, gate in found.items():
        assert gate.k == k
        assert all(known) if gate.known is None else gate.known.tolist() == known
        for name in rows:
            assert torch.equal(gate.weight[second.members[name].slot], oracle[path, name].to(dtype))
    again = folder / "again.safetensors"
    save_gates(again, load_gates(file, second, "f" * 32), second, k, rows, "f" * 32)
    assert again.read_bytes() == file.read_bytes()


@few(20)
@given(data=st.data())
def test_routers_come_back_as_they_were(base, shapes, many, folder, data):
    """Without it a divisor or a temperature is rounded in the metadata, and a router weighs
    otherwise than it was trained to."""
    pool = Pool.load({name: many[name] for name in MANY[:2]}, shapes)
    positive = st.floats(1e-6, 1e6)
    divisor, prior = data.draw(positive), data.draw(st.just(0.0) | positive)
    scaled, r = data.draw(st.booleans()), data.draw(RANKS)
    routers = {}
    for j, path in enumerate(pool.A):
        o, i = shapes[path]
        routers[path] = RouterLoRA(noise(r, i, seed=j), noise(o, r, seed=-1 - j), divisor, scaled, prior)
    about = data.draw(st.dictionaries(st.sampled_from(["tasks", "note"]), TEXT))
    file = folder / "router.safetensors"
    save_routers(file, routers, base[1], about)
    again = load_routers(file, pool, base[1])
    for path, router in again.items():
        assert torch.equal(router.A, routers[path].A) and torch.equal(router.B, routers[path].B)
        assert (router.divisor, router.scaled, router.prior) == (divisor, scaled, prior)
    save_routers(folder / "again.safetensors", again, base[1], about)
    assert (folder / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def tokenizer(small_model):
    return Tokenizer(small_model)


@few(30)
@given(data=st.data())
def test_retrievers_come_back_as_they_were(base, tokenizer, folder, data):
    """Without it an adapter's vector is another's, or is computed anew at each start because its
    samples seem to have changed."""
    members = data.draw(st.dictionaries(NAME, st.lists(TEXT, min_size=1, max_size=3), max_size=4))
    depth, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 97))
    d, seed = data.draw(st.sampled_from([1, 3, 5])), data.draw(st.integers(0, 999))
    mean, projection = noise(44, seed=seed), noise(d, 44, seed=seed + 1)
    encoder = LlamaEncoder(base[1], tokenizer, depth, mean, projection, length)
    retriever = Retriever(encoder)
    retriever.keep(members)
    about = {"tasks": "\n".join(members)}
    file = folder / "retriever.safetensors"
    save_retriever(file, retriever, base[1], about)
    again, metadata = load_retriever(file, base[1], tokenizer)
    assert same(again.vectors, retriever.vectors) and again.digests == retriever.digests
    assert metadata["tasks"] == about["tasks"]
    again.embed.pooled = None  # nothing is to be embedded again
    again.keep(members)
    again.vectors = dict(reversed(again.vectors.items()))  # the order of joining changes no byte
    save_retriever(folder / "again.safetensors", again, base[1], about)
    assert (folder / "again.safetensors").read_bytes() == file.read_bytes()
