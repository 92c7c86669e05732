"""Llama against transformers from the same folder, the KV cache against no cache, and what loading
leaves behind."""

import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tensors import read_safetensors, write_safetensors
from generate import load, stream
from helpers_commands import ROOT
from helpers_models import write_llama
from model import load_llama
from pool.load import make_fast

LLAMA3 = {
    "factor": 7.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 37,
}

# None removes a field of conftest's SMALL. The thetas are no defaults: a reader that misses one
# gives other logits.
CASES = {
    "multi-head": {"num_key_value_heads": None, "head_dim": None, "num_attention_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "head_dim above h / heads": {
        "hidden_size": 66,
        "head_dim": 14,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True, "tie_word_embeddings": False},
    "eps": {"rms_norm_eps": 0.3},
    "default, old layout": {"rope_theta": 523.0},
    "default, no theta": {"rope_theta": None, "rope_scaling": None},
    "linear, type": {"rope_theta": 523.0, "rope_scaling": {"type": "linear", "factor": 2.3}},
    "linear, rope_type": {"rope_theta": 523.0, "rope_scaling": {"rope_type": "linear", "factor": 2.3}},
    "dynamic, type": {"max_position_embeddings": 13, "rope_scaling": {"type": "dynamic", "factor": 3.7}},
    "dynamic, rope_type": {
        "max_position_embeddings": 13,
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.7},
    },
    "dynamic, within": {
        "max_position_embeddings": 97,
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.7},
    },
    "llama3, old layout": {
        "head_dim": 10,
        "rope_theta": 523.0,
        "rope_scaling": {"rope_type": "llama3"} | LLAMA3,
    },
    "default, new layout": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 523.0},
    },
    "linear, new layout": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "linear", "factor": 2.3, "rope_theta": 523.0},
    },
    "dynamic, new layout": {
        "rope_theta": None,
        "max_position_embeddings": 13,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.7, "rope_theta": 523.0},
    },
    "llama3, new layout": {
        "rope_theta": None,
        "head_dim": 10,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 523.0} | LLAMA3,
    },
}


def llama_folder(folder, dtype=torch.float32, seed=0, **fields):
    """write_llama, but a field that is None is absent from config.json."""
    absent = {name for name, value in fields.items() if value is None}
    write_llama(folder, seed, dtype, **{k: v for k, v in fields.items() if (k, v) != ("rope_theta", None)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in absent}))
    return folder


def transformers_logits(folder, ids, dtype=torch.float32):
    from helpers_oracles import LlamaForCausalLM

    oracle, info = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info  # what it misses it would make up, what it doesn't know it would drop
    with torch.no_grad():
        return oracle.eval()(ids).logits


def random_ids(b, t, v=331, seed=0):
    return torch.randint(0, v, (b, t), generator=torch.Generator().manual_seed(seed))


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=["plain", "fast"])
def model(tmp_path_factory, request):
    """The small Llama, wider in its context than any test here goes; without fast/ the plain one
    twice."""
    model = load_llama(write_llama(tmp_path_factory.mktemp("llama") / "m"))
    return make_fast(model) if request.param == "fast" else model


# Against transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path, case):
    """A misread config field or a wrong axis gives fluent nonsense: no error says so, only the
    reference does."""
    folder = llama_folder(tmp_path / "m", **CASES[case])
    ids = random_ids(2, 29)
    close(load_llama(folder)(ids), transformers_logits(folder, ids))


