"""Which tokenizer.json runs in this process; all others answer alike, and the worst end in one line."""

import json

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, normalizers, pre_tokenizers, processors

from common.added_tokens import AddedToken, AddedTokens
from common.files import InputError
from common.tokenizer import TextStream, Tokenizer
from common.tokenizer_json import LLAMA3, LimitedTokenizerJson, TokenizerJson, is_plain
from helpers_tokenizers import bytes_json, llama2_json, write_tokenizer

TEXTS = ["the plural of fox", "  two  spaces\n\nand\tlines ", "Straße 日本 👩‍👩‍👧 🎉 12345", "", "<s>the</s>"]
BOS = "<|begin_of_text|>"
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
}
NONE_ADDED = AddedTokens({}, {}, [])


def llama3():
    """A tokenizer.json with the parts that Llama 3's has."""
    fields = json.loads(bytes_json([BOS, "<|end_of_text|>"], BOS).to_str())
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}
    processors_ = [BYTES | {"trim_offsets": False, "use_regex": True}, TEMPLATE]
    fields["post_processor"] = {"type": "Sequence", "processors": processors_}
    fields["model"]["ignore_merges"] = True
    return fields


def smollm2():
    """A tokenizer.json with the parts that SmolLM2's has."""
    fields = json.loads(bytes_json(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).to_str())
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, BYTES | {"use_regex": True}]
    return fields | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def llama2_legacy_false():
    """As Llama 2's with legacy false: a Metaspace instead of the normalizer."""
    steps = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return json.loads(llama2_json().to_str()) | {"normalizer": None, "pre_tokenizer": steps}


PLAIN = {
    "llama2": lambda: json.loads(llama2_json().to_str()),
    "llama2, legacy false": llama2_legacy_false,
    "llama3": llama3,
    "smollm2": smollm2,
}


def folder_of(path, fields):
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize("kind", PLAIN)
def test_llamas_run_in_this_process(tmp_path, kind):
    """Each command over a real folder would start one process more and take longer."""
    ours = Tokenizer(folder_of(tmp_path / "t", PLAIN[kind]()))
    assert type(ours.backend) is TokenizerJson


CHANGES = {
    "another regex": ("pre_tokenizer", SPLIT | {"pattern": {"Regex": LLAMA3 + "|(x+x+)+y"}}),
    "another behaviour": ("pre_tokenizer", SPLIT | {"behavior": "MergedWithNext"}),
    "another type": ("pre_tokenizer", {"type": "Whitespace"}),
    "a sequence of them": ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES, {"type": "Nmt"}]}),
    "sequences in one another": ("normalizer", {"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": []}]}),
    "two lists": ("normalizer", {"type": "Sequence", "a": [], "normalizers": [{"type": "Nmt"}]}),
    "no list": ("normalizer", {"type": "Sequence", "normalizers": None}),
    "an unknown field": ("decoder", BYTES | {"more": 1}),
    "no object": ("decoder", ["ByteLevel"]),
    "a type that is none": ("decoder", {"type": ["ByteLevel"]}),
    "two templates": ("post_processor", {"type": "Sequence", "processors": [TEMPLATE, TEMPLATE]}),
    "no text": ("post_processor", TEMPLATE | {"single": []}),
    "an unknown token": ("post_processor", TEMPLATE | {"special_tokens": {}}),
    "two ids": ("post_processor", TEMPLATE | {"special_tokens": {
        BOS: {"id": BOS, "ids": [0, 1], "tokens": [BOS, BOS]}}}),
    "special tokens a list": ("post_processor", TEMPLATE | {"special_tokens": [BOS]}),
    "no model": ("model", None),
    "another model": ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    "dropout": ("model", {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.5}),
    "unknown unk": ("model", {"type": "BPE", "vocab": {}, "merges": [], "unk_token": "a"}),
    "prefix": ("model", {"type": "BPE", "vocab": {}, "merges": [], "continuing_subword_prefix": "é"}),
    "a token that strips": ("added_tokens", [{"id": 0, "content": "a", "rstrip": True}]),
    "a token that is none": ("added_tokens", ["a"]),
    "tokens that are none": ("added_tokens", "a"),
    "a long token": ("added_tokens", [{"id": 0, "content": "a" * 200_000}]),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_llamas_lack_runs_in_the_limited_process(change):
    """One part that the library fails on, let through, ends the program in a panic or a hang."""
    name, value = CHANGES[change]
    assert is_plain(llama3(), NONE_ADDED)
    assert not is_plain(llama3() | {name: value}, NONE_ADDED)


