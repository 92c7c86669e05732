"""An exported mixture is the mixture: in PEFT, in transformers, here, and against float64."""

import json
from pathlib import Path

import pytest
import torch

from common.files import InputError
from generate import load
from helpers_models import random_adapter, write_llama
from helpers_oracles import peft, peft_logits, transformers
from methods.batch import set_methods
from model import load_llama
from pool.adapters import linear_shapes, load_adapter, save_adapter
from pool.export import (
    cast_adapter,
    check_new_folder,
    deltas_of,
    merge_into_base,
    mixture_adapter,
    split_shards,
    truncate,
    write_model,
)
from pool.slots import Pool
from pool.stacks import common_base

IDS = torch.randint(331, (3, 11), generator=torch.Generator().manual_seed(3))
WEIGHTS = {"ant": 0.7, "bee": -0.5, "cat": 1.75}
MIX = "mix:ant=0.7,bee=-0.5,cat=1.75"
Q = "model.layers.1.self_attn.q_proj"
# Ranks, modules and kinds of scale differ; layer 2's o_proj has no adapter at all.
CONFIGS = {
    "ant": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "bee": {"r": 5, "lora_alpha": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "cat": {"r": 2, "lora_alpha": 11, "target_modules": r".*layers\.[01]\..*(q|o|up)_proj",
            "alpha_pattern": {"layers.1.self_attn.q_proj": 0.3, "o_proj": 13}},
}  # fmt: skip


def peft_adapter(base, folder, seed, config):
    """An adapter that PEFT made and saved, A and B both random."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory):
    """{name: PEFT folder} of three adapters that PEFT wrote."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: peft_adapter(small_model, root / name, seed, config)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def mole(small_model, folders):
    return load(small_model, adapters=folders)


def logits_of(mole, method):
    set_methods(mole, [method] * len(IDS))
    with torch.no_grad():
        return mole.model(IDS)


def close(a, b, limit=1e-5):
    """Largest difference, as a share of the largest value."""
    return (a - b).abs().max() <= limit * b.abs().max()


def dense(folders, weights):
    """{module path: sum_j w_j s_j B_j A_j} of the files' tensors, in float64."""
    total = {}
    for name, weight in weights.items():
        adapter = load_adapter(folders[name])
        for path, a in adapter.A.items():
            delta = weight * adapter.scale[path] * (adapter.B[path].double() @ a.double())
            total[path] = total.get(path, 0) + delta
    return total


# The adapter --------------------------------------------------------------------------------------


def test_the_exported_mix_in_peft_is_the_mix(small_model, mole, tmp_path):
    """Without it a scale counted twice, a weight on the wrong adapter or a rank that PEFT looks for
    elsewhere gives another model in the engine than the one that was tried here."""
    save_adapter(mixture_adapter(mole.pool, WEIGHTS, "all"), tmp_path / "all")
    want = logits_of(mole, MIX)
    assert close(peft_logits(small_model, IDS, tmp_path / "all"), want)
    assert not close(want, logits_of(mole, "base"), 1e-2)  # the mixture matters
    again = load(small_model, adapters={"all": tmp_path / "all"})
    assert close(logits_of(again, "adapter:all"), want)


def test_a_mix_holds_the_stored_factors(folders, mole):
    """Without it the export of a float32 adapter could hold what another dtype or a padded slot left
    of it. float32 allows one rounding of each entry of B."""
    mixed = mixture_adapter(mole.pool, WEIGHTS, "all")
    stored = {name: load_adapter(folders[name]) for name in WEIGHTS}
    assert {path: len(a) for path, a in mixed.A.items() if path in (Q, "model.layers.2.mlp.down_proj")} == {
        Q: 3 + 2 + 2,
        "model.layers.2.mlp.down_proj": 5,
    }
    assert torch.equal(mixed.A[Q], torch.cat([stored[name].A[Q] for name in WEIGHTS]))
    B = torch.cat([stored[n].B[Q].double() * (w * stored[n].scale[Q]) for n, w in WEIGHTS.items()], 1)
    assert torch.equal(mixed.B[Q], B.float())


def test_every_reader_finds_the_scale_1(mole):
    """Without it an engine that ignores rank_pattern and alpha_pattern (vLLM) scales some Linears
    wrongly, or reserves too small a rank."""
    config = mixture_adapter(mole.pool, WEIGHTS, "all").config
    assert config["lora_alpha"] == config["r"] == 3 + 5 + 2
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["rank_pattern"]["model.layers.2.self_attn.v_proj"] == 3
    alike = mixture_adapter(mole.pool, {"ant": 1.0}, "ant").config
    assert (alike["r"], "rank_pattern" in alike) == (3, False)


def test_the_base_is_named_where_the_adapters_agree(small_model, mole):
    """Without it an engine is told to load a base that one of the adapters was never trained on."""
    assert common_base(mole.pool, WEIGHTS) == str(small_model)
    shapes = linear_shapes(load_llama(small_model))
    stranger = random_adapter("dog", shapes)
    both = Pool.of([load_adapter(mole.pool.members["ant"].adapter.folder, "ant"), stranger], shapes)
    mixed = mixture_adapter(both, {"ant": 1.0, "dog": 1.0}, "both")
    assert mixed.config["base_model_name_or_path"] is None
    only = mixture_adapter(both, {"dog": 1.0}, "only")
    assert only.config["base_model_name_or_path"] == "small"


# Of a smaller rank --------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 5, 13])
def test_truncation_equals_the_dense_svd(folders, mole, r):
    """Without it what is kept is not the best of that rank, and the error that is printed is not the
    one that was made."""
    short, error, errors = truncate(mixture_adapter(mole.pool, WEIGHTS, "all"), r)
    got = {path: delta.double() for path, delta in deltas_of(short)}
    lost = 0.0
    whole = 0.0
    for path, D in dense(folders, WEIGHTS).items():
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        assert close(got[path], best, 1e-6)
        assert errors[path] == pytest.approx(float((D - best).norm() / D.norm()), rel=1e-5, abs=1e-7)
        lost += float((D - best).square().sum())
        whole += float(D.square().sum())
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-5, abs=1e-7)
    assert short.rank == min(r, 10)
    assert (error < 1e-6) == (r == 13)  # more than every rank


