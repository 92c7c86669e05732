"""Reading a Llama folder: configs of another arithmetic, which file a tensor counts from, and which
head a tied model has."""

import json

import pytest
import torch
from safetensors.torch import save_model

from common.files import InputError, read_json, write_json
from common.llama_folder import read_config
from common.tensors import read_safetensors, write_safetensors
from helpers_models import write_llama
from model import load_llama

INDEX = "model.safetensors.index.json"
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def transformers_model(folder):
    from helpers_oracles import LlamaForCausalLM

    oracle, info = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return oracle.eval()


def assert_equals_transformers(folder):
    with torch.no_grad():
        want = transformers_model(folder)(IDS).logits
    torch.testing.assert_close(load_llama(folder)(IDS), want, rtol=1e-5, atol=1e-5)


def edit(folder, change):
    """`change` edits the dict of the folder's tensors in place."""
    tensors, _ = read_safetensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


# config.json -----------------------------------------------------------------------------------------

REFUSED = {
    "alibi": True,
    "attention_chunk_size": 8192,
    "attention_multiplier": 0.5,
    "attn_logit_softcapping": 50.0,
    "clip_qkv": 8.0,
    "dim_model_base": 256,
    "embedding_multiplier": 12.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "is_causal": False,
    "layer_norm_eps": 1e-3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "no_rope_layers": [1, 1, 0],
    "norm_type": "layer_norm",
    "num_local_experts": 8,
    "original_max_position_embeddings": 37,
    "partial_rotary_factor": 0.5,
    "position_embedding_type": "absolute",
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "query_pre_attn_scalar": 256,
    "residual_multiplier": 0.22,
    "rope_interleave": True,
    "rotary_dim": 2,
    "rotary_pct": 0.25,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "sliding_window": 96,
    "use_parallel_residual": True,
    "use_qk_norm": True,
}
NEUTRAL = {
    "attention_multiplier": 6**-0.5,
    "attn_logit_softcapping": None,
    "dim_model_base": 44,
    "embedding_multiplier": 1.0,
    "hidden_activation": "silu",
    "is_causal": True,
    "layer_norm_eps": 1e-5,
    "layer_types": ["full_attention"] * 3,
    "logits_scaling": 1,
    "no_rope_layers": [1, 1, 1],
    "norm_type": "rms_norm",
    "num_experts": 0,
    "partial_rotary_factor": 1.0,
    "query_pre_attn_scalar": 6,
    "sliding_window": 97,
    "use_qk_norm": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_arithmetic_is_refused_by_name(tmp_path, name):
    """Without it Granite's multipliers, Gemma's softcaps or a sliding window in a Llama's config
    are ignored: a model of the right shapes answers with other numbers."""
    with pytest.raises(InputError) as caught:
        write_llama(tmp_path / "m", **{name: REFUSED[name]})
    found = f"{tmp_path / 'm' / 'config.json'}: {name} is {REFUSED[name]!r}, which isn't implemented"
    assert str(caught.value).startswith(f"{found}: expected null")


def test_neutral_values_are_accepted(tmp_path):
    """Without it a config that names such a field only to say that it is off is refused."""
    folder = write_llama(tmp_path / "m", **NEUTRAL, rope_scaling={"type": "default", "mscale": None})
    want = load_llama(write_llama(tmp_path / "plain"))(IDS)
    assert torch.equal(load_llama(folder)(IDS), want)
    write_llama(tmp_path / "off", sliding_window=7, use_sliding_window=False)
    stretched = {"type": "linear", "factor": 2.0}
    write_llama(tmp_path / "long", sliding_window=194, rope_scaling=stretched)
    with pytest.raises(InputError, match="at least the context, 194"):
        write_llama(tmp_path / "short", sliding_window=193, rope_scaling=stretched)


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": None}, 10000.0),
        ({"rope_theta": 523.0, "rope_parameters": {"rope_theta": None}}, 523.0),
    ],
)
def test_a_theta_of_null_is_missing(tmp_path, fields, theta):
    """Without it a config that some tool wrote with all its fields is refused."""
    file = write_llama(tmp_path / "m") / "config.json"
    write_json(file, read_json(file) | fields)
    assert read_config(file.parent)["rope"]["rope_theta"] == theta


