"""PEFT in and out (logits and bytes), what is refused and in which words, and the pool."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.files import InputError, write_json
from helpers_commands import ROOT
from helpers_models import load_mole, random_adapter, write_adapters, write_llama
from helpers_oracles import peft, transformers
from methods.batch import set_methods
from model import load_llama
from moe_lora import SampleGate, attach, detach, fixed_rows
from pool.adapters import REFUSED, linear_shapes, load_adapter, save_adapter
from pool.folder import PoolFolder, is_pool, open_pool, read_pool, write_pool
from pool.slots import Pool

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(331, (2, 13), generator=torch.Generator().manual_seed(3))
PREFIX = "base_model.model."
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="session")
def base(small_model):
    """transformers' and our own reading of one folder; deepcopy before changing either."""
    return transformers.LlamaForCausalLM.from_pretrained(small_model, dtype=torch.float32), load_llama(
        small_model
    )


@pytest.fixture
def model(base):
    return copy.deepcopy(base[1])


@pytest.fixture
def shapes(model):
    return linear_shapes(model)


def peft_adapter(base, folder, dtype=torch.float32, seed=0, **config):
    """An adapter that PEFT made and saved, A and B both random, and PEFT's logits with it."""
    config = {"r": 3, "lora_alpha": 7, "target_modules": SEVEN} | config
    model = copy.deepcopy(base).to(dtype)
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", **config), autocast_adapter_dtype=False
    )
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = (torch.randn(param.shape, generator=generator) * 0.1).to(dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
    with torch.no_grad():
        return model.eval()(IDS).logits


def peft_reads(base, folder, dtype=torch.float32):
    """PEFT's model with the adapter in `folder`, kept in its own dtype (PEFT's default is to upcast
    bfloat16)."""
    return peft.PeftModel.from_pretrained(
        copy.deepcopy(base).to(dtype), folder, autocast_adapter_dtype=False
    ).eval()


def logits_with(model, adapters, name, dtype=torch.float32):
    """Our logits with adapter `name` out of a pool of `adapters`; the model is given back as it
    was."""
    pool = Pool.of(adapters, linear_shapes(model), dtype)
    return logits_of_pool(model, pool, name)


def logits_of_pool(model, pool, name):
    gate = SampleGate()
    gate.set(*fixed_rows(pool, [{name: 1.0}] * len(IDS)))
    attach(model, pool, gate)
    with torch.no_grad():
        logits = model(IDS)
    detach(model)
    return logits


def close(a, b, limit=1e-5):
    """Largest difference, as a share of the largest logit."""
    return (a.float() - b.float()).abs().max() <= limit * b.float().abs().max()


# PEFT in and out ----------------------------------------------------------------------------------

CONFIGS = {
    "plain": {},
    "rslora": {"r": 5, "use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 2, UP: 7}},
    "alpha_pattern": {
        "alpha_pattern": {
            "proj": 5,
            "layers.2.self_attn.v_proj": 19,
            "v_proj": 2,
            "model.layers.0.mlp.up_proj": 31,
        }
    },
    "rank_and_alpha_rslora": {
        "use_rslora": True,
        "rank_pattern": {r"layers\.[01]\.mlp\.down_proj": 5, "o_proj": 2},
        "alpha_pattern": {"o_proj": 11, "layers.0.mlp.down_proj": 13},
    },
    "three_targets": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "layers": {"layers_to_transform": [0, 2]},
    "first_layer": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": ["layers"]},
    "two_layers_patterns": {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "layers_pattern_group": {"layers_to_transform": [1], "layers_pattern": "(h|layers)"},
    "whole_path_elsewhere": {"target_modules": ["q_proj", UP], "layers_to_transform": 2},
    "whole_path_excluded": {
        "target_modules": ["q_proj", UP, "model.layers.0.mlp.down_proj"],
        "exclude_modules": ["model.layers.0.mlp.down_proj"],
        "layers_to_transform": 2,
    },
    "exclude": {"exclude_modules": ["k_proj", "layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"]},
    "exclude_regex": {"exclude_modules": r".*layers\.[02]\.mlp.*"},
    "regex": {"target_modules": r".*layers\.[02]\..*(q|up|down)_proj"},
    "unsloth": {
        "target_modules": r"(?:.*?(?:vision|model).*?(?:layers).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|down_proj)))"
    },
    "one_module": {"target_modules": [UP]},
    "all_linear": {"target_modules": "all-linear"},
    "float_alpha": {"lora_alpha": 0.7},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_pefts(base, model, shapes, tmp_path, capsys, config):
    """A wrong scale, a pattern that matches another module or a module left out gives fluent, wrong
    answers: the adapter would seem to be a bad one. A decoy of larger rank in slot 0 shows that
    slots and ranks are kept apart."""
    want = peft_adapter(base[0], tmp_path / "mine", **config)
    adapter = load_adapter(tmp_path / "mine", shapes=shapes)
    decoy = random_adapter("decoy", shapes, r=11, seed=1)
    assert close(logits_with(model, [decoy, adapter], "mine"), want)
    with torch.no_grad():
        assert not close(base[1](IDS), want, 0.05)  # the adapter matters
    assert capsys.readouterr().err == ""  # a plain PEFT folder is no reason to warn


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_saves_comes_back_byte_equal(base, shapes, tmp_path, config):
    """An adapter that changes a little each time it passes through here has another hash, and its
    gates refuse it."""
    want = peft_adapter(base[0], tmp_path / "first", **config)
    adapter = load_adapter(tmp_path / "first", shapes=shapes)
    save_adapter(adapter, tmp_path / "again")
    first, again = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "again"))
    assert first.keys() == again.keys()
    assert all(first[key].numpy().tobytes() == again[key].numpy().tobytes() for key in first)
    with torch.no_grad():
        assert torch.equal(peft_reads(base[0], tmp_path / "again")(IDS).logits, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_we_save_comes_back_byte_equal_from_peft(base, model, shapes, tmp_path, dtype):
    """Adapters trained here are worth little if PEFT can't read them, or reads something else."""
    adapter = random_adapter(
        "ours", shapes, r=5, alpha=3.0, targets=["q_proj", "up_proj", "down_proj"], size=0.1
    )
    adapter.samples = ["a prompt", 'another\n"prompt"']
    for part in (adapter.A, adapter.B):
        part.update({path: y.to(dtype) for path, y in part.items()})
    save_adapter(adapter, tmp_path / "ours")
    in_peft = peft_reads(base[0], tmp_path / "ours", dtype)
    if dtype == torch.float32:
        with torch.no_grad():
            assert close(logits_with(model, [adapter], "ours"), in_peft(IDS).logits)
    in_peft.save_pretrained(tmp_path / "back", save_embedding_layers=False)
    back = load_adapter(tmp_path / "back", shapes=shapes)
    assert back.hash == adapter.hash  # over keys, dtypes, shapes, bytes and scales
    assert load_adapter(tmp_path / "ours").samples == adapter.samples


def test_bfloat16_equals_peft(base, model, shapes, tmp_path):
    """Like with like, base and adapter in bfloat16 on both sides: each Linear agrees to bfloat16's
    rounding, and through all layers, where roundings grow, we stay as near to the float32 answer as
    PEFT does. A product accumulated in bfloat16, or an adapter upcast on one side, doesn't."""
    want = peft_adapter(base[0], tmp_path / "low", torch.bfloat16)
    adapter = load_adapter(tmp_path / "low", shapes=shapes)
    assert {y.dtype for y in adapter.tensors().values()} == {torch.bfloat16}
    got = logits_with(model.bfloat16(), [adapter], "low", torch.bfloat16)
    exact = logits_with(copy.deepcopy(model).float(), [adapter], "low")
    assert got.dtype == want.dtype == torch.bfloat16
    assert (got - exact).norm() <= 1.2 * (want - exact).norm()
    pool, gate = Pool.of([adapter], shapes, torch.bfloat16), SampleGate()
    gate.set(*fixed_rows(pool, [{"low": 1.0}] * 2))
    in_peft = peft_reads(base[0], tmp_path / "low", torch.bfloat16)
    for path, linear in attach(model, pool, gate).items():
        x = torch.randn(2, 7, linear.A.shape[2], generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad():
            peers = in_peft.get_submodule(PREFIX + path)(x).float()
            assert (linear(x).float() - peers).norm() <= 1e-2 * peers.norm(), path


def test_logits_equal_pefts_by_the_public_way(base, small_model, tmp_path):
    """load_mole and set_methods are what generate.py calls: a name resolved to the neighbour's slot
    shows here."""
    want = {
        name: peft_adapter(base[0], tmp_path / name, seed=j, r=r)
        for j, (name, r) in enumerate({"one": 2, "two": 5}.items())
    }
    mole = load_mole(small_model, extra=[("zwei", tmp_path / "two"), ("eins", tmp_path / "one")])
    for name, peer in (("eins", "one"), ("zwei", "two")):
        set_methods(mole, [f"adapter:{name}"] * 2)
        with torch.no_grad():
            assert close(mole.model(IDS), want[peer])


def rekey(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix(PREFIX),
        lambda key: key.removeprefix(PREFIX).replace(".weight", ".my_task.weight"),
    ],
    ids=["default", "no_prefix", "both"],
)
def test_other_spellings_of_the_keys(shapes, tmp_path, change):
    """state_dict() dumps and other trainers' files spell the same tensors otherwise; read by one
    spelling alone they would be refused, or worse, hold nothing that matches."""
    adapter = random_adapter("a", shapes)
    save_adapter(adapter, tmp_path / "a")
    rekey(tmp_path / "a", change)
    assert load_adapter(tmp_path / "a", shapes=shapes).hash == adapter.hash


def test_sub_folder(shapes, tmp_path):
    """PEFT saves an adapter that isn't called 'default' into a sub-folder of that name."""
    adapter = random_adapter("a", shapes)
    save_adapter(adapter, tmp_path / "outer" / "my_task")
    assert load_adapter(tmp_path / "outer", shapes=shapes).hash == adapter.hash
    save_adapter(adapter, tmp_path / "outer" / "other")
    with pytest.raises(InputError, match="2 of its sub-folders"):
        load_adapter(tmp_path / "outer")
    with pytest.raises(InputError, match="no such adapter folder"):
        load_adapter(tmp_path / "nowhere")


# Replacing an adapter -----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_kill_while_an_adapter_is_replaced(shapes, tmp_path, monkeypatch, number):
    """New tensors under the earlier alpha load without a word and answer fluently and wrong. So what
    loads is the earlier adapter or the new one, whole."""
    folder = tmp_path / "a"
    old = random_adapter("a", shapes, r=3, alpha=7.0, seed=1)
    new = random_adapter("a", shapes, r=3, alpha=5.0, seed=2)
    old.samples, new.samples = ["an earlier prompt"], ["a prompt"]
    save_adapter(old, folder)
    replace, done = os.replace, []

    def dying_replace(source, target):
        done.append(target)
        if len(done) == number:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        with contextlib.suppress(Killed):
            save_adapter(new, folder)
    if number == 1:
        assert load_adapter(folder, shapes=shapes).hash == old.hash
    elif number == 4:
        assert len(done) == 3 and load_adapter(folder, shapes=shapes).hash == new.hash
    else:
        expected = r'adapter_config\.json: found .*"lora_alpha": 7\.0.* saved with .*"lora_alpha": 5\.0'
        for header in (False, True):  # a pool of many reads the headers first
            with pytest.raises(InputError, match=expected):
                load_adapter(folder, header=header)
    save_adapter(new, folder)
    assert load_adapter(folder, shapes=shapes).hash == new.hash
    assert load_adapter(folder).samples == new.samples


@pytest.mark.parametrize(
    "change",
    [
        {"r": 5},
        {"lora_alpha": 8},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 1}},
        {"alpha_pattern": {"proj": 1, "q_proj": 2}},
    ],
)
def test_each_field_that_gives_a_scale_goes_with_its_tensors(shapes, tmp_path, change):
    """A field that the check forgets is one under which half-replaced adapters load."""
    adapter = random_adapter("a", shapes, r=3, alpha=7.0)
    adapter.config["alpha_pattern"] = {"q_proj": 2, "proj": 1}
    save_adapter(adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(adapter.config | change))
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        load_adapter(tmp_path / "a", shapes=shapes)
    harmless = {"lora_dropout": 0.5, "base_model_name_or_path": "elsewhere", "rank_pattern": {}}
    file.write_text(json.dumps(adapter.config | harmless))
    assert load_adapter(tmp_path / "a", shapes=shapes).A.keys() == adapter.A.keys()


def test_pefts_own_config_may_be_edited(base, shapes, tmp_path):
    """PEFT's tensors say nothing of their config: many people set lora_alpha by hand, and PEFT reads
    what they set."""
    peft_adapter(base[0], tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 2.5}))
    adapter, peer = load_adapter(tmp_path / "a", shapes=shapes), peft_reads(base[0], tmp_path / "a")
    for path, scale in adapter.scale.items():
        assert scale == peer.get_submodule(PREFIX + path).scaling["default"]


