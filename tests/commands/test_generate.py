"""Batch equals alone whatever the methods beside it, the sampler, where answers end, and the
command's face."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import generate
from common.endings import run_script
from common.files import InputError
from common.llama_folder import read_config
from common.template import TEMPLATE
from common.tensors import write_safetensors
from common.tokenizer import Tokenizer
from decoding.loop import Token
from decoding.prompts import encode_prompt
from decoding.respond import result
from decoding.sampling import Sampling, sample
from generate import answer, load, stream
from helpers_commands import ROOT, command
from helpers_models import SMALL, tokenizer_bytes, write_adapters
from methods.batch import default_method, set_methods
from model import Llama, LlamaConfig, load_llama
from moe_lora import MeteoraGate
from pictures.terminal import Printer
from pool.folder import PoolFolder, read_pool, write_pool
from pool.gate_files import save_gates

NAMES = ("aspen", "birch", "cedar", "douglas", "elm")
PROMPTS = [
    "the quick brown fox",
    "sort these words for me",
    "what is the plural of mouse, and of the lazy dog",
    "Straße",
    "日本",
    "x",
    "the dog jumps over",
    "over the lazy dog jumps the quick brown",
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory, small_model):
    """A pool folder: five adapters of different ranks, and random top-2 and top-1 gates."""
    folder = tmp_path_factory.mktemp("pool")
    base = load_llama(small_model)
    adapters = write_adapters(
        folder / "adapters", base, NAMES, size=0.1
    )  # larger ones amplify rounding past 1e-5
    write_pool(PoolFolder(folder, adapters, base.fingerprint(), TEMPLATE))
    mole = load(small_model, folder)
    for k in (1, 2):
        generator = torch.Generator().manual_seed(k)
        draw = {p: torch.randn(len(NAMES), a.shape[2], generator=generator) for p, a in mole.pool.A.items()}
        gates = {path: MeteoraGate(G, k) for path, G in draw.items()}
        save_gates(
            folder / "gates" / f"meteora_top{k}.safetensors", gates, mole.pool, k, NAMES, base.fingerprint()
        )
    return folder


@pytest.fixture(scope="module")
def mole(small_model, pool):
    return load(small_model, pool)


def scripted(folder, follow, room=97, **fields):
    """A Llama that says what it is told: after token j comes follow[j], or j again. `room` is its
    context."""
    v = SMALL["vocab_size"]
    sizes = {"hidden_size": v, "num_attention_heads": 1, "num_key_value_heads": 1}
    sizes |= {"intermediate_size": 3, "head_dim": 2}
    sizes |= {"num_hidden_layers": 1, "tie_word_embeddings": False, "max_position_embeddings": room}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL | sizes | fields))
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    model = Llama(LlamaConfig(**read_config(folder)))
    tensors = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}  # the block adds nothing
    tensors["model.norm.weight"] += 1
    tensors["model.embed_tokens.weight"] = torch.eye(v)
    for j in range(v):
        tensors["lm_head.weight"][follow.get(j, j), j] = 1
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def chain(*ids):
    return dict(zip(ids, ids[1:], strict=False))


def tokens_of(mole, prompts, method, **options):
    """[(id, text, adapters, finish), ...] of each row."""
    rows = [[] for _ in prompts]
    for token in stream(mole, prompts, method=method, **options):
        rows[token.row].append((token.id, token.text, token.adapters, token.finish))
    return rows


# Batch = alone ------------------------------------------------------------------------------------

FIXED = ["base", "uniform", *(f"adapter:{name}" for name in NAMES), "base"]
MIXED = ["meteora", "adapter:elm", "base", "meteora", "uniform", "adapter:aspen"]
MIXED += ["meteora_top2", "adapter:cedar"]


@pytest.mark.parametrize("methods", [FIXED, MIXED], ids=["fixed", "with gates"])
def test_batch_equals_each_prompt_alone(mole, methods):
    """Rows that leak into each other (padding, positions, another row's adapter or gate) give
    answers that depend on who else asked: the hardest fault to notice when serving many adapters.
    """
    options = {"max_new_tokens": 17, "routing": True}
    together = tokens_of(mole, PROMPTS, methods, **options)
    for row, (prompt, method) in enumerate(zip(PROMPTS, methods, strict=True)):
        (alone,) = tokens_of(mole, [prompt], method, **options)
        assert [t[:2] for t in together[row]] == [t[:2] for t in alone], (prompt, method)
        for (_, _, got, _), (_, _, want, _) in zip(together[row], alone, strict=True):
            assert dict(got) == pytest.approx(dict(want), abs=0.0011), (prompt, method)  # rounded to 0.001
    first = {method: tokens_of(mole, PROMPTS[:1], method, max_new_tokens=17)[0] for method in set(methods)}
    said = {tuple(t[0] for t in row) for row in first.values()}
    # Methods that all answer alike prove nothing; meteora is meteora_top2.
    assert len(said) >= len(first) - 1


def test_two_streams_on_one_model_are_refused(mole):
    """The adapters of a batch live in the model: a second stream would hand its own to the first,
    in silence."""
    first = stream(mole, "the fox", method=f"adapter:{mole.pool.names[0]}", max_new_tokens=5)
    next(first)
    answer(mole, "the dog", method="base", max_new_tokens=2)
    with pytest.raises(RuntimeError, match="another batch began"):
        list(first)


def test_values_are_checked_for_importers_too(mole):
    """Importers meet the same bad values as the command line; unchecked, they sample from NaN
    without a word."""
    assert answer(mole, []) == []
    bad = [
        {"temperature": -1.0},
        {"temperature": 1e-300},
        {"top_k": 0},
        {"top_p": 0.0},
        {"stop": [""]},
        {"method": ["base"] * 2},
    ]
    for options in [*bad, {"gate_temperature": 1e-46}, {"gate_temperature": math.inf}]:
        with pytest.raises(InputError):
            answer(mole, "the fox", **options)
    for options in ({"temperature": 1e-6}, {"gate_temperature": 1e-6, "method": "meteora"}):
        # The limit of both is the largest alone.
        greedy = answer(mole, "the fox", max_new_tokens=5, **options)
        assert greedy == answer(mole, "the fox", max_new_tokens=5, **options | {"temperature": 0.0})


def test_recorded_adapters_are_those_asked_for(mole):
    """The colours are what people look at to see whether routing works: they must be the adapters
    that computed."""
    rows = tokens_of(mole, PROMPTS[:4], ["base", "adapter:birch", "uniform", "meteora_top2"], routing=True)
    base, one, uniform, routed = ([t[2] for t in row] for row in rows)
    assert all(seen == [] for seen in base)
    assert all(seen == [["birch", 1.0]] for seen in one)
    assert all(dict(seen) == dict.fromkeys(NAMES, 0.2) for seen in uniform)
    assert all(sum(dict(seen).values()) == pytest.approx(1, abs=0.003) for seen in routed)
    assert {name for seen in routed for name, _ in seen} == set(NAMES)


def test_each_adapter_changes_the_logits(mole):
    """An adapter that loads and silently does nothing is the most repeated complaint about every
    peer."""
    ids = torch.tensor([mole.tokenizer.encode(PROMPTS[0])])
    logits = []
    for method in ("base", *(f"adapter:{name}" for name in NAMES), "uniform", "meteora_top1", "meteora_top2"):
        set_methods(mole, [method])
        logits.append(mole.model(ids))
    for j, one in enumerate(logits):
        assert all((one - other).abs().max() > 0.1 for other in logits[:j])


def test_order_of_the_pool_does_not_matter(tmp_path, small_model, pool):
    """Slots are an accident of loading: a gate row or an adapter joined by position answers for its
    neighbour."""
    backwards = tmp_path / "pool"
    backwards.mkdir()
    for part in ("adapters", "gates"):
        (backwards / part).symlink_to(pool / part)
    raw = json.loads((pool / "pool.json").read_text())
    (backwards / "pool.json").write_text(json.dumps(raw | {"adapters": raw["adapters"][::-1]}))
    folders = read_pool(pool).adapters
    pairs = [
        (
            load(small_model, adapters=folders),
            load(small_model, adapters=dict(reversed(folders.items()))),
            FIXED,
        ),
        (load(small_model, pool), load(small_model, backwards), MIXED),
    ]
    for there, back, methods in pairs:
        assert there.pool.names == back.pool.names[::-1]
        ids = torch.tensor([there.tokenizer.encode(PROMPTS[2])] * len(methods))
        logits = []
        for mole in (there, back):
            set_methods(mole, methods)
            logits.append(mole.model(ids))
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        options = {"method": methods, "max_new_tokens": 11}
        assert answer(there, PROMPTS, **options) == answer(back, PROMPTS, **options)


def test_bfloat16_answers_too(small_model, pool):
    """Adapters, gates and cache live in the model's dtype: one float32 among them stops at the
    first product."""
    mole = load(small_model, pool, dtype="bfloat16")
    assert mole.pool.A["model.layers.0.mlp.up_proj"].dtype == torch.bfloat16
    assert all(len(row) > 1 for row in tokens_of(mole, PROMPTS, MIXED, max_new_tokens=5))


# The sampler --------------------------------------------------------------------------------------


def test_seeds_and_the_limits_of_sampling(mole):
    """An answer that can't be drawn again can't be shown to anybody; and the narrowest sampling is
    greedy."""
    say = lambda **options: answer(mole, PROMPTS, method=MIXED, max_new_tokens=13, **options)  # noqa: E731
    greedy = say()
    hot = say(temperature=2.0, seed=7)
    assert hot == say(temperature=2.0, seed=7) != say(temperature=2.0, seed=8)
    assert hot != greedy
    assert say(temperature=2.0, seed=7, top_p=1e-9) == say(temperature=2.0, sample_top_k=1) == greedy
    twice = answer(mole, [PROMPTS[0]] * 2, method="base", temperature=2.0, seed=7)
    assert twice[0] != twice[1]  # rows draw for themselves
    alone = answer(mole, PROMPTS[0], method="base", temperature=2.0, seed=8)
    assert twice[1] == alone[0]  # row j with seed + j


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(temperature=1.0), 7),
        (Sampling(temperature=0.5), 7),
        (Sampling(temperature=2.0, sample_top_k=3), 3),
        (Sampling(temperature=1.0, top_p=0.9), 4),
        (Sampling(temperature=1.0, top_p=0.9, sample_top_k=2), 2),
    ],
)
def test_draws_follow_the_distribution(sampling, kept):
    """A sampler that forgets to renormalize, or applies the temperature twice, still writes
    plausible text."""
    n = 5003
    logits = torch.tensor([0.0, 1.7, -2.3, 1.1, -0.7, 0.5, -3.1])
    want = (logits / sampling.temperature).softmax(-1)
    least = want.sort(descending=True).values[kept - 1]
    want = torch.where(want >= least, want, 0.0)
    want = want / want.sum()
    generators = [torch.Generator().manual_seed(j) for j in range(n)]
    drawn = sample(logits.expand(n, -1), sampling, generators)
    share = torch.bincount(drawn, minlength=7) / n
    spread = (want * (1 - want) / n).sqrt()
    assert (share[want == 0] == 0).all()
    assert ((share - want).abs() <= 4 * spread).all(), (share, want)


def test_greedy_is_the_argmax_of_each_row():
    """Temperature 0 must not divide by zero, and needs no generator."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 4.0]])
    assert sample(logits, Sampling(), None).tolist() == [1, 0]


# Where answers end --------------------------------------------------------------------------------


def test_every_eos_of_the_list_ends_an_answer(tmp_path, capsys):
    """Llama 3 ends a turn with another token than a text: a reader that knows only one id talks on
    and on."""
    tokenizer = Tokenizer(scripted(tmp_path / "t", {}))
    the, fox, dog, over = (tokenizer.encode(w, start=False)[-1] for w in ("the", "fox", "dog", "over"))
    folder = scripted(tmp_path / "m", chain(the, fox, 7) | chain(dog, over, 2), eos_token_id=[2, 11])
    file = folder / "generation_config.json"
    ends = lambda: [row[-1][0] for row in tokens_of(load(folder), ["the", "dog"], "base", max_new_tokens=5)]  # noqa: E731
    assert ends() == [7, 2]  # 7 repeats until it is enough
    file.write_text(json.dumps({"eos_token_id": [7, 2]}))
    rows = tokens_of(load(folder), ["the", "dog"], "base", max_new_tokens=5)
    assert [[t[0] for t in row] for row in rows] == [[fox, 7], [over, 2]]
    assert [row[-1][3] for row in rows] == ["eos", "eos"]
    assert answer(load(folder), ["the", "dog"], method="base") == [
        tokenizer.decode([fox]),
        tokenizer.decode([over]),
    ]
    file.write_text('{"eos_token_id": [7, 2],}')
    capsys.readouterr()
    assert ends() == [7, 2] and len(tokens_of(load(folder), ["the"], "base", max_new_tokens=5)[0]) == 5
    assert str(file) in capsys.readouterr().err  # a warning, no more


def test_finish_reasons(tmp_path):
    """Whoever calls needs to know whether an answer is whole; and a row at the end of its context
    must not stop, or change, the rows beside it."""
    tokenizer = Tokenizer(scripted(tmp_path / "t", {}))
    the, fox = (tokenizer.encode(w, start=False)[-1] for w in ("the", "fox"))
    folder = scripted(tmp_path / "m", chain(the, fox, 2), room=31)
    mole = load(folder)
    long = "dog " * 50
    ids = encode_prompt(mole, long, raw=True, truncate="right")
    assert len(ids) == 31
    prompts = ["the", "dog", tokenizer.decode(ids[:27]), long]
    counts = [len(encode_prompt(mole, p, raw=True, truncate="right")) for p in prompts]
    rows = tokens_of(mole, prompts, "base", raw=True, truncate="right", max_new_tokens=11)
    assert [row[-1][3] for row in rows] == ["eos", "length", "context", "context"]
    assert all(t[3] is None for row in rows for t in row[:-1])
    assert [len(row) for row in rows] == [
        2,
        11,
        31 - counts[2] + 1,
        1,
    ]  # the last token needs no place of its own
    for prompt, row in zip(prompts, rows, strict=True):
        assert tokens_of(mole, [prompt], "base", raw=True, truncate="right", max_new_tokens=11) == [row]


def test_a_large_limit_costs_no_memory(tmp_path):
    """--max_new_tokens 1000000000 means "until it ends": the context bounds the answer and so must
    bound the cache."""
    mole = load(scripted(tmp_path / "m", {}, room=31))
    (row,) = tokens_of(mole, ["dog"], "base", max_new_tokens=10**12)
    assert row[-1][3] == "context"


def test_broken_characters_at_the_end_are_in_both_texts(tmp_path):
    """A model may stop in the middle of a character: the tokens' texts still have to join to the
    text."""
    tokenizer = Tokenizer(scripted(tmp_path / "t", {}))
    dog, party = tokenizer.encode("dog", start=False)[-1], tokenizer.encode("🎉", start=False)[-4:]
    for number, ids in enumerate(([*party], [*party[:2], 2], [*party, 2])):
        mole = load(scripted(tmp_path / f"m{number}", chain(dog, *ids)))
        kept = list(stream(mole, "dog", method="base", raw=True, max_new_tokens=len(ids)))
        made = result("dog", "base", kept, [], 1.0, [])
        assert made["text"] == tokenizer.decode([i for i in ids if i != 2])
        assert "".join(t["text"] for t in made["tokens"]) == made["text"]
        assert [t["id"] for t in made["tokens"]] == [i for i in ids if i != 2]


def test_truncation_keeps_bos_and_the_asked_for_end(mole):
    """A prompt without its BOS, or the wrong end of a document, is answered without complaint and
    wrongly."""
    room, tokenizer = mole.model.config.context, mole.tokenizer
    text = " ".join(str(number) for number in range(113))
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * room
    with pytest.raises(InputError, match=rf"{len(ids)} tokens, the context {room}: generate.py --truncate"):
        encode_prompt(mole, text, raw=True)
    assert encode_prompt(mole, text, raw=True, truncate="right") == ids[:room]
    assert encode_prompt(mole, text, raw=True, truncate="left") == [
        tokenizer.bos_id,
        *ids[len(ids) - room + 1 :],
    ]
    for end in ("no", "left", "right"):  # what fits stays as it is, and gets the template once
        want = tokenizer.encode("[INST] fox {prompt} [/INST]\n")
        assert encode_prompt(mole, "fox {prompt}", truncate=end) == want


def test_prompts_that_no_model_can_answer(tmp_path, mole):
    """An empty prompt has no last position to read, an id beyond the vocabulary no embedding."""
    assert encode_prompt(mole, "", raw=True) == [mole.tokenizer.bos_id]
    assert len(answer(mole, ["", "the"], method="base", raw=True, max_new_tokens=3)) == 2
    folder = scripted(tmp_path / "m", {})
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": False, "bos_token": "<nothing>"})
    )
    with pytest.raises(InputError, match="331, but the model has 331"):  # a token that was added
        answer(load(folder), "", raw=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes(337))
    (folder / "tokenizer_config.json").unlink()
    strange = Tokenizer(folder).backend.pieces.id_to_piece(336).replace("▁", " ")
    with pytest.raises(InputError, match="336, but the model has 331: wrong tokenizer"):
        answer(load(folder), strange, raw=True)