ROPES = {
    "a part of the head": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "another scaling's": ({"type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha is 1000.0"),
    "a layer type's": ({"full_attention": {"rope_theta": 523.0}}, "full_attention is {"),
    "shrunk": ({"type": "linear", "factor": 0.5}, "factor is 0.5, expected a number from 1"),
    "endless": ({"type": "dynamic", "factor": 1e308}, "factor is 1e+308, expected a number from 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_another_rope_is_refused_by_name(tmp_path, case, field):
    """Without it a field of RoPE that isn't read turns every position by another angle."""
    rope, said = ROPES[case]
    with pytest.raises(InputError) as caught:
        write_llama(tmp_path / "m", **{field: rope})
    assert said in str(caught.value) and str(caught.value).startswith(
        f"{tmp_path / 'm' / 'config.json'}: rope"
    )


LLAMA3 = {"rope_type": "llama3", "factor": 7.0, "original_max_position_embeddings": 37}


@pytest.mark.parametrize(("low", "high"), [(4.0, 1.0), (3.0, 3.0), (3, 3)])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_the_factors_of_llama3_in_their_order(tmp_path, field, low, high):
    """Without it the slow rotations are those that aren't stretched, where transformers stretches
    them; with equal factors 0 / 0 may make every answer NaN."""
    rope = LLAMA3 | {"low_freq_factor": low, "high_freq_factor": high}
    with pytest.raises(InputError) as caught:
        write_llama(tmp_path / "m", **{field: rope})
    where = f"{tmp_path / 'm' / 'config.json'}: rope 'llama3'"
    said = f"low_freq_factor is {low:g}, expected less than high_freq_factor {high:g}"
    assert str(caught.value) == f"{where}: {said}"


@pytest.mark.parametrize("sizes", [{"head_dim": 2}, {"head_dim": None, "hidden_size": 4}])
def test_dynamic_rope_needs_two_pairs(tmp_path, sizes):
    """Without it the first forward ends in a ZeroDivisionError: the exponent is d / (d - 2), whether
    config.json gives the d or it follows from the other sizes."""
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"type": "dynamic", "factor": 2.0}
    with pytest.raises(
        InputError, match="config.json: head_dim is 2, expected at least 4 with rope 'dynamic'"
    ):
        write_llama(tmp_path / "m", rope_scaling=rope, **sizes)
    load_llama(write_llama(tmp_path / "linear", rope_scaling=rope | {"type": "linear"}, **sizes))(IDS)


# The index ------------------------------------------------------------------------------------------


def halves(folder, strays=(), listed=None):
    """A Llama in two shards, and its tensors. Each of `strays` (part, {name: tensor}) is added to a
    shard without being listed; `listed` is merged into the weight_map."""
    tensors, _ = read_safetensors(write_llama(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: PARTS[j % 2] for j, name in enumerate(sorted(tensors))}
    for part in PARTS:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == part}
        for where, more in strays:
            held |= more if where == part else {}
        write_safetensors(folder / part, held)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | (listed or {})}))
    return tensors, weight_map


@pytest.mark.parametrize("wrong", ["of other values", "of another shape"])
def test_the_index_says_which_copy_counts(tmp_path, wrong):
    """Without it the last file's copy is the weight, whatever the index says: another model."""
    shape = (44,) if wrong == "of other values" else (45,)
    tensors, weight_map = halves(tmp_path / "clean")
    names = sorted(name for name in tensors if "norm" in name)
    assert {weight_map[name] for name in names} == set(PARTS)
    strays = []
    for name in names:
        strays.append((PARTS[1 - PARTS.index(weight_map[name])], {name: torch.full(shape, 7.0)}))
    strays.append((PARTS[0], {"a.leftover": torch.ones(3, dtype=torch.int8)}))
    halves(tmp_path / "strays", strays)
    want = load_llama(tmp_path / "clean")
    got = load_llama(tmp_path / "strays")
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    assert got.fingerprint() == want.fingerprint()