@pytest.mark.parametrize("seed", range(7))
def test_random_configurations_equal_transformers(tmp_path, seed):
    """Fields that are right one at a time can be wrong together (a bias with grouped queries, say)."""
    r = random.Random(seed)
    key_heads = r.choice((1, 2, 3, 5))
    heads = key_heads * r.choice((1, 2, 3))
    rope = r.choice((None, {"factor": 3.1, "rope_type": "linear"}, {"factor": 1.9, "rope_type": "dynamic"}))
    fields = {
        "vocab_size": r.choice((53, 101, 331)),
        "hidden_size": heads
        * r.choice((7, 11, 13)),  # transformers wants a multiple even where head_dim is given
        "intermediate_size": r.choice((23, 59, 71)),
        "num_hidden_layers": r.choice((1, 2, 5)),
        "num_key_value_heads": key_heads,
        "num_attention_heads": heads,
        "head_dim": r.choice((4, 6, 10, 14)),
        "max_position_embeddings": r.choice((11, 97)),
        "rope_theta": r.choice((100.0, 10000.0, 500000.0)),
        "rope_scaling": rope,
        **{name: r.random() < 0.5 for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")},
    }
    folder = llama_folder(tmp_path / "m", seed=seed, **fields)
    ids = random_ids(3, 17, fields["vocab_size"], seed)
    want = transformers_logits(folder, ids)
    close(load_llama(folder)(ids), want)
    close(make_fast(load_llama(folder))(ids), want)


def test_bfloat16_equals_transformers(tmp_path):
    """Norms, rotary angles and softmax have to be float32 inside a bfloat16 model, as in
    transformers."""
    folder = llama_folder(tmp_path / "m", torch.bfloat16, head_dim=10, rope_theta=523.0)
    ids = random_ids(2, 31)
    ours, theirs = load_llama(folder)(ids), transformers_logits(folder, ids, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    whole = load_llama(folder, torch.float32)(ids)
    assert (ours - whole).abs().mean() < 1.05 * (theirs - whole).abs().mean()
    assert (ours.float() - theirs.float()).abs().max() < 1e-2 * theirs.float().abs().max()


BEYOND = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.3}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.7}},
    "dynamic, new layout": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 523.0},
    },
    "llama3": {"head_dim": 10, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
    "default": {},
}


@pytest.mark.parametrize("case", BEYOND)
@pytest.mark.parametrize("start", [5, 17])
def test_greedy_tokens_equal_transformers_beyond_the_trained_length(tmp_path, case, start):
    """Without it 'dynamic' never acts, or turns keys that it rotated before: the frequencies follow
    the length at each step, and what is cached stays. In a batch each row has its own length."""
    from helpers_oracles import LlamaForCausalLM

    folder = llama_folder(tmp_path / "m", max_position_embeddings=13, **BEYOND[case])
    steps = 29
    model = make_fast(load_llama(folder))
    rows = [random_ids(1, n, seed=n) for n in (start, start + 3, 2)]
    want = []
    for row in rows:  # each by an oracle of its own: it keeps the longest length that it saw
        oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        want.append(oracle.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :])
    counts = torch.tensor([row.shape[1] for row in rows])
    padded = torch.zeros(3, int(counts.max()), dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: ids.shape[1]] = ids[0]
    cache = model.new_cache(3, padded.shape[1] + steps)
    logits = model(padded, cache, counts)[torch.arange(3), counts - 1]
    got = [logits.argmax(-1)]
    while len(got) < steps:
        got.append(model(got[-1][:, None], cache)[:, 0].argmax(-1))
    assert torch.stack(got, 1).tolist() == torch.stack(want).tolist()


@pytest.mark.parametrize("case", ["dynamic", "linear"])
def test_packed_sequences_beyond_the_trained_length_equal_each_alone(tmp_path, case):
    """Without it a short sequence is trained with the frequencies of the longest beside it."""
    model = load_llama(llama_folder(tmp_path / "m", max_position_embeddings=13, **BEYOND[case]))
    rows = [random_ids(1, n, seed=n) for n in (7, 31, 19)]
    hidden = model.model(torch.cat(rows, 1), lengths=[7, 31, 19])
    close(hidden, torch.cat([model.model(row) for row in rows], 1))


def test_the_context_follows_the_rope(tmp_path):
    """Without it 'linear' and 'dynamic' end where their work begins, or 'llama3', whose config
    counts the stretched positions, is stretched twice."""
    for case, want in {"linear": 29, "dynamic": 48, "llama3": 13, "default": 13}.items():
        folder = llama_folder(tmp_path / case, max_position_embeddings=13, **BEYOND[case])
        assert load_llama(folder).config.context == want  # 13 * 2.3 = 29.9, 13 * 3.7 = 48.1


def test_rope_scaling_counts_before_rope_parameters(tmp_path):
    """Without it a config with both, of a model that was edited after it was saved, gets a mixture
    of the two that nobody wrote."""
    folder = llama_folder(
        tmp_path / "m",
        rope_scaling={"rope_type": "linear", "factor": 2.3},
        rope_parameters={"rope_type": "dynamic", "factor": 5.0, "rope_theta": 71.0},
    )
    ids = random_ids(2, 29)
    close(load_llama(folder)(ids), transformers_logits(folder, ids))


# Loading ------------------------------------------------------------------------------------------