def test_an_adapter_without_samples_takes_the_earlier_ones_away(shapes, tmp_path):
    """The new adapter would be found by the prompts of the one that it replaced."""
    adapter = random_adapter("a", shapes)
    adapter.samples = ["an earlier prompt"]
    save_adapter(adapter, tmp_path / "a")
    adapter.samples = []
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a").samples == []


# What is refused ----------------------------------------------------------------------------------


@pytest.fixture
def spoil(shapes, tmp_path):
    """spoil(config={field: value}, tensors=function): a good adapter folder with something changed."""
    folder = tmp_path / "bad"
    save_adapter(random_adapter("bad", shapes, r=3), folder)

    def spoil(config=None, tensors=None):
        file = folder / "adapter_config.json"
        changed = json.loads(file.read_text()) | (config or {})
        file.write_text(json.dumps(changed))
        if tensors:
            raw = load_file(folder / "adapter_model.safetensors")
            save_file(tensors(raw) or raw, folder / "adapter_model.safetensors")
        return folder

    return spoil


def assert_refuses(folder, shapes, *words):
    with pytest.raises(InputError) as refused:
        load_adapter(folder, shapes=shapes)
    message = str(refused.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert str(word) in message, (word, message)


# As PEFT writes each field where it is set.
VARIANTS = {
    "fan_in_fan_out": True, "lora_bias": True, "modules_to_save": ["lm_head"], "use_dora": True,
    "use_qalora": True, "use_bdlora": {"nblocks": 2}, "alora_invocation_tokens": [5, 7],
    "layer_replication": [[0, 2], [1, 3]], "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [3],
    "velora_config": {"num_groups": 2}, "monteclora_config": {"num_samples": 3}, "kasa_config": {"beta": 0.1},
    "lora_ga_config": {"direction": "ArB2r"}, "arrow_config": {"top_k": 2},
}  # fmt: skip


def test_every_refused_field_has_a_row_here():
    """A refusal added without a test may never fire."""
    assert VARIANTS.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_another_mathematics_is_refused_by_name(spoil, shapes, name):
    """Loaded as plain LoRA, such an adapter gives fluent, wrong answers."""
    assert_refuses(spoil({name: VARIANTS[name]}), shapes, name)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type", "IA3", "LORA"]),
        ({"peft_type": None}, ["peft_type", "LORA"]),
        ({"r": 5}, ["r is 5", "3"]),
        ({"r": 0}, ["r is 0", "from 1 to"]),
        ({"r": -3}, ["r is -3", "from 1 to"]),
        ({"r": "3"}, ["r is '3'", "number"]),
        ({"r": True}, ["r is True", "number"]),
        ({"r": None}, ["r is None", "number"]),
        ({"lora_alpha": "16"}, ["lora_alpha is '16'", "number"]),
        ({"lora_alpha": None}, ["lora_alpha is None", "number"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha", "nan"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha", "inf"]),
        ({"bias": "all"}, ["bias is 'all'", "none"]),
        ({"bias": "lora_only"}, ["bias is 'lora_only'", "none"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa", "convert"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["init_lora_weights", "pissa_niter_16", "convert"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights", "olora", "convert"]),
        ({"init_lora_weights": "OLoRA"}, ["init_lora_weights", "OLoRA", "convert"]),
        ({"init_lora_weights": "corda"}, ["init_lora_weights", "corda", "convert"]),
        ({"init_lora_weights": "loftq"}, ["init_lora_weights", "loftq", "convert"]),
        ({"init_lora_weights": "lora_ga"}, ["init_lora_weights", "lora_ga", "convert"]),
        ({"rank_pattern": {"q_proj": "3"}}, ["rank_pattern", "numbers"]),
        ({"rank_pattern": ["q_proj"]}, ["rank_pattern", "numbers"]),
        ({"rank_pattern": {"q_proj": 2}}, ["r is 2", "q_proj", "3"]),
        ({"rank_pattern": {"(q_proj": 3}}, ["rank_pattern", "(q_proj"]),
        ({"alpha_pattern": {"q_proj": None}}, ["alpha_pattern", "numbers"]),
        ({"alpha_pattern": {"[q_proj": 3}}, ["alpha_pattern", "[q_proj"]),
        ({"alpha_pattern": {"q_proj": float("nan")}}, ["alpha_pattern", "nan"]),
        ({"target_modules": None}, ["target_modules"]),
        ({"target_modules": 5}, ["target_modules", "5"]),
        ({"target_modules": "(q_proj"}, ["target_modules", "pattern"]),
        ({"target_modules": r"(?:.*.*)*="}, ["target_modules", "(?:.*.*)*=", "takes more than 2 seconds"]),
        ({"rank_pattern": {"(?i)q_proj": 3}}, ["rank_pattern", "(?i)q_proj", "flags"]),
        ({"alpha_pattern": {"a{99999999999}": 3}}, ["alpha_pattern", "a{99999999999}", "too large"]),
        ({"exclude_modules": "*"}, ["exclude_modules", "'*'", "nothing to repeat"]),
        ({"layers_to_transform": [1], "layers_pattern": ["h", "("]}, ["layers_pattern", "'('"]),
        ({"target_modules": ["q_proj"]}, ["18 modules", "target_modules", "have tensors"]),
        ({"target_modules": [p for p in SEVEN if p != "up_proj"]}, ["3 modules", "have tensors", "up_proj"]),
        ({"exclude_modules": ["q_proj"]}, ["3 modules", "have tensors", "q_proj"]),
        ({"exclude_modules": 5}, ["exclude_modules", "5"]),
        ({"layers_to_transform": [0, 1]}, ["7 modules", "have tensors", "layers.2"]),
        ({"layers_to_transform": "1"}, ["layers_to_transform", "1"]),
        ({"layers_to_transform": [1], "layers_pattern": 5}, ["layers_pattern", "5"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_config_that_does_not_fit_is_refused(spoil, shapes, fields, words):
    """Each of these, let through, gives a wrong scale, a module without its adapter or a traceback."""
    assert_refuses(spoil(fields), shapes, *words)


def edit(key, value):
    """Sets a tensor (a function of the old one) or drops it (None) under our usual prefix."""

    def change(raw):
        old = raw.pop(PREFIX + key, None)
        if value is not None:
            raw[PREFIX + key] = (value(old) if callable(value) else value).contiguous()

    return change


def each(change):
    """Changes every key."""
    return lambda raw: {change(key): tensor for key, tensor in raw.items()}


def with_nan(tensor):
    tensor[1, 2] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("tensors", "words"),
    {
        "no_lora_B": (edit(f"{UP}.lora_B.weight", None), [UP, "lora_B"]),
        "no_lora_A": (edit(f"{UP}.lora_A.weight", None), [UP, "lora_A"]),
        "extra_tensor": (edit("model.norm.weight", torch.ones(44)), ["model.norm.weight", "(44,)"]),
        "dora": (
            edit(f"{UP}.lora_magnitude_vector", torch.ones(67)), [f"{UP}.lora_magnitude_vector", "(67,)"],
        ),
        "bias": (edit(f"{UP}.lora_B.bias", torch.ones(67)), [f"{UP}.lora_B.bias"]),
        "unknown_suffix": (edit(f"{UP}.lora_C.weight", torch.ones(3, 3)), [f"{UP}.lora_C.weight", "(3, 3)"]),
        "embedding": (edit("model.embed_tokens.lora_embedding_A", torch.ones(3, 331)), ["lora_embedding_A"]),
        "three_axes": (edit(f"{UP}.lora_A.weight", lambda a: a[None]), [f"{UP}.lora_A.weight", "(1, 3, 44)"]),
        "integers": (edit(f"{UP}.lora_A.weight", lambda a: a.long()), [f"{UP}.lora_A.weight"]),
        "nan": (edit(f"{UP}.lora_B.weight", with_nan), [f"{UP}.lora_B.weight", "1 NaN", "201"]),
        "inf": (edit(f"{UP}.lora_A.weight", lambda a: a / 0), [f"{UP}.lora_A.weight", "132"]),
        "ranks_differ": (edit(f"{UP}.lora_B.weight", torch.ones(67, 5)), [UP, "rank 3", "5"]),
        "rank_zero": (
            lambda raw: {k: y[:0] if "A" in k else y[:, :0].clone() for k, y in raw.items()}, ["rank 0"],
        ),
        "two_adapters": (
            edit(f"{UP}.lora_A.other.weight", torch.ones(3, 44)), [f"{UP}.lora_A", "more than one"],
        ),
        "no_key_matches": (
            each(lambda key: key.replace("model.layers", "transformer.h")), ["21 of 21", "transformer.h.0"],
        ),
        "some_keys_match_nothing": (
            each(lambda key: key.replace("up_proj", "w3")), ["3 of 21", "mlp.w3", "up_proj"],
        ),
        "deeper": (each(lambda key: key.replace("layers.2", "layers.31")), ["layer 31", "3 layers"]),
        "wider": (edit(f"{UP}.lora_A.weight", torch.ones(3, 59)), [UP, "59 -> 67", "44 -> 67"]),
        "taller": (edit(f"{UP}.lora_B.weight", torch.ones(71, 3)), [UP, "44 -> 71", "44 -> 67"]),
        "named_without_tensors": (
            lambda raw: {key: y for key, y in raw.items() if "layers.1" not in key or "up_proj" not in key},
            ["1 modules", "named by target_modules", "no tensors", UP],
        ),
        "nothing": (lambda raw: {"x": torch.ones(1)}, ["tensor x"]),
    }.values(),
    ids=lambda value: "",
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(spoil, shapes, tensors, words):
    """An adapter that loads and silently does nothing, or does half of what it was trained for, is
    the commonest complaint about loaders: every key is accounted for, both ways, with both sides'
    numbers."""
    assert_refuses(spoil(tensors=tensors), shapes, *words)


def test_folders_without_usable_weights(spoil, shapes, tmp_path):
    """A pickle must never be opened unasked, and half a download must not end in a traceback."""
    folder = spoil()
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert_refuses(folder, shapes, file, len(whole) - 7, len(whole))
    save_file({}, file)
    assert_refuses(folder, shapes, file, "no LoRA tensors")
    file.unlink()
    assert_refuses(folder, shapes, file, "missing")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert_refuses(folder, shapes, "adapter_model.bin", "pickle", "safe_serialization=True")
    config.write_text('{"r": 3,\n oops}')
    assert_refuses(folder, shapes, config, "line 2")
    config.unlink()
    assert_refuses(folder, shapes, "no adapter_config.json")


def test_all_linear_is_every_linear_of_the_blocks(spoil, shapes):
    """PEFT writes the names out, other tools leave the shorthand: cross-checked as a regex it would
    match nothing."""
    assert len(load_adapter(spoil({"target_modules": "all-linear"}), shapes=shapes).A) == 21
    assert_refuses(spoil(tensors=edit(f"{UP}.lora_A.weight", torch.ones(2, 44))), shapes, "rank 2")


def test_unknown_fields_warn_by_name(spoil, shapes, capsys):
    """A newer PEFT's variant passes unseen otherwise; where it is off, as in every folder it saves,
    silence is right."""
    load_adapter(
        spoil({"use_hydra_lora": True, "use_future_lora": False, "future_config": None}), shapes=shapes
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: ")
    assert "use_hydra_lora" in lines[0] and "True" in lines[0]


@pytest.mark.parametrize(
    ("named", "warns"), [("meta/Llama-9-9B", True), ("somewhere/SMALL", False), (None, False)]
)
def test_adapter_of_another_base_warns(spoil, small_model, capsys, named, warns):
    """Another base of the same shape is the commonest mistake of all, and nothing else can see it."""
    load_mole(small_model, extra=[("mine", spoil({"base_model_name_or_path": named}))])
    err = capsys.readouterr().err
    assert bool(err) == warns
    assert not warns or ("mine" in err and named in err and str(small_model) in err)


# The pool -----------------------------------------------------------------------------------------


def test_pool_by_name(shapes):
    """Names, never positions: a slot that moves under a name serves one user another's adapter."""
    pool = Pool(shapes, 3, 7)
    adapters = {
        name: random_adapter(name, shapes, r, seed=r) for name, r in (("ant", 2), ("bee", 7), ("cat", 3))
    }
    for adapter in adapters.values():
        pool.add(adapter)
    assert pool.names == ["ant", "bee", "cat"]
    slots = {name: pool.slot(name) for name in pool.names}
    assert sorted(slots.values()) == [0, 1, 2]
    pool.remove("bee")
    assert pool.names == ["ant", "cat"]
    assert {name: pool.slot(name) for name in pool.names} == {"ant": slots["ant"], "cat": slots["cat"]}
    with pytest.raises(InputError, match="'bee'"):
        pool.slot("bee")
    pool.add(adapters["bee"])
    assert pool.slot("bee") == slots["bee"] and pool.capacity == 3
    for name, adapter in adapters.items():
        assert pool.members[name].hash == adapter.hash == pool.adapter(name).hash


def test_pool_pads_with_zeros(shapes):
    """What lies beyond an adapter's own rank and modules must be exactly zero: anything else is
    added to its answer."""
    small = random_adapter("small", shapes, 2, targets=["q_proj", "down_proj"])
    pool = Pool.of([random_adapter("large", shapes, 7, seed=1), small], shapes)
    assert pool.rank == 7 and pool.capacity == 2
    slot = pool.slot("small")
    for path in shapes:
        A, B, scale = pool.A[path][slot], pool.B[path][slot], pool.scale[path][slot]
        if path in small.A:
            assert torch.equal(A[:2], small.A[path]) and torch.equal(B[:, :2], small.B[path]) and scale == 3.5
            assert not A[2:].any() and not B[:, 2:].any()
        else:
            assert not A.any() and not B.any() and scale == 0


def test_pool_covers_only_the_linears_that_are_used(shapes):
    """A Linear without any adapter would be wrapped for nothing: slower, and a row in every routing
    trace."""
    pool = Pool.of(
        [random_adapter("a", shapes, targets=["q_proj"]), random_adapter("b", shapes, targets=["up_proj"])],
        shapes,
    )
    assert list(pool.A) == [path for path in shapes if path.endswith(("q_proj", "up_proj"))]
    c = random_adapter("c", shapes, targets=["k_proj"])
    slot = pool.add(c)  # one on other Linears joins all the same
    assert {path for path in pool.A if pool.A[path][slot].any()} == set(c.A) and len(pool.A) == 3 * 3
    assert not any(pool.A[path][:slot].any() for path in c.A) and pool.adapter("c").hash == c.hash


def test_the_same_name_twice(shapes, model, small_model, tmp_path):
    """The second would hide the first: the user must learn which two folders clash."""
    first, second = write_adapters(tmp_path, model, ["first", "second"]).values()
    pool = Pool.of([load_adapter(first, "mine", shapes)], shapes)
    with pytest.raises(InputError) as refused:
        pool.add(load_adapter(second, "mine", shapes))
    assert all(str(word) in str(refused.value) for word in ("'mine'", first, second))
    with pytest.raises(InputError) as refused:
        load_mole(small_model, extra=[("mine", first), ("mine", second)])
    assert all(str(word) in str(refused.value) for word in ("'mine'", first, second))


@pytest.mark.parametrize("call", ["slot", "adapter", "remove", "fixed_rows"])
def test_unknown_name_gives_the_nearest(shapes, call):
    """A typo in a name among 28 is found by being shown the right one, not by a KeyError."""
    pool = Pool.of(
        [random_adapter(name, shapes, seed=j) for j, name in enumerate(("plural", "reverse"))], shapes
    )
    with pytest.raises(InputError, match="'revers'.*reverse"):
        fixed_rows(pool, [{"revers": 1.0}]) if call == "fixed_rows" else getattr(pool, call)("revers")
    assert pool.names == ["plural", "reverse"]


def test_growth_reaches_whoever_holds_the_stacks(shapes, model):
    """The Linears hold the pool's tensors: grown into new ones, they would go on with the old pool
    and the new adapter would silently do nothing."""
    one, two = random_adapter("one", shapes, 2), random_adapter("two", shapes, 7, seed=1)
    three = random_adapter("three", shapes, 3, targets=["o_proj"], seed=2)
    want = {a.name: logits_with(model, [a], a.name) for a in (one, two, three)}
    pool, gate = Pool.of([one], shapes), SampleGate()
    linears = attach(model, pool, gate)
    pool.add(two)
    pool.add(three)
    assert pool.capacity >= 3 and pool.rank == 7
    for path, linear in linears.items():
        assert linear.A is pool.A[path] and len(linear.A) == pool.capacity
    for name, logits in want.items():
        gate.set(*fixed_rows(pool, [{name: 1.0}] * 2))
        with torch.no_grad():
            assert close(model(IDS), logits, 1e-5), name
        assert pool.adapter(name).hash == pool.members[name].hash


def test_a_slot_used_again_keeps_nothing(shapes, model):
    """Left-over rows of a removed adapter of larger rank or more modules would be added to its
    successor's answers."""
    large = random_adapter("large", shapes, 7)
    small = random_adapter("small", shapes, 2, targets=["q_proj"], seed=1)
    other = random_adapter("other", shapes, 3, seed=2)
    pool = Pool.of([other, large], shapes)
    pool.remove("large")
    assert not any(stack[path][1].any() for stack in (pool.A, pool.B, pool.scale) for path in shapes)
    pool.add(small)
    assert pool.slot("small") == 1
    fresh = Pool.of([other, small], shapes)
    for name in ("small", "other"):
        assert close(logits_of_pool(model, pool, name), logits_of_pool(model, fresh, name), 1e-5)


def test_order_of_the_pool_changes_nothing(shapes, model):
    """Adapter identity by position was a fault of the released code: the folder listing decided who
    answers."""
    adapters = [random_adapter(name, shapes, r, seed=r) for name, r in (("ant", 2), ("bee", 5), ("cat", 3))]
    for name in ("ant", "bee", "cat"):
        assert close(logits_with(model, adapters, name), logits_with(model, adapters[::-1], name), 1e-5)


def test_the_pool_gives_back_what_it_got(base, shapes, tmp_path):
    """Trained adapters are saved through adapter(name): at the pool's rank, or with a neighbour's
    rows, PEFT refuses them."""
    peft_adapter(base[0], tmp_path / "mixed", r=2, **CONFIGS["rank_pattern"])
    mixed = load_adapter(tmp_path / "mixed", shapes=shapes)
    pool = Pool.of([random_adapter("large", shapes, 11, seed=1), mixed], shapes)
    back = pool.adapter("mixed")
    assert back.hash == mixed.hash and back.config == mixed.config
    assert {key: y.numpy().tobytes() for key, y in back.tensors().items()} == {
        key: y.numpy().tobytes() for key, y in mixed.tensors().items()
    }
    next(iter(back.A.values())).zero_()
    assert pool.adapter("mixed").hash == mixed.hash  # a copy: editing it doesn't edit the pool


def test_hash_sees_everything_but_the_order(shapes):
    """Gates are bound to hashes: one that misses a change runs gates on an adapter they weren't
    trained with, one that depends on the order of keys refuses the right one."""
    adapter = random_adapter("a", shapes)

    def changed(change):
        other = copy.deepcopy(adapter)
        change(other)
        return other.hash

    def backwards(other):
        for part in ("A", "B", "scale"):
            setattr(other, part, dict(reversed(getattr(other, part).items())))

    def flip_one_bit(other):
        other.B[UP].view(torch.int32)[66, 2] ^= 1

    def move_between_modules(other):
        q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
        other.A[q], other.A[k] = other.A[k], other.A[q]

    same = [
        changed(backwards),
        changed(lambda a: a.samples.append("x")),
        changed(lambda a: setattr(a, "name", "b")),
    ]
    assert set(same) == {adapter.hash}
    different = [
        changed(flip_one_bit),
        changed(lambda a: a.scale.update({UP: a.scale[UP] * (1 + 1e-15)})),
        changed(lambda a: a.A.update({UP: a.A[UP].view(torch.int32).view(44, 3).view(torch.float32)})),
        changed(lambda a: a.A.update({UP: a.A[UP].view(torch.int32)})),
        changed(lambda a: (a.A.pop(UP), a.B.pop(UP), a.scale.pop(UP))),
        changed(move_between_modules),
    ]
    assert len({adapter.hash, *different}) == 7


# Pool folders -------------------------------------------------------------------------------------


def test_pool_folder_round_trip(model, tmp_path):
    """The template and the base travel with the pool: lost, its adapters see prompts of another
    form."""
    folders = write_adapters(tmp_path / "adapters", model, ["ant", "bee"])
    write_pool(PoolFolder(tmp_path, folders, "0123", "Q: {prompt}\nA:"))
    assert read_pool(tmp_path) == PoolFolder(tmp_path, folders, "0123", "Q: {prompt}\nA:")
    assert is_pool(tmp_path) and not is_pool(tmp_path / "adapters" / "ant")


def test_a_pool_and_adapters_named_besides(model, tmp_path):
    """Trainers and commands take both: an adapter that hides another of its name, or a mistyped
    folder that becomes an empty pool, would be trained on or answered from in silence."""
    folders = write_adapters(tmp_path / "pool" / "adapters", model, ["ant", "bee"])
    write_pool(PoolFolder(tmp_path / "pool", folders, "0123", "Q: {prompt}"))
    cat = write_adapters(tmp_path, model, ["cat"])
    both = open_pool(tmp_path / "pool", cat.items())
    assert both == PoolFolder(tmp_path / "pool", folders | cat, "0123", "Q: {prompt}")
    write_pool(both)
    assert read_pool(tmp_path / "pool").adapters == folders, "pool.json lists what is in adapters/"
    new = open_pool(tmp_path / "new", cat.items())
    assert new == PoolFolder(tmp_path / "new", cat)
    with pytest.raises(InputError, match="'ant' twice: .*adapters/ant and .*cat"):
        open_pool(tmp_path / "pool", [("ant", cat["cat"])])
    with pytest.raises(InputError, match="no such pool folder"):
        open_pool(tmp_path / "new")


def test_a_folder_of_peft_folders_is_a_pool(model, tmp_path):
    """Most people have no pool.json, only folders that PEFT saved, and what is trained over them
    adds one that says how prompts are wrapped, but moves no folder."""
    folders = write_adapters(tmp_path, model, ["ant", "bee"])
    (tmp_path / "notes").mkdir()
    assert is_pool(tmp_path) and read_pool(tmp_path) == PoolFolder(tmp_path, folders)
    known = PoolFolder(tmp_path, folders, "0123", "chat")
    write_pool(known)
    assert read_pool(tmp_path) == known
    (tmp_path / "pool.json").unlink()
    for folder in folders.values():
        shutil.rmtree(folder)
    with pytest.raises(InputError, match="not a pool"):
        read_pool(tmp_path)
    with pytest.raises(InputError, match="no such pool folder"):
        read_pool(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({"adapters": ["../../secret"]}, "adapters"),
        ({"adapters": "ant"}, "adapters"),
        ({"adapters": [3]}, "adapters"),
        ({"adapters": ["ant", "bee", "ant"]}, "twice: 'ant'"),
        ({"adapters": ["ant"], "template": "no place for it"}, "template"),
        ({"adapters": ["ant"], "template": 3}, "template"),
    ],
)
def test_bad_pool_json(tmp_path, raw, word):
    """A name that leaves the folder reads other people's files; a template without the prompt
    answers nothing."""
    (tmp_path / "pool.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=f"pool.json.*{word}"):
        read_pool(tmp_path)


def test_pool_trained_on_another_base_warns(model, small_model, tmp_path, capsys):
    """Adapters of a base retrained under the same name load without an error and answer nonsense."""
    write_pool(
        PoolFolder(tmp_path, write_adapters(tmp_path / "adapters", model, ["ant"]), model.fingerprint())
    )
    load_mole(small_model, tmp_path)
    assert capsys.readouterr().err == ""
    other = write_llama(tmp_path / "other" / "small", seed=1)
    (other / "tokenizer.model").write_bytes((small_model / "tokenizer.model").read_bytes())
    load_mole(other, tmp_path)
    assert "trained on base" in capsys.readouterr().err


MEMORY = """
import re, sys
from pathlib import Path
from pool.slots import Pool
SHAPES = {f"layers.{j}.q_proj": (1021, 1031) for j in range(13)}
folders = {path.name: path for path in Path(sys.argv[1]).iterdir()}
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
Pool.load(dict(list(folders.items())[:2]), SHAPES)  # what loading the first needs besides
before = peak()
pool = Pool.load(folders, SHAPES)
print((peak() - before) / sum(y.nbytes for stacks in (pool.A, pool.B) for y in stacks.values()))
"""


def test_a_pool_loads_in_its_own_size(tmp_path):
    """Read all at once and then stacked, adapters that fit into memory once would be needed twice."""
    shapes = {f"layers.{j}.q_proj": (1021, 1031) for j in range(13)}
    for index in range(23):
        save_adapter(random_adapter(f"a{index}", shapes, 37, seed=index), tmp_path / f"a{index}")
    line = [sys.executable, "-c", MEMORY, tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert 0.8 < float(done.stdout) < 1.1, (done.stdout, done.stderr)


def test_hidden_folders_are_no_adapters(tmp_path):
    """Without it what a tool or a person put aside in .old or .trash is an adapter, or refuses the pool."""
    for name in ("one", ".old"):
        write_json(tmp_path / name / "adapter_config.json", {})
    assert list(read_pool(tmp_path).adapters) == ["one"]