def test_a_truncation_of_nothing_has_no_error(mole):
    """Without it weights of 0 are a division by zero."""
    _, error, errors = truncate(mixture_adapter(mole.pool, dict.fromkeys(WEIGHTS, 0.0), "none"), 3)
    assert (error, set(errors.values())) == (0.0, {0.0})


def test_the_truncated_adapter_is_the_same_in_peft(small_model, mole, tmp_path):
    """Without it the ranks of a truncated adapter's config aren't those of its tensors."""
    short, _, _ = truncate(mixture_adapter(mole.pool, WEIGHTS, "short"), 4)
    save_adapter(short, tmp_path / "short")
    ours = load(small_model, adapters={"short": tmp_path / "short"})
    assert close(peft_logits(small_model, IDS, tmp_path / "short"), logits_of(ours, "adapter:short"))


def test_values_that_a_dtype_cannot_hold_are_refused(mole):
    """Without it an adapter with Inf in it is written, which nothing can load."""
    huge = mixture_adapter(mole.pool, {"ant": 1e7}, "huge")
    with pytest.raises(InputError, match=r"OUT: model\.layers.*lora_B.*float16"):
        cast_adapter(huge, torch.float16, "OUT")
    assert cast_adapter(huge, torch.bfloat16, "OUT").B[Q].dtype == torch.bfloat16


# Merged into the base -----------------------------------------------------------------------------


@pytest.fixture(params=["tied", "untied", "untied, config says tied"])
def base_folder(request, small_model, tmp_path):
    """A base with its head tied, with one of its own, and with one that its config doesn't know."""
    folder = tmp_path / "base"
    write_llama(folder, tie_word_embeddings=request.param == "tied")
    if "config" in request.param:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (folder / "tokenizer.model").write_bytes((small_model / "tokenizer.model").read_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": [2,  3]}')
    (folder / "notes.txt").write_text("not copied")
    return folder


def test_the_merged_base_is_base_and_mix(base_folder, folders, mole, tmp_path):
    """Without it the merged model could have lost its head, its tokenizer or the mixture, or hold one
    adapter twice; from a base in shards, too."""
    model = load_llama(base_folder)
    write_model(model, base_folder, tmp_path / "shards", 50_000)
    sharded = load_llama(tmp_path / "shards")
    for name, tensor in model.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor)
    merge_into_base(sharded, deltas_of(mixture_adapter(mole.pool, WEIGHTS, "all")), "OUT")
    write_model(sharded, tmp_path / "shards", tmp_path / "out", 70_001)
    want = logits_of(load(base_folder, adapters=folders), MIX)
    assert close(load_llama(tmp_path / "out")(IDS), want)
    assert close(peft_logits(tmp_path / "out", IDS), want)
    for name in ("config.json", "generation_config.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (base_folder / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == hasattr(model, "lm_head")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())


def test_a_bfloat16_base_is_rounded_once(mole, tmp_path):
    """Without it the sum is computed in bfloat16, or the merged base is twice as large as the base."""
    folder = write_llama(tmp_path / "base", dtype=torch.bfloat16, torch_dtype="bfloat16")
    model = load_llama(folder)
    W = model.get_submodule(Q).weight.clone()
    mixed = mixture_adapter(mole.pool, WEIGHTS, "all")
    merge_into_base(model, deltas_of(mixed), "OUT")
    write_model(model, folder, tmp_path / "out")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    got = theirs.get_submodule(Q).weight
    D = mixed.B[Q].double() @ mixed.A[Q].double()
    assert got.dtype == torch.bfloat16
    assert (got.double() - (W.double() + D)).abs().max() <= 2**-8 * (W.double() + D).abs().max()
    assert (got == (W.double() + D).to(torch.bfloat16)).float().mean() > 0.999  # float32 ties aside


def test_a_merged_weight_that_overflows_is_refused(mole, tmp_path):
    """Without it a float16 base is written with Inf in it."""
    model = load_llama(write_llama(tmp_path / "base", dtype=torch.float16))
    with pytest.raises(InputError, match=r"OUT: model\.layers.*weight.*float16"):
        merge_into_base(model, deltas_of(mixture_adapter(mole.pool, {"ant": 1e7}, "huge")), "OUT")


def test_shards_hold_all_tensors_and_no_more_than_they_may():
    """Without it a tensor gets lost between two files, or a file is too large for its store."""
    sizes = {"a": 5, "b": 7, "c": 31, "d": 2, "e": 3, "f": 8}
    tensors = {name: torch.zeros(n, dtype=torch.uint8) for name, n in sizes.items()}
    assert split_shards(tensors, 13) == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert split_shards(tensors, 56) == [list(sizes)]


def test_nothing_is_overwritten(tmp_path):
    """Without it an export destroys somebody's adapter."""
    check_new_folder(tmp_path / "new")
    check_new_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path, Path(tmp_path / "file")):
        with pytest.raises(InputError, match="expected a new folder"):
            check_new_folder(taken)