def shard(folder, source, count=3):
    """The model of `source` again, its tensors dealt out to `count` files in turn."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors, _ = read_safetensors(source / "model.safetensors")
    files = [f"model-{j + 1:05d}-of-{count:05d}.safetensors" for j in range(count)]
    weight_map = {name: files[j % count] for j, name in enumerate(sorted(tensors))}
    for file in files:
        write_safetensors(folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def test_three_shards_equal_one_file(tmp_path):
    """Every larger model comes in shards: a file that is skipped, or read twice, is another model."""
    whole = llama_folder(tmp_path / "m", tie_word_embeddings=False)
    one, three = load_llama(whole).state_dict(), load_llama(shard(tmp_path / "parts", whole)).state_dict()
    assert one.keys() == three.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, three[name]), name


def test_fingerprint_is_of_the_weights(tmp_path):
    """It warns of adapters trained on another base: one that depends on how the files are cut warns
    of the same base."""
    first = load_llama(write_llama(tmp_path / "a"))
    assert load_llama(write_llama(tmp_path / "c", seed=1)).fingerprint() != first.fingerprint()
    assert load_llama(write_llama(tmp_path / "b")).fingerprint() == first.fingerprint()
    assert load_llama(shard(tmp_path / "parts", tmp_path / "a")).fingerprint() == first.fingerprint()


def test_loaded_model_is_whole_frozen_and_of_the_dtype_asked_for(tmp_path):
    """A tensor left on the meta device, or of another dtype than its neighbours, fails only when it
    is first used."""
    folder = llama_folder(tmp_path / "m", torch.bfloat16, tie_word_embeddings=False, attention_bias=True)
    for asked, got in (
        (None, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
    ):
        model = load_llama(folder, asked)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert {t.device.type for t in tensors.values()} == {"cpu"}
        assert {t.dtype for t in tensors.values()} == {got}
        assert not any(t.requires_grad for t in tensors.values())
        assert not any(module.training for module in model.modules())
    close(load_llama(folder, torch.float32)(random_ids(2, 7)), transformers_logits(folder, random_ids(2, 7)))


def test_what_follows_from_the_config_is_ignored_in_the_file(tmp_path):
    """Older checkpoints hold rotary_emb.inv_freq: refusing them would refuse Llama 2."""
    folder = llama_folder(tmp_path / "m")
    want = load_llama(folder)(random_ids(1, 5))
    tensors, _ = read_safetensors(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    write_safetensors(folder / "model.safetensors", tensors)
    close(load_llama(folder)(random_ids(1, 5)), want)


# The KV cache -------------------------------------------------------------------------------------


def test_cached_equals_uncached_for_every_split(model):
    """An off-by-one between cache, mask and rotary position shows only at some lengths: so all of
    them."""
    t = 13
    ids = random_ids(2, t)
    want = model(ids)
    for cut in range(1, t):
        cache = model.new_cache(2, t)
        got = torch.cat([model(ids[:, :cut], cache), model(ids[:, cut:], cache)], dim=1)
        close(got, want)
        assert cache.lengths.tolist() == [t, t]


@pytest.mark.parametrize("sizes", [[1] * 13, [5, 1, 1, 3, 2, 1], [2, 7, 4]])
def test_cached_equals_uncached_in_many_pieces(model, sizes):
    """Decoding is a prefill and then one token at a time; an error in the cache grows with every
    step."""
    ids = random_ids(3, 13, seed=1)
    cache = model.new_cache(3, 17)  # larger than needed: what lies behind the end must not be seen
    cache.k.fill_(9.0), cache.v.fill_(-9.0)
    close(torch.cat([model(part, cache) for part in ids.split(sizes, dim=1)], dim=1), model(ids))


def test_padded_rows_equal_each_row_alone(model):
    """Right-padded rows of different lengths: a row that sees its padding, or positions counted
    from the longest row, answers differently in a batch than alone."""
    first, second, steps = [3, 11, 7, 1], [5, 2, 1, 4], 5
    rows = random_ids(4, 32, seed=2)
    cache = model.new_cache(4, 32)
    at, got = torch.zeros(4, dtype=torch.int64), [[] for _ in rows]
    for counts in (first, second, *[[1] * 4] * steps):
        part = random_ids(4, max(counts), seed=3)  # padding is any token
        for row, n in enumerate(counts):
            part[row, :n] = rows[row, at[row] : at[row] + n]
        logits = model(part, cache, torch.tensor(counts))
        for row, n in enumerate(counts):
            got[row].append(logits[row, :n])
        at += torch.tensor(counts)
        assert cache.lengths.tolist() == at.tolist()
    for row, pieces in enumerate(got):
        close(torch.cat(pieces), model(rows[row : row + 1, : at[row]])[0])


@settings(deadline=None)
@given(st.lists(st.integers(1, 11), min_size=1, max_size=7))
def test_rows_behind_each_other_equal_each_row_alone(model, lengths):
    """Training computes no padding: a row that sees the one before it, or whose positions go on
    from there, learns another text than it will answer."""
    rows = [random_ids(1, n, seed=j) for j, n in enumerate(lengths)]
    hidden = model.model(torch.cat(rows, 1), lengths=lengths)
    assert hidden.shape[:2] == (1, sum(lengths))
    close(hidden, torch.cat([model.model(row) for row in rows], 1))


def test_a_full_cache_is_an_error(model):
    """Writing past the end would overwrite or drop keys: wrong text, no message."""
    cache = model.new_cache(2, 7)
    ids = random_ids(2, 11)
    model(ids[:, :5], cache)
    with pytest.raises(ValueError, match="full: 5 \\+ 3"):
        model(ids[:, 5:8], cache)
    assert cache.lengths.tolist() == [5, 5]
    close(model(ids[:, 5:7], cache), model(ids[:, :7])[:, 5:])  # it still holds what it held
    with pytest.raises(ValueError, match="full: 7 \\+ 1"):
        model(ids[:, 7:8], cache)


# Long proofs --------------------------------------------------------------------------------------

# VmHWM and not getrusage's ru_maxrss, which a child inherits from a parent that was larger once.
MEASURE = """
import sys, model
peak = lambda: next(int(y.split()[1]) for y in open("/proc/self/status") if y.startswith("VmHWM")) * 1024
before = peak()
llama = model.load_llama(sys.argv[1])
print(before, peak(), sum(p.numel() * p.element_size() for p in llama.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_loading_peaks_at_the_size_of_the_weights(tmp_path):
    """A second copy of the weights, for a moment, is what keeps a model that fits from being
    loaded."""
    fields = {"hidden_size": 1024, "intermediate_size": 4093, "num_hidden_layers": 31, "vocab_size": 32003}
    whole = llama_folder(tmp_path / "m", torch.bfloat16, **fields, num_attention_heads=8, head_dim=128)
    parts = shard(tmp_path / "parts", whole)
    (whole / "model.safetensors").unlink()
    size = sum(file.stat().st_size for file in parts.glob("*.safetensors"))
    assert size >= 1e9, "too small to measure"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, parts], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after, held = map(int, done.stdout.split())
    assert held == pytest.approx(size, rel=0.01)
    assert after - before <= 1.1 * size, f"{(after - before) / size:.2f} times the weights"


PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a small dragon who",
    "Q: What is 17 + 25?\nA:",
    "Die Hauptstadt von Österreich heißt",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein. Straße, Äpfel,",
    "日本の首都は",
    "昔々、あるところに、おじいさんと",
    "Привет, меня зовут",
    "В начале было слово, и слово было",
    "🎉🎂 Happy birthday! 🥳🎈",
    "👩‍👩‍👧‍👦 means family, 👍🏽 means",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    "#include <stdio.h>\nint main(void) {\n\t",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 5, 8, 13,",
    "Ελληνικά: Καλημέρα",
    "العربية: مرحبا",
    "   leading spaces and\ttabs\n\n\n",
]


@pytest.mark.real
def test_greedy_tokens_equal_transformers(real_model):
    """The whole path with real weights and a real tokenizer: ids, positions, cache, padding, EOS
    and text."""
    from helpers_oracles import LlamaForCausalLM

    mole, steps = load(real_model, dtype="float32"), 64
    oracle = LlamaForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    for begin in range(0, len(PROMPTS), 5):
        batch = PROMPTS[begin : begin + 5]
        got, texts = [[] for _ in batch], [""] * len(batch)
        for token in stream(mole, batch, method="base", raw=True, max_new_tokens=steps):
            got[token.row].append(token.id)
            texts[token.row] += token.text
        for prompt, ours, text in zip(batch, got, texts, strict=True):
            ids = torch.tensor([mole.tokenizer.encode(prompt)])
            with torch.no_grad():
                full = oracle.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=steps,
                    do_sample=False,
                    pad_token_id=0,
                )
            want = full[0, ids.shape[1] :].tolist()
            assert ours == want, prompt
            ended = want[-1] in mole.eos_ids
            assert len(want) == steps or ended, prompt
            assert text == mole.tokenizer.decode(want[:-1] if ended else want), prompt