def test_the_folders_own_tokens_count_too():
    """A token of tokenizer_config.json is given to the library as those of tokenizer.json are."""
    for placed in (AddedToken("a", True, rstrip=True), AddedToken("a", True, single_word=True)):
        assert not is_plain(llama3(), AddedTokens({}, {3: placed}, []))
        assert not is_plain(llama3(), AddedTokens({}, {}, [placed]))
    assert is_plain(llama3(), AddedTokens({}, {3: AddedToken("a", False)}, []))


@pytest.mark.parametrize("kind", ["llama2", "llama3", "bytes"])
def test_both_processes_answer_alike(tmp_path, kind):
    """A tokenizer of rarer parts would give other ids than its model was trained with."""
    folder = write_tokenizer(tmp_path / "t", kind, eos_token="<eos>")
    here = Tokenizer(folder)
    there = Tokenizer(folder)
    there.backend = LimitedTokenizerJson(folder / "tokenizer.json")
    assert type(here.backend) is TokenizerJson and len(here) == len(there)
    assert here.backend.usual_tokens() == there.backend.usual_tokens()
    assert here.backend.adds_bos == there.backend.adds_bos
    assert here.backend.token_id("<eos>") == there.backend.token_id("<eos>") is not None
    for text in [*TEXTS, "the <eos> fox"]:
        ids = here.encode(text)
        assert there.encode(text) == ids
        assert there.decode(ids) == here.decode(ids)
        stream = TextStream(there)
        assert "".join([*map(stream.push, ids), stream.flush()]) == here.decode(ids)


def strange_tokenizers():
    """Tokenizers of other kinds of models."""
    words = Fast(models.WordLevel({"the": 5, "fox": 7, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("the", -3.0), ("▁fox", -4.0)]
    unigram = Fast(models.Unigram([*pieces, *((f"<0x{b:02X}>", -10.0) for b in range(256))], 0, True))
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = Fast(models.WordPiece({"[UNK]": 0, "the": 1, "##x": 2, "fo": 3, "[CLS]": 4, "[SEP]": 5}))
    parts.normalizer = normalizers.BertNormalizer()
    parts.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    parts.post_processor = processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4))
    return {"words": words, "unigram": unigram, "parts": parts}


@pytest.mark.parametrize("kind", strange_tokenizers())
def test_strange_tokenizers_equal_the_librarys(tmp_path, kind):
    """A base with another tokenizer than Llama's would be refused, or answer from other ids."""
    fast = strange_tokenizers()[kind]
    ours = Tokenizer(folder_of(tmp_path / "t", json.loads(fast.to_str())))
    assert type(ours.backend) is LimitedTokenizerJson
    for text in TEXTS:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, start=False) == ids and ours.decode(ids) == fast.decode(ids)


# What the library fails on ------------------------------------------------------------------------

LONGER = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 4
HOSTILE = {
    "an empty regex": {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}},
    "a map that takes all memory": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    },
    "a damaged map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAAAAAA"}},
    "a text that grows": {"normalizer": {"type": "Sequence", "normalizers": LONGER}},
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a second text": {"post_processor": TEMPLATE | {"single": [{"Sequence": {"id": "B", "type_id": 0}}]}},
    "a prefix within a letter": {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
        | {"continuing_subword_prefix": "é"}
    },
    "no unknown token": {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "c"}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_the_library_fails_on_is_one_line(tmp_path, capfd, kind):
    """A panic is no Exception: it passes every handler, prints to the terminal itself, and an
    abort ends the program without a word."""
    folder = folder_of(tmp_path / "t", llama3() | HOSTILE[kind])
    good = folder_of(tmp_path / "u", llama3())
    capfd.readouterr()  # the trainer's progress
    with pytest.raises(InputError, match=r"tokenizer\.json: ") as caught:
        Tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert Tokenizer(good).encode("fox")


RARE = {
    "when encoded": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(?=Q)"}, "content": "x"}},
    "when decoded": {"decoder": {"type": "Strip", "content": "Q", "start": 0, "stop": 5}},
}


@pytest.mark.parametrize("kind", RARE)
def test_a_text_that_the_library_fails_on_is_one_line(tmp_path, capfd, kind):
    """A file may load and fail on a rare text only, hours later."""
    ours = Tokenizer(folder_of(tmp_path / "t", llama3() | RARE[kind]))
    capfd.readouterr()  # the trainer's progress
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizers library fails"):
        ours.decode(ours.encode("Q"))
    assert "fox" in ours.decode(ours.encode("the fox"))
    assert capfd.readouterr() == ("", "")