# Methods ------------------------------------------------------------------------------------------


def test_default_is_the_best_that_the_pool_has_parts_for(small_model, pool, mole):
    """The first answer a newcomer sees should come from the best method, not from a bare base."""
    folders = read_pool(pool).adapters
    assert default_method(load(small_model), 2)[0] == "base"
    assert default_method(load(small_model, adapters={"elm": folders["elm"]}), 2)[0] == "adapter:elm"
    assert default_method(load(small_model, adapters=folders), 2)[0] == "logo_top1"
    assert [default_method(mole, k)[0] for k in (1, 2, 3)] == ["meteora", "meteora", "meteora_top1"]
    assert answer(mole, PROMPTS[:2]) == answer(mole, PROMPTS[:2], method="meteora_top2")


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """generate.py in this process: run(args..., stdin=TEXT) -> (exit status, stdout, stderr)."""

    def call(*args, stdin=""):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = 0
        try:
            run_script(generate.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_every_answer_is_a_line_of_its_own(capsys):
    """Answers that end with a line break would stand apart by empty lines, those that don't run
    into one another."""
    printer = Printer(3, routing=False)
    printer.begin([[], [], []])
    for row, texts in enumerate((["mi", "ce\n"], ["oxen"], ["", "geese\n", ""])):
        for j, text in enumerate(texts, 1):
            printer.push(Token(row, 5, text, [], "eos" if j == len(texts) else None))
    assert capsys.readouterr().out == "mice\noxen\ngeese\n"


def test_a_mix_for_each_prompt(tmp_path, small_model, pool, mole, run):
    """Without it --mix, a line's method and Python's could be three different sums."""
    mixtures = ["birch=0.7,elm=-0.5", "elm=1"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": PROMPTS[2], "method": f"mix:{mixtures[0]}"}) + "\n")
    known = ["--model", small_model, "--pool", pool, "--json", "--max_new_tokens", "5"]
    asked = ["--prompt", PROMPTS[0], "--mix", mixtures[0], "--prompt", PROMPTS[1], "--mix", mixtures[1]]
    _, out, _ = run(*known, *asked)
    rows = [json.loads(line) for line in out.splitlines()]
    _, out, _ = run(*known, "--prompts", lines)
    rows.append(json.loads(out))
    methods = ["mix:birch=0.7,elm=-0.5", "adapter:elm", "mix:elm=-0.5,birch=0.7"]
    want = [answer(mole, PROMPTS[j], method=methods[j], max_new_tokens=5)[0] for j in range(3)]
    assert [row["text"] for row in rows] == want
    assert len(set(want)) == 3


JSON_KEYS = ["prompt", "text", "method", "finish_reason", "tokens", "prompt_tokens", "retrieved", "seconds"]
JSON_KEYS += ["tokens_per_second"]


def test_json_is_what_the_contract_says(tmp_path, small_model, pool, mole):
    """Programs read it: another key, a second kind of line on stdout, or texts that don't join
    break them."""
    asked = ["the fox", "日本 {prompt}", "-"]
    methods = ["meteora", "adapter:cedar", "base"]
    args = [x for p, m in zip(asked, methods, strict=True) for x in (f"--prompt={p}", "--method", m)]
    done = command(
        *("generate.py", "--model", small_model, "--pool", pool, "--json", "--max_new_tokens", 7, *args),
        *("--dtype", "float32"), stdin="the dog\n", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    template = f"template: {TEMPLATE!r} (from pool.json)"
    assert done.stderr.splitlines() == ["method: meteora, adapter:cedar, base", template]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    asked[2] = "the dog"
    assert [line["prompt"] for line in lines] == asked
    assert [line["method"] for line in lines] == methods
    assert [line["text"] for line in lines] == answer(mole, asked, method=methods, max_new_tokens=7)
    for line, prompt in zip(lines, asked, strict=True):
        assert list(line) == JSON_KEYS
        assert line["finish_reason"] in ("eos", "length") and line["retrieved"] == []
        assert line["seconds"] > 0 and line["tokens_per_second"] > 0
        assert "".join(token["text"] for token in line["tokens"]) == line["text"]
        filled = TEMPLATE.replace("{prompt}", prompt)
        assert "".join(token["text"] for token in line["prompt_tokens"]) == filled
        assert [token["id"] for token in line["prompt_tokens"]] == mole.tokenizer.encode(filled)
        for token in line["tokens"] + line["prompt_tokens"]:
            assert list(token) == ["id", "text", "adapters"]
            weights = [weight for _, weight in token["adapters"]]
            assert weights == sorted(weights, reverse=True)
            assert {name for name, _ in token["adapters"]} <= set(NAMES)
    meteora, cedar, base = ([t["adapters"] for t in line["tokens"] + line["prompt_tokens"]] for line in lines)
    assert all(sum(dict(pairs).values()) == pytest.approx(1, abs=0.003) for pairs in meteora)
    assert all(pairs == [["cedar", 1.0]] for pairs in cedar) and all(pairs == [] for pairs in base)


def test_plain_text_routing_and_web_page(tmp_path, small_model, pool, mole, run):
    """Piped output with colour escapes in it breaks whatever reads it; a page that loads things
    dies offline."""
    prompts, page = ["the <b>fox</b> & dog", "2+2=?"], tmp_path / "page.html"
    args = ["--model", small_model, "--pool", pool, "--prompt", prompts[0], f"--prompt={prompts[1]}"]
    args += ["--max_new_tokens", 9]
    said = answer(mole, prompts, max_new_tokens=9)
    status, out, err = run(*args)
    assert (status, out) == (0, "".join(f"{text}\n" for text in said))
    why = f"{len(NAMES)} adapters, top-2 gates from gates/meteora_top2.safetensors"
    template = f"template: {TEMPLATE!r} (from pool.json)"
    assert err.splitlines() == [f"method: meteora ({why})", template]
    status, out, _ = run(*args, "--routing", "--html", page)
    assert status == 0 and "\x1b[38;2;" in out and "\x1b[1;38;2;" in out
    bare = re.sub(r"\x1b\[[\d;]*m", "", out)
    want = [TEMPLATE.replace("{prompt}", p) + f"{t}\n" for p, t in zip(prompts, said, strict=True)]
    assert bare.startswith("".join(want))
    shares = dict(re.findall(r"■ (\w+) (\d+)%", bare.splitlines()[-1]))
    assert shares.keys() == set(NAMES) and abs(sum(map(int, shares.values())) - 100) <= 3
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert not re.search(r"https?:|src=|href=|@import|url\(", html)
    assert "<b>fox" not in html and all(name in html for name in NAMES)
    shown = re.sub(r"<[^>]*>", "", html.replace("&amp;", "&").replace("&#x27;", "'").replace("&quot;", '"'))
    assert "2+2=?" in shown and "&lt;b&gt;fox&lt;/b&gt; & dog" in shown


def test_a_picture_of_the_first_prompt(tmp_path, small_model, pool, mole, run):
    """Without it --svg draws another request of the batch, or a text without its adapters."""
    args = ["--model", small_model, "--pool", pool, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    status, out, _ = run(*args, "--max_new_tokens", 9, "--svg", tmp_path / "routing.svg")
    assert status == 0 and "\x1b" not in out
    shown = [element.text for element in ElementTree.parse(tmp_path / "routing.svg").getroot()][1:]
    end = shown.index("The model's answer")
    want = mole.template.replace("{prompt}", PROMPTS[0])
    assert shown[0] == "Prompt" and "".join(shown[1:end]) == re.sub(r"\s", "", want)
    assert {text.split()[1] for text in shown[-len(NAMES) :]} == set(NAMES)


def test_the_picture_in_docs_is_what_its_command_draws(tmp_path):
    """Without it the picture of the front page shows an answer, or a split, that this model no
    longer gives."""
    drawn = (ROOT / "docs" / "routing.svg").read_text("utf-8")
    prompt = "1. [INST] What is the plural of mouse? [/INST]\n"
    prompt += "2. [INST] Translate into German: house [/INST]\n"
    prompt += "3. [INST] Sort the words: river, apple, dog [/INST]\nAnswers:\n"
    done = command("generate.py", "--raw", "--prompt", prompt, "--svg", tmp_path / "routing.svg")
    assert (done.returncode, done.stdout) == (0, "1. mice\n2. Haus\n3. apple, dog, river\n")
    again = (tmp_path / "routing.svg").read_text("utf-8")
    assert re.sub(r"\d+%", "", again) == re.sub(r"\d+%", "", drawn)  # a share may round otherwise elsewhere


def test_list_prints_the_pool(small_model, pool, run):
    """Names are how adapters are asked for: without the list nobody knows them."""
    status, out, err = run("--model", small_model, "--pool", pool, "--list")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == sorted(NAMES)
    assert [row[1:3] for row in rows] == [["r", str(r)] for r in (2, 3, 5, 7, 11)]
    (read_pool(pool).adapters["elm"] / "samples.jsonl").write_text(
        '{"prompt": "Is it a tree?\\nSay."}\n{"prompt": "b"}\n'
    )
    assert rows == [line.removesuffix("  Is it a tree?").split() for line in
                    run("--model", small_model, "--pool", pool, "--list")[1].splitlines()]  # fmt: skip
    assert run("--model", small_model, "--list")[1] == "no adapters\n"
    one = read_pool(pool).adapters["elm"]
    status, out, _ = run("--model", small_model, "--pool", pool, "--adapter", f"oak={one}", "--list")
    assert status == 0 and "oak" in out and "elm" in out


def test_wrong_input_is_one_line_and_exit_2(small_model, pool, run):
    """A typo that is ignored runs the wrong experiment; a traceback tells a user nothing."""
    known = ["--model", small_model, "--pool", pool]
    cases = [
        (["--promt", "x"], "--promt", "--prompt"),
        (["--prompt", "x", "--metod=base"], "--metod=base", "--method"),
        (["--prompt", "x", "--max_new_tokens", "many"], "max_new_tokens", "many"),
        (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens is 0", "from 1 to"),
        (["--prompt", "x", "--temperature", "nan"], "temperature", "nan"),
        (["--prompt", "x", "--top_p", "0"], "--top_p is 0", "from 1e-09 to 1"),
        (["--prompt", "x", "--raw", "--chat"], "--raw", "--chat"),
        (["--prompt", "x", "--chat"], "chat template", "--chat"),
        (["--prompt", "x", "--device", "toaster"], "device", "toaster"),
        (["--prompt", "x", "--method", "meteroa"], "meteroa", "meteora"),
        (["--prompt", "x", "--method", "adapter:ceder"], "ceder", "cedar"),
        (
            ["--prompt", "x", "--method", "meteora_top3"],
            "meteora_top3.safetensors",
            "train.py gates --top_k 3",
        ),
        (["--prompt", "x", "--method", "base", "--method", "base"], "2 times --method", "1 prompts"),
        (["--prompt", "x", "--mix", "elm"], "mixture 'elm'", "NAME=WEIGHT"),
        (["--prompt", "x", "--mix", "elm=nan"], "elm=nan", "the weight of elm"),
        (["--prompt", "x", "--mix", "elm=1e39"], "elm=1e39", "float32"),
        (["--prompt", "x", "--mix", "elm=1,"], "''", "NAME=WEIGHT"),
        (["--prompt", "x", "--mix", "elm=1,elm=2"], "mixture 'elm=1,elm=2'", "elm twice"),
        (["--prompt", "x", "--mix", "ceder=1"], "ceder", "cedar"),
        (["--prompt", "x", "--mix", "elm=1", "--exclude", "elm"], "mix:elm=1", "elm is excluded"),
        (["--prompt", "x", "--mix", "elm=1", "--mix", "elm=2"], "2 times --mix", "1 prompts"),
        (["--prompt", "x", "--mix", "elm=1", "--method", "base"], "--mix", "--method"),
        (["--prompt", "x", "--adapter", "elm"], "'elm'", "NAME=DIR"),
        (["--prompt", "x", "--adapter", f"elm={pool}/adapters/elm"], "'elm' twice", "adapters/elm"),
        (["--prompt", "x " * 97], "tokens", "97"),
        (
            ["--prompt", "a", "--prompt", "b", "--method", "meteora_top1", "--method", "meteora_top2"],
            "_top1",
            "_top2",
        ),
    ]
    for args, *words in cases:
        status, out, err = run(*known, *args)
        lines = [line for line in err.splitlines() if not line.startswith(("method:", "template:"))]
        assert (status, out, len(lines)) == (2, "", 1), (args, status, out, err)
        assert lines[0].startswith("error: ") and all(word in lines[0] for word in words), (words, lines[0])


def test_no_prompt_says_how_to_start():
    """The first thing anybody types is `python generate.py`; an error, or silence, is the end of
    it."""
    done = command("generate.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(word in done.stdout for word in ("--prompt", "--list", "--help", "--model", "--adapter"))
    assert "mouse" in done.stdout and done.stdout.count("\n") < 12


def test_import_from_elsewhere(tmp_path, small_model, pool, mole):
    """People import it from their own folder: nothing may happen at import, nor depend on the
    working directory."""
    os.symlink(pool, tmp_path / "pool")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv.append('--not-an-option')\n"
        "import generate\n"
        f"mole = generate.load({str(small_model)!r}, 'pool')\n"
        "asked = {'method': 'adapter:elm', 'max_new_tokens': 5}\n"
        "ids = [token.id for token in generate.stream(mole, ['the fox'], **asked)]\n"
        "print([generate.answer(mole, 'the fox', **asked), ids])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    ids = [token.id for token in stream(mole, "the fox", method="adapter:elm", max_new_tokens=5)]
    want = [answer(mole, ["the fox"], method="adapter:elm", max_new_tokens=5), ids]
    assert (done.stdout, done.stderr) == (f"{want!r}\n", "")
    assert {path.name for path in Path(tmp_path).iterdir()} == {"pool"}


@pytest.mark.skipif(os.name == "nt", reason="signals and pipes of Unix")
def test_closed_pipe_and_interrupt_end_quietly(tmp_path):
    """`| head` and Ctrl-C are how people stop a long answer: neither is worth a traceback."""
    folder = scripted(tmp_path / "m", {}, room=99991)
    args = [sys.executable, ROOT / "generate.py", "--model", folder, "--prompt", "dog"]
    args += ["--max_new_tokens", "90001"]
    # nohup's children would ignore it
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    piped, stopped = (subprocess.Popen(args, **pipes, **heard) for _ in range(2))
    try:
        assert piped.stdout.read(1) and stopped.stdout.read(1)  # both are answering now
        piped.stdout.close()
        stopped.send_signal(signal.SIGINT)
        said = stopped.communicate(timeout=60)[1].decode()
        assert (stopped.returncode, said.splitlines()[2:]) == (130, ["interrupted"])
        assert piped.wait(timeout=60) == 141
        assert len(piped.stderr.read().decode().splitlines()) == 2  # method and template, no more
    finally:
        for process in (piped, stopped):
            process.kill()
            process.wait()
            process.stderr.close()
