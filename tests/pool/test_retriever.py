"""LoraRetriever: what is ranked, by what, and what its file is bound to."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from common.files import InputError
from common.tensors import read_metadata
from common.tokenizer import Tokenizer
from generate import load
from helpers_commands import command
from helpers_models import SMALL, write_adapters
from helpers_training import write_tasks
from methods.batch import retrieve
from methods.lora_retriever import bag_of_words, compare, draw_prompts, info_nce, top_1, whiten_within
from methods.session import retriever_of
from model import load_llama
from moe_lora import SampleGate, attach, attached
from pool.load import TINY
from pool.retriever import (
    INSTRUCTION,
    LlamaEncoder,
    Retriever,
    base_alone,
    load_retriever,
    save_retriever,
    sentence_encoder,
    strip_shared,
)
from tasks.folders import Task, load_tasks
from tasks.tiny import TASKS, examples


def letters(texts):
    """A text encoder: how often a, b, c occur."""
    return torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in texts])


def test_nearest_mean_of_samples():
    """Cosines of sums, or of vectors that are not normalised, would favour adapters with long
    samples."""
    retriever = Retriever(letters)
    retriever.add("x", ["aab", "aaaaaaab"])
    retriever.add("y", ["bc"])
    retriever.add("z", ["c"])
    mean = F.normalize(letters(["aab", "aaaaaaab"]), dim=-1).mean(0)
    want = {"x": F.cosine_similarity(letters(["ab"])[0], mean, 0), "y": 0.5, "z": 0.0}
    [found] = retriever(["ab"], 5)
    assert [name for name, _ in found] == ["x", "y", "z"]
    assert [score for _, score in found] == pytest.approx([float(want[name]) for name, _ in found], abs=1e-5)
    assert [name for name, _ in retriever(["ab"], 1, exclude=["x"])[0]] == ["y"]


def test_an_adapter_joins_and_leaves_without_training(capsys):
    """Only what is new is embedded: with hundreds of adapters every start would otherwise take
    minutes."""
    calls = []
    retriever = Retriever(lambda texts: calls.append(len(texts)) or letters(texts))
    retriever.keep({"x": ["a"], "y": ["b", "bb"]})
    retriever.keep({"x": ["a"], "y": ["b", "bb"], "z": ["c"], "silent": []})
    assert calls == [1, 2, 1] and sorted(retriever.vectors) == ["x", "y", "z"]
    assert "silent: no samples.jsonl" in capsys.readouterr().err
    retriever.keep({"x": ["other"], "z": ["c"]})
    assert calls == [1, 2, 1, 1] and sorted(retriever.vectors) == ["x", "z"]


@pytest.fixture
def encoder(small_model):
    return LlamaEncoder(load_llama(small_model), Tokenizer(small_model), 2)


def test_pooled_is_the_mean_of_the_texts_own_tokens(encoder):
    """Padding or the instruction in the mean would make all prompts alike, the more the shorter
    they are."""
    texts = ["the quick brown fox", "mouse", "sort these words for me and the lazy dog"]
    head = encoder.tokenizer.encode("Represent the sentence for similar task retrieval: ")
    for text, got in zip(texts, encoder.pooled(texts, tokens=70), strict=True):
        ids = torch.tensor([head + encoder.tokenizer.encode(text, start=False)])
        want = encoder.model.model(ids, depth=2)[0, len(head) :].mean(0)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    alone = torch.cat([encoder([text]) for text in texts])
    torch.testing.assert_close(encoder(texts), alone, rtol=1e-4, atol=1e-5)


def test_encoding_sees_the_base_alone(encoder, small_model, tmp_path):
    """Adapters that are attached would move the embedding space with every batch."""
    model, want = encoder.model, encoder(["the fox"])
    mole = load(small_model, adapters=write_adapters(tmp_path, model, "ab"))
    gate = SampleGate()
    gate.set(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    linears = attach(model, mole.pool, gate)
    assert torch.equal(encoder(["the fox"]), want)
    assert attached(model) == linears  # and they are back
    with pytest.raises(RuntimeError), base_alone(model):
        raise RuntimeError
    assert attached(model) == linears


def test_file(encoder, tmp_path):
    retriever, file = Retriever(encoder), tmp_path / "retriever.safetensors"
    retriever.keep({"x": ["the fox"], "y": ["plural of mouse"]})
    save_retriever(file, retriever, encoder.model, {"tasks": "x"})
    again, metadata = load_retriever(file, encoder.model, encoder.tokenizer)
    assert metadata["tasks"] == "x" and again.digests == retriever.digests
    assert again(["the lazy fox"], 2) == retriever(["the lazy fox"], 2)
    encoder.model.fingerprint = lambda: "f" * 32
    with pytest.raises(InputError, match=r"retriever.safetensors: trained on base .*train.py retriever"):
        load_retriever(file, encoder.model, encoder.tokenizer)


def test_file_without_adapters(encoder, tmp_path):
    """Tuned before there are adapters, it is for those that join later: without it the file of no
    vectors holds one, of no length, and is refused."""
    file = tmp_path / "retriever.safetensors"
    save_retriever(file, Retriever(encoder), encoder.model, {})
    again, _ = load_retriever(file, encoder.model, encoder.tokenizer)
    assert again.vectors == again.digests == {}
    again.keep({"x": ["the fox"], "y": ["plural of mouse"]})
    want = Retriever(encoder)
    want.keep({"x": ["the fox"], "y": ["plural of mouse"]})
    assert again(["the lazy fox"], 2) == want(["the lazy fox"], 2)


def test_strip_shared():
    """Instructions are alike within a task: with them in, retrieval would measure nothing but that."""
    prompts = [
        f"Translate the text.\n\nToday I {verb}. Yesterday I" for verb in ("go", "see it", "eat", "run")
    ]
    assert strip_shared(prompts) == ["go.", "see it.", "eat.", "run."]
    assert strip_shared(["same", "same"]) == ["same", "same"]  # never empty


@given(st.lists(st.text(max_size=30), min_size=1, max_size=7))
def test_strip_shared_keeps_count_and_words(prompts):
    for stripped, prompt in zip(strip_shared(prompts), prompts, strict=True):
        assert set(stripped.split()) <= set(prompt.split())
        assert bool(stripped.strip()) or not prompt.strip()


def clouds(seed, tasks=7, n=23, h=11):
    """Two views (tasks, n, h) of tasks as points, spread widely along two directions that say
    nothing of the task."""
    nuisance = 6 * torch.randn(2, h, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(tasks, 1, h, generator=g)
    around = [
        (torch.randn(tasks, n, 2, generator=g), torch.randn(tasks, n, h, generator=g)) for _ in range(2)
    ]
    return [centres + wide @ nuisance + 0.2 * small for wide, small in around]


def test_tuning_finds_what_tells_tasks_apart():
    """On tasks that it was not tuned on; untuned, what they share decides."""
    views, new, labels = clouds(0), clouds(1)[0], torch.arange(7).repeat_interleave(9)
    mean, projection = whiten_within(views, shrink=0.01)
    o = type("o", (), {"seed": 0, "lr": 1e-3, "steps": 20, "temperature": 0.1})
    tuned = info_nce([view - mean for view in views], projection, o)
    scores = []
    for W in (torch.eye(11), projection, tuned):
        drawn = F.normalize(F.linear(new - mean, W), dim=-1)
        scores.append(float(top_1(list(drawn[:, :14]), drawn[:, 14:].flatten(0, 1), labels, 5).mean()))
    assert scores[0] < 0.5 and min(scores[1:]) > 0.9, scores


def test_table_of_the_tasks_left_out(tmp_path):
    """A query that is among the samples, or tasks that were tuned on, would make any encoder look
    good."""
    tasks = load_tasks(write_tasks(tmp_path))
    table = compare({"letters": letters, "bag of words": bag_of_words}, tasks, ["plurals"], seed=0)
    assert "5 prompts of 1 tasks among 2, tuned on the other 1" in table and table.count("| letters |") == 2
    assert "| bag of words | as they are | 100.0 [100.0, 100.0]" in table  # their words are distinct


def test_command(small_model, tmp_path):
    """The whole way: task folders to a file that generate.py retrieves with, and the table of the
    tasks left out."""
    names = ["animals", "plurals"]
    write_adapters(tmp_path / "pool" / "adapters", load_llama(small_model), names)
    (tmp_path / "pool" / "pool.json").write_text(json.dumps({"adapters": names}))
    tasks = write_tasks(tmp_path / "tasks")
    rows = (tasks / "animals" / "train.jsonl").read_text().splitlines()
    samples = [tmp_path / "pool" / "adapters" / name / "samples.jsonl" for name in names]
    samples[0].write_text("\n".join(rows[:5]) + "\n")
    where = ["--model", small_model, "--tasks", tasks, "--pool", tmp_path / "pool", "--max_length", "90"]
    done = command("train.py", "retriever", *where, "--steps", "3", "--prompts", "7")
    assert done.returncode == 0, done.stderr
    # An adapter from elsewhere has no samples; without some it would never be retrieved.
    assert samples[0].read_text() == "\n".join(rows[:5]) + "\n"
    written = [json.loads(line)["prompt"] for line in samples[1].read_text().splitlines()]
    train = [
        json.loads(line)["prompt"] for line in (tasks / "plurals" / "train.jsonl").read_text().splitlines()
    ]
    assert sorted(written) == sorted(train) and f"wrote {samples[1]}" in done.stderr
    refused = command("train.py", "retriever", *where, "--test")
    assert refused.returncode == 2 and "all 2 tasks are tuned on" in refused.stderr
    mole = load(small_model, tmp_path / "pool")
    assert retriever_of(mole).digests.keys() == {*names}
    [found] = retrieve(mole, ["selection"], ["quick brown fox jumps"], 2)
    assert found[0][0] == "animals"


@pytest.mark.slow
def test_tasks_and_phrasings_never_seen():
    """tiny/'s retriever on the tasks that it was not tuned on, with prompts worded as none of the
    adapters' samples is: otherwise it could know the tasks, or the samples' wording, by heart."""
    mole = load(dtype="float32")
    tuned_on = read_metadata(f"{TINY}/retriever.safetensors")["tasks"].split("\n")
    embed, places = retriever_of(mole).embed, []
    for fold in range(4):
        retriever, asked = Retriever(embed), {}
        for name in mole.pool.names:
            phrasings = sorted(TASKS[name].phrasings, key=len, reverse=True)

            def phrasing(row, phrasings=phrasings):
                return next(p for p in phrasings if all(part in row["prompt"] for part in p.split("{x}")))

            out = phrasings[fold]
            retriever.add(
                name, [r["prompt"] for r in examples(name, "train", 200) if phrasing(r) != out][:20]
            )
            asked[name] = [r["prompt"] for r in examples(name, "test", 100) if phrasing(r) == out]
        for name in set(asked) - set(tuned_on):
            if asked[name]:
                found = retriever(asked[name], len(mole.pool.names))
                places += [[adapter for adapter, _ in pairs].index(name) for pairs in found]
    first, third = (sum(place < k for place in places) / len(places) for k in (1, 3))
    assert len(places) > 1000 and first > 0.9 and third > 0.98, (len(places), first, third)


def test_an_encoder_of_ones_own(small_model, tmp_path):
    """Set after the first request, it must be asked from the next on."""
    folders = write_adapters(tmp_path, load_llama(small_model), ["x", "y"])
    for name, text in (("x", "aab"), ("y", "bc")):
        (folders[name] / "samples.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    mole = load(small_model, adapters=folders)
    retrieve(mole, ["selection"], ["a"], 1)
    mole.embed = letters
    assert retrieve(mole, ["selection"] * 2, ["c", "aa"], 1) == [[("y", 0.707107)], [("x", 0.894427)]]


def test_a_sentence_transformers_folder(small_model, tmp_path, monkeypatch):
    """--encoder: asked with the instruction; where package or folder is missing, one line says so."""
    with pytest.raises(InputError, match="nowhere: no such folder"):
        sentence_encoder("nowhere")

    class SentenceTransformer:
        def __init__(self, folder, device):
            assert folder == str(tmp_path)

        def encode(self, texts, convert_to_tensor):
            assert all(text.startswith(INSTRUCTION) for text in texts)
            return letters([text.removeprefix(INSTRUCTION) for text in texts])

    module = type(sys)("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert torch.equal(sentence_encoder(tmp_path)(["aab", "c"]), letters(["aab", "c"]))


def test_texts_longer_than_the_context(encoder):
    """Small contexts, and instructions as long as the limit, must not let a text run past the
    context."""
    encoder.max_length = 20
    long = encoder.pooled(["the fox " * 200])
    assert torch.equal(long, encoder.pooled(["the fox " * 300])) and long.isfinite().all()
    assert LlamaEncoder(encoder.model, encoder.tokenizer).max_length == SMALL["max_position_embeddings"]


def test_prompts_of_a_small_task_keep_their_words(tmp_path):
    """Counted twice, each of up to twenty prompts shares all its words with itself."""
    rows = [{"prompt": f"word{j} apple{j}", "response": ""} for j in range(15)]
    task = Task("t", "exact_match", rows, [])
    assert sorted(draw_prompts(task, 15, 0, bare=True)) == sorted(row["prompt"] for row in rows)