def test_what_the_index_promises_is_there(tmp_path):
    """Without it a tensor that no shard holds is a traceback, or one that the index leaves out
    counts from whichever file has it."""
    norm = "model.norm.weight"
    _, weight_map = halves(tmp_path / "a")
    other = PARTS[1 - PARTS.index(weight_map[norm])]
    halves(tmp_path / "b", listed={norm: other})
    with pytest.raises(InputError, match=f"{other}: no tensor {norm}, which the index says is here"):
        load_llama(tmp_path / "b")
    del weight_map[norm]
    (tmp_path / "a" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=f"a: tensor {norm} missing"):
        load_llama(tmp_path / "a")


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_stale_index_hides_no_whole_model(tmp_path, kept, capsys):
    """Without it a model that was merged into one file isn't found, or its old shards are read."""
    folder = tmp_path / "m"
    halves(folder)
    for part in PARTS[kept:]:
        (folder / part).unlink()
    whole = write_llama(tmp_path / "whole", seed=1) / "model.safetensors"
    (folder / "model.safetensors").write_bytes(whole.read_bytes())
    assert load_llama(folder).fingerprint() == load_llama(tmp_path / "whole").fingerprint()
    assert_equals_transformers(folder)
    assert f"warning: {folder / INDEX}: ignored" in capsys.readouterr().err


def test_a_whole_model_may_be_named_by_its_index(tmp_path, capsys):
    """Without it model.safetensors beside a second file, both listed, would be read alone."""
    folder = tmp_path / "m"
    tensors, weight_map = halves(folder)
    (folder / PARTS[0]).rename(folder / "model.safetensors")
    named = {PARTS[0]: "model.safetensors", PARTS[1]: PARTS[1]}
    weight_map = {name: named[part] for name, part in weight_map.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    got = load_llama(folder).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["../other/x.safetensors", "sub/../../x", "/etc/x", "..\\x", "C:\\x", "C:x"])
def test_shards_lie_in_the_folder(tmp_path, name):
    """Without it somebody's index has any file of this machine opened and its contents reported."""
    halves(tmp_path / "m", listed={"model.norm.weight": name})
    with pytest.raises(InputError) as caught:
        load_llama(tmp_path / "m")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'm' / INDEX}: weight_map names {name!r}, expected")


# Tied embeddings --------------------------------------------------------------------------------------


def test_a_stored_head_counts_though_the_config_ties_it(tmp_path):
    """Without it a head that was trained apart is dropped: other logits, and no word."""
    folder = write_llama(tmp_path / "m")
    tied = load_llama(folder)
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].flip(0)}))
    model = load_llama(folder)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.head_weight, tied.head_weight.flip(0))
    assert not model.lm_head.weight.requires_grad and not model.lm_head.training
    assert_equals_transformers(folder)


def test_an_equal_head_stays_tied(tmp_path):
    """Without it a model that stores both, as .bin files did, takes the memory of two."""
    folder = write_llama(tmp_path / "m")
    want = load_llama(folder)
    fingerprint = want.fingerprint()
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    model = load_llama(folder)
    assert model.config.tie_word_embeddings and model.state_dict().keys() == want.state_dict().keys()
    assert model.fingerprint() == fingerprint
    assert_equals_transformers(folder)


def test_the_head_alone_is_the_embedding(tmp_path):
    """Without it what safetensors' save_model writes of a tied model, lm_head alone, is refused."""
    folder = write_llama(tmp_path / "m")
    want = load_llama(folder)
    fingerprint = want.fingerprint()
    save_model(transformers_model(folder), str(folder / "model.safetensors"), metadata={"format": "pt"})
    tensors, _ = read_safetensors(folder / "model.safetensors")
    assert HEAD in tensors and EMBEDDING not in tensors
    model = load_llama(folder)
    assert model.config.tie_word_embeddings and torch.equal(model.head_weight, want.head_weight)
    assert model.fingerprint() == fingerprint
    assert_equals_transformers(folder)


def test_a_head_of_another_shape_is_refused(tmp_path):
    """Without it a tied model's head of another vocabulary is dropped, or fails in a comparison."""
    folder = write_llama(tmp_path / "m")
    edit(folder, lambda tensors: tensors.update({HEAD: torch.ones(347, 44)}))
    with pytest.raises(InputError, match=r"lm_head.weight is \(347, 44\), expected \(331, 44\)"):
        load_llama(folder)


def test_an_untied_model_needs_both(tmp_path):
    """Without it a checkpoint that lost one of the two gets the other's values."""
    for name in (HEAD, EMBEDDING):
        folder = write_llama(tmp_path / name, tie_word_embeddings=False)
        edit(folder, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(InputError, match=f"tensor {name} missing"):
            load_llama(folder)
